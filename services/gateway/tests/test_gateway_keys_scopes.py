"""Every route has its scope: none can be forgotten in the table."""

import pytest
from fastapi import FastAPI

from gateway import main
from gateway.api import scopes
from gateway.api.middleware_access import is_protected
from gateway.core.policy import Policy
from gateway.core.ports import Principal
from gateway.settings import GatewaySettings


class FakeApp:
    """Takes what main composes, and runs nothing of it."""

    def __init__(self):
        self.http, self.closers = None, []

    def mount_http(self, app):
        self.http = app

    def __getattr__(self, _):
        return lambda *_: None  # whatever else it is told

    def spawn(self, _, coroutine):
        coroutine.close()

    def on_close(self, close):
        self.closers.append(close)


async def every_path(data_dir):
    """Composes what production runs (nothing of what it calls is there) and lists the application's paths."""
    peers = ("embedder", "retriever", "generator", "monitor", "trainer", "evaluator")
    settings = GatewaySettings(
        grpc_port=1,
        http_port=1,
        nats_url="nats://127.0.0.1:1",
        valkey_url="redis://127.0.0.1:1/0",
        data_dir=data_dir,
        key_pepper="p" * 16,
        **{f"{name}_addr": "127.0.0.1:1" for name in peers},
    )
    app = FakeApp()
    await main.compose(app, settings, main.read_graphs(settings.graphs_dir))
    for close in reversed(app.closers):
        await close()
    routes = app.http
    while not isinstance(routes, FastAPI):
        routes = routes._app
    return sorted(routes.openapi()["paths"])


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
