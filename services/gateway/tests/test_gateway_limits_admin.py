"""/admin/limits over real SQLite: what is written, who may, and how other gateways learn of it."""

import asyncio

import httpx
import pytest
from fastapi import FastAPI

from chassis.errors import Code, PlatformError
from gateway.api import errors
from gateway.api.http_admin_limits import limits_router
from gateway.api.middleware import RequestFrame
from gateway.api.middleware_access import Authentication, BodyCap
from gateway.backends.sqlite import Database
from gateway.backends.sqlite_audit import SqliteAudit
from gateway.backends.sqlite_limits import SqliteLimits
from gateway.backends.sqlite_schema import MIGRATIONS
from gateway.core.audit import AuditFilter
from gateway.core.platform_limits import PlatformLimits
from gateway.core.policy import Algorithm, Counted, Limit
from gateway.core.ports import Principal
from testkit import eventually

LIMITS = [
    {"counted": "tokens", "amount": 1000, "window_s": 1.5, "algorithm": "token_bucket", "model": "rag"},
    {"counted": "concurrency", "amount": 8, "window_s": 60.0, "algorithm": "fixed_window", "model": None},
]


class Keys:
    async def authenticate(self, key):
        if key not in ("admin", "user"):
            raise PlatformError(Code.UNAUTHENTICATED, "no such key")
        return Principal(key, "acme", is_admin=key == "admin")


@pytest.fixture
async def database(tmp_path):
    opened = await Database.open(tmp_path / "gateway.db", MIGRATIONS)
    yield opened
    await opened.close()


@pytest.fixture
async def platform(database):
    return PlatformLimits(SqliteLimits(database))


@pytest.fixture
async def client(platform):
    routes = FastAPI()
    errors.install(routes)
    routes.include_router(limits_router(platform))
    capped = BodyCap(routes, max_body_bytes=64_000, max_upload_bytes=64_000)
    app = RequestFrame(Authentication(capped, keys=Keys(), open_app=routes), timeout_s=30)
    headers = {"authorization": "Bearer admin"}
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(app=app), base_url="http://gateway", headers=headers
    ) as opened:
        yield opened


async def test_what_was_put_is_read_and_holds_at_once(client, platform):
    assert (await client.get("/admin/limits")).json() == {"object": "list", "limits": []}
    put = await client.put("/admin/limits", json={"limits": LIMITS})
    assert put.status_code == 200 and put.json()["limits"] == LIMITS
    assert (await client.get("/admin/limits")).json()["limits"] == LIMITS
    assert platform.limits == (
        Limit(Counted.TOKENS, 1000, 1.5, Algorithm.TOKEN_BUCKET, "rag"),
        Limit(Counted.CONCURRENCY, 8),
    )
    await client.put("/admin/limits", json={"limits": []})
    assert platform.limits == ()


async def test_other_gateways_learn_of_it_by_themselves(client, database):
    other = PlatformLimits(SqliteLimits(database))
    task = asyncio.create_task(other.run())
    await client.put("/admin/limits", json={"limits": LIMITS})
    await eventually(lambda: len(other.limits) == 2)
    task.cancel()


async def test_every_change_is_in_the_audit_log(client, database):
    await client.put("/admin/limits", json={"limits": LIMITS})
    (row,) = await SqliteAudit(database).newest(AuditFilter(), limit=10, before=None)
    assert (row.actor, row.action, row.subject) == ("admin", "limits.replaced", "platform")
    assert '"amount": 1000' in row.details_json


@pytest.mark.parametrize("method", ["GET", "PUT"])
async def test_only_admins_may(client, method):
    answer = await client.request(
        method, "/admin/limits", json={"limits": []}, headers={"authorization": "Bearer user"}
    )
    assert answer.status_code == 403


@pytest.mark.parametrize(
    ("limits", "param"),
    [
        ("none", "limits"),
        ([{"amount": 1}], "limits[0].counted"),
        ([{"counted": "requests"}], "limits[0].amount"),
        ([{"counted": "requests", "amount": 0}], "limits[0].amount"),
        ([{"counted": "requests", "amount": 1.5}], "limits[0].amount"),
        ([{"counted": "requests", "amount": True}], "limits[0].amount"),
        ([{"counted": "money", "amount": 1}], "limits[0].counted"),
        ([{"counted": "requests", "amount": 1, "window_s": 0}], "limits[0].window_s"),
        ([{"counted": "requests", "amount": 1, "window_s": 1e300}], "limits[0].window_s"),
        ([{"counted": "requests", "amount": 1, "algorithm": "guess"}], "limits[0].algorithm"),
        ([{"counted": "requests", "amount": 1, "tenant": "acme"}], "limits[0].tenant"),
        ([{"counted": "requests", "amount": 1}] * 65, "limits"),
    ],
)
async def test_what_is_no_limit_is_refused_and_changes_nothing(client, platform, limits, param):
    answer = await client.put("/admin/limits", json={"limits": limits})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param
    assert platform.limits == ()
