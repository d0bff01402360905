"""Every route has its scope: none can be forgotten in the table."""

import pytest
from fastapi import FastAPI

from chassis import rpc
from gateway.api import scopes
from gateway.api.http import Limits, make_app
from gateway.api.middleware_access import is_protected
from gateway.core.policy import Policy
from gateway.core.ports import Principal
from gateway.state import Peers, open_state


async def every_path(tmp_path):
    """Opens the state that production has (nothing of what it calls is there) and lists the application's paths."""
    async with rpc.connect("127.0.0.1:1") as nobody:
        return await _every_path(tmp_path, Peers(None, None, nobody, nobody, nobody, nobody))


async def _every_path(tmp_path, peers):
    state = await open_state(
        data_dir=tmp_path,
        key_pepper="pepper",
        valkey_url="redis://127.0.0.1:1/0",
        bootstrap_api_key=None,
        bootstrap_admin_key=None,
        max_upload_bytes=1,
        max_tenant_upload_bytes=1,
        request_timeout_s=1.0,
        bus=None,
        graphs={},
        peers=peers,
    )
    app = make_app(
        catalog=state.catalog,
        serving=state.serving,
        embedder=None,
        keys=state.keys,
        limiter=state.limiter,
        recorder=state.recorder,
        limits=Limits(1.0, 1, 1),
        routers=state.routers,
    )
    await state.close()
    while not isinstance(app, FastAPI):
        app = app._app
    return sorted(app.openapi()["paths"])


async def test_every_protected_route_is_in_the_table(tmp_path):
    paths = [path for path in await every_path(tmp_path) if is_protected(path)]
    assert len(paths) > 30 and "/admin/audit/verify" in paths
    assert [path for path in paths if scopes.scope_of(path) is None] == []


@pytest.mark.parametrize(
    "path", ["/v1/filesystem", "/v1/models-of-others", "/v1", "/v1/", "/admins", "/V1/files", "//v1/files", ""]
)
def test_a_path_that_only_looks_alike_has_no_scope(path):
    assert scopes.scope_of(path) is None


def test_below_a_path_its_scope_holds():
    assert scopes.scope_of("/v1/files/file_1/content") == "files"
    assert scopes.scope_of("/v1/fine_tuning/jobs/x/cancel") == "fine_tuning"
    assert set(scopes.SCOPES) == {scope for _, scope in scopes._SCOPE_OF}


def test_the_narrower_of_key_and_tenant_decides():
    one, two = Policy(scopes=frozenset({"a", "b"})), Policy(scopes=frozenset({"b", "c"}))
    both = Principal("k", "t", policy=one, tenant_policy=two)
    assert [scope for scope in "abc" if both.has_scope(scope)] == ["b"]
    one, two = Policy(models=frozenset({"m", "n:*"})), Policy(models=frozenset({"m*", "n:x"}))
    both = Principal("k", "t", policy=one, tenant_policy=two)
    assert [model for model in ("m", "mm", "n", "n:x", "n:y") if both.may_ask(model)] == ["m", "n:x"]
