"""Keys and tenants over HTTP: scopes, lists of models, expiry, rotation, and what administrators may say and see."""

import asyncio
import json
import time

import httpx
import pytest
import uvicorn

from gateway.api.http import Limits, make_app
from gateway.api.http_admin_audit import audit_router
from gateway.api.http_admin_keys import keys_router
from gateway.api.http_admin_tenants import tenants_router
from gateway.api.middleware_account import Recorder
from gateway.backends.sqlite import Database
from gateway.backends.sqlite_audit import SqliteAudit
from gateway.backends.sqlite_keys import SqliteKeys
from gateway.backends.sqlite_schema import MIGRATIONS
from gateway.core.administration import Administration, NewKey
from gateway.core.keys import KeyRing
from gateway.core.limits import LocalLimiter
from gateway.core.serving import Serving
from testkit import free_port

ADMIN_KEY = "sk-admin-0123456789abcdef"
MODEL = "smollm2-135m-instruct"
CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "hello"}]}
ROUTES = {  # a route of each scope that this application has
    "inference": ("POST", "/v1/chat/completions", CHAT),
    "embeddings": ("POST", "/v1/embeddings", {"model": "all-minilm-l6-v2", "input": "hello"}),
    "batches": ("POST", "/v1/batches", {}),
    "models.read": ("GET", "/v1/models", None),
    "admin": ("GET", "/admin/keys", None),
}


class Silent:
    async def access_changed(self, *, key_ids, tenants):
        pass


class Gateway:
    def __init__(self, app, database, office, ledger):
        self.app, self.database, self.office, self.ledger = app, database, office, ledger
        transport = httpx.ASGITransport(app=app)
        self.client = httpx.AsyncClient(transport=transport, base_url="http://gateway", trust_env=False)

    async def send(self, method, path, key=ADMIN_KEY, body=None):
        return await self.client.request(method, path, json=body, headers={"authorization": f"Bearer {key}"})

    async def key(self, **wanted):
        answer = await self.send("POST", "/admin/keys", body={"tenant": "acme"} | wanted)
        assert answer.status_code == 200, answer.text
        return answer.json()["id"], answer.json()["key"]

    async def patch(self, path, body):
        answer = await self.send("PATCH", path, body=body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    async def audit(self, query=""):
        return (await self.send("GET", f"/admin/audit{query}")).json()["data"]


@pytest.fixture
async def gateway(world, tmp_path):
    database = await Database.open(tmp_path / "gateway.db", MIGRATIONS)
    book = SqliteKeys(database)
    ring = KeyRing(book, b"pepper")
    office = Administration(book, b"pepper", ring, Silent())
    await office.configure_key(ADMIN_KEY, "admin", is_admin=True, allows_text=False)
    app = make_app(
        catalog=world.catalog,
        serving=Serving(world.catalog),
        embedder=world.embedder,
        keys=ring,
        limiter=LocalLimiter(),
        recorder=Recorder(world.ledger),
        limits=Limits(timeout_s=30.0, max_body_bytes=64 * 1024, max_upload_bytes=1024 * 1024),
        routers=(keys_router(office), tenants_router(office), audit_router(SqliteAudit(database))),
    )
    made = Gateway(app, database, office, world.ledger)
    yield made
    await made.client.aclose()
    await database.close()


def refused(response, status, code):
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (status, code), response.text
    return error


@pytest.mark.parametrize("scope", ROUTES)
async def test_a_key_with_a_scope_may_use_its_routes_and_no_others(gateway, scope):
    _, key = await gateway.key(policy={"scopes": [scope]}, is_admin=True)
    for name, (method, path, body) in ROUTES.items():
        answer = await gateway.send(method, path, key, body)
        if name == scope:
            assert answer.status_code in (200, 404), answer.text  # not every route is there, but none is forbidden
        else:
            assert name in refused(answer, 403, "scope_missing")["message"]
    refused(await gateway.send("GET", "/v1/unheard-of", key), 403, "scope_missing")


async def test_the_tenants_scopes_hold_beside_the_keys(gateway):
    _, key = await gateway.key()
    refused(await gateway.send("GET", "/v1/unheard-of", key), 404, "unknown_url")
    await gateway.patch("/admin/tenants/acme", {"policy": {"scopes": ["inference"]}})
    assert (await gateway.send(*ROUTES["inference"][:2], key, CHAT)).status_code == 200
    refused(await gateway.send("GET", "/v1/models", key), 403, "scope_missing")
    _, key = await gateway.key(policy={"scopes": ["models.read"]})
    refused(await gateway.send("GET", "/v1/models", key), 403, "scope_missing")
    refused(await gateway.send(*ROUTES["inference"][:2], key, CHAT), 403, "scope_missing")


async def test_the_scope_admin_makes_nobody_an_admin(gateway):
    _, key = await gateway.key(policy={"scopes": ["admin"]})
    refused(await gateway.send("GET", "/admin/keys", key), 403, "admin_key_required")


async def test_a_scope_is_asked_before_the_body_is_read_and_after_the_limit_is_counted(gateway):
    _, key = await gateway.key(policy={"scopes": []}, rpm=1)
    refused(await gateway.send("POST", "/v1/chat/completions", key, {"model": 7}), 403, "scope_missing")
    refused(await gateway.send("POST", "/v1/chat/completions", key, CHAT), 429, "rate_limit_exceeded")


@pytest.mark.parametrize(
    ("models", "seen"),
    [
        (["rag"], ["rag"]),
        (["smollm2*", "all-minilm-l6-v2"], ["all-minilm-l6-v2", MODEL]),
        ([f"{MODEL}:*"], []),
        ([], []),
        (None, ["all-minilm-l6-v2", "rag", MODEL]),
    ],
)
async def test_a_key_sees_and_asks_the_models_of_its_list(gateway, models, seen):
    _, key = await gateway.key(policy={"models": models})
    listed = (await gateway.send("GET", "/v1/models", key)).json()["data"]
    assert [model["id"] for model in listed] == seen
    asked = {
        "all-minilm-l6-v2": ("/v1/embeddings", {"input": "hello"}),
        "rag": ("/v1/chat/completions", {"messages": CHAT["messages"]}),
        MODEL: ("/v1/completions", {"prompt": "hello"}),
    }
    for model, (path, body) in asked.items():
        answer = await gateway.send("POST", path, key, body | {"model": model})
        one = await gateway.send("GET", f"/v1/models/{model}", key)
        if model in seen:
            assert (answer.status_code, one.status_code) == (200, 200), answer.text
        else:
            assert refused(answer, 403, "model_not_allowed")["param"] == "model"
            refused(one, 404, "model_not_found")


async def test_what_does_not_exist_and_what_is_not_allowed_look_alike(gateway):
    _, key = await gateway.key(policy={"models": ["rag"]})
    for name in ("nothing", f"{MODEL}:another-tenants"):
        refused(
            await gateway.send("POST", "/v1/chat/completions", key, CHAT | {"model": name}), 403, "model_not_allowed"
        )


async def test_the_tenants_models_hold_beside_the_keys(gateway):
    _, key = await gateway.key(policy={"models": ["rag", MODEL]})
    await gateway.patch("/admin/tenants/acme", {"policy": {"models": [MODEL, "all-*"]}})
    listed = (await gateway.send("GET", "/v1/models", key)).json()["data"]
    assert [model["id"] for model in listed] == [MODEL]


async def test_a_refused_model_leaves_a_record_without_tokens(gateway):
    _, key = await gateway.key(policy={"models": []})
    await gateway.send("POST", "/v1/embeddings", key, ROUTES["embeddings"][2])
    (record,) = gateway.ledger.records
    assert (record.http_status, record.error_code, record.prompt_tokens) == (403, "model_not_allowed", 0)


POLICY = {
    "scopes": ["files", "inference"],
    "models": ["rag"],
    "limits": [
        {"counted": "tokens", "amount": 1000, "window_s": 3600.0, "algorithm": "token_bucket", "model": "rag"},
        {"counted": "concurrency", "amount": 4, "window_s": 60.0, "algorithm": "fixed_window", "model": None},
    ],
    "budget": {"amount": 12.345678, "period": "month"},
    "priority": -3,
    "weight": 2.5,
    "caches": True,
}
NO_POLICY = {
    "scopes": None,
    "models": None,
    "limits": [],
    "budget": None,
    "priority": 0,
    "weight": 1.0,
    "caches": False,
}


async def test_a_key_is_read_and_changed_as_it_was_written(gateway):
    expires_at = int(time.time()) + 3600
    said = {"rpm": 5, "name": "ci", "metadata": {"team": "search"}, "expires_at": expires_at, "policy": POLICY}
    key_id, _ = await gateway.key(**said)
    shown = (await gateway.send("GET", f"/admin/keys/{key_id}")).json()
    assert shown | said == shown and shown["id"] == key_id
    changed = await gateway.patch(f"/admin/keys/{key_id}", {"policy": {"models": None, "priority": 2}, "name": "cd"})
    assert changed == shown | {"name": "cd", "policy": POLICY | {"models": None, "priority": 2}}
    assert await gateway.patch(f"/admin/keys/{key_id}", {}) == changed
    nulls = dict.fromkeys(["rpm", "is_admin", "name", "metadata", "expires_at", "policy"])
    bare = {"rpm": None, "name": "", "metadata": {}, "expires_at": None, "policy": NO_POLICY}
    assert await gateway.patch(f"/admin/keys/{key_id}", nulls) == shown | bare
    refused(await gateway.send("GET", "/admin/keys/nobody"), 404, "not_found")


@pytest.mark.parametrize(
    ("amount", "micros"), [(5, 5_000_000), (0.1, 100_000), ("0.000001", 1), ("1e3", 10**9), (0, 0), ("5.50", 5_500_000)]
)
async def test_money_is_kept_to_the_millionth(gateway, amount, micros):
    key_id, _ = await gateway.key(policy={"budget": {"amount": amount}})
    budget = (await gateway.office.key(key_id)).policy.budget
    assert (budget.amount_micros, budget.period) == (micros, "total")


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"policy": {"scopes": ["root"]}}, "policy.scopes"),
        ({"policy": {"scopes": "admin"}}, "policy.scopes"),
        ({"policy": {"models": ["a b"]}}, "policy.models[0]"),
        ({"policy": {"models": ["["]}}, "policy.models[0]"),
        ({"policy": {"models": ["x\n"]}}, "policy.models[0]"),
        ({"policy": {"models": ["m"] * 257}}, "policy.models"),
        ({"policy": {"limits": [{"counted": "sheep", "amount": 1}]}}, "policy.limits[0].counted"),
        ({"policy": {"limits": [{"counted": "tokens"}]}}, "policy.limits[0].amount"),
        ({"policy": {"limits": [{"counted": "tokens", "amount": 0}]}}, "policy.limits[0].amount"),
        ({"policy": {"limits": [{"counted": "tokens", "amount": 1.5}]}}, "policy.limits[0].amount"),
        ({"policy": {"limits": [{"counted": "tokens", "amount": 1, "window_s": 0}]}}, "policy.limits[0].window_s"),
        ({"policy": {"limits": [{"counted": "tokens", "amount": 1, "algorithm": "x"}]}}, "policy.limits[0].algorithm"),
        ({"policy": {"limits": [{"counted": "tokens", "amount": 1, "burst": 2}]}}, "policy.limits[0].burst"),
        ({"policy": {"budget": 5}}, "policy.budget"),
        ({"policy": {"budget": {}}}, "policy.budget.amount"),
        ({"policy": {"budget": {"amount": -1}}}, "policy.budget.amount"),
        ({"policy": {"budget": {"amount": "NaN"}}}, "policy.budget.amount"),
        ({"policy": {"budget": {"amount": "Infinity"}}}, "policy.budget.amount"),
        ({"policy": {"budget": {"amount": "1e999999999"}}}, "policy.budget.amount"),
        ({"policy": {"budget": {"amount": 0.0000001}}}, "policy.budget.amount"),
        ({"policy": {"budget": {"amount": "five"}}}, "policy.budget.amount"),
        ({"policy": {"budget": {"amount": "1.000000000000000000000000000001"}}}, "policy.budget.amount"),
        ({"policy": {"budget": {"amount": 10**10}}}, "policy.budget.amount"),
        ({"policy": {"budget": {"amount": True}}}, "policy.budget.amount"),
        ({"policy": {"budget": {"amount": 1, "period": "week"}}}, "policy.budget.period"),
        ({"policy": {"priority": 101}}, "policy.priority"),
        ({"policy": {"priority": "high"}}, "policy.priority"),
        ({"policy": {"weight": 0}}, "policy.weight"),
        ({"policy": {"caches": 1}}, "policy.caches"),
        ({"policy": {"colour": 1}}, "policy.colour"),
        ({"policy": []}, "policy"),
        ({"name": "x" * 129}, "name"),
        ({"metadata": {"a": 1}}, "metadata.a"),
        ({"metadata": {str(i): "" for i in range(17)}}, "metadata"),
        ({"expires_at": 1}, "expires_at"),
        ({"expires_at": 1e10}, "expires_at"),
        ({"expires_at": 2**63}, "expires_at"),
        ({"expires_at": "tomorrow"}, "expires_at"),
        ({"id": "chosen"}, "id"),
        ({"key": "chosen"}, "key"),
    ],
)
async def test_a_bad_key_is_refused_with_the_field_and_nothing_is_written(gateway, body, param):
    key_id, _ = await gateway.key()
    before = await gateway.office.keys()
    expected = 409 if body == {"expires_at": 1} else 400  # nothing is wrong with the field itself: it comes too late
    for method, path in (("POST", "/admin/keys"), ("PATCH", f"/admin/keys/{key_id}")):
        answer = await gateway.send(method, path, body=body)
        assert answer.status_code == expected, answer.text
        assert answer.json()["error"]["param"].startswith(param), answer.text
    assert await gateway.office.keys() == before


async def test_rotation_gives_a_new_secret_and_lets_the_old_one_overlap(gateway):
    key_id, old = await gateway.key()
    answer = (await gateway.send("POST", f"/admin/keys/{key_id}/rotate")).json()
    assert answer["key"].startswith(f"sk-{key_id}-") and answer["key"] != old
    assert abs(answer["former_secret_until"] - time.time() - 86_400) < 60
    for key in (old, answer["key"]):
        assert (await gateway.send("GET", "/v1/models", key)).status_code == 200
    last = (await gateway.send("POST", f"/admin/keys/{key_id}/rotate", body={"overlap_s": 0})).json()
    assert last["former_secret_until"] is None
    for key in (old, answer["key"]):
        refused(await gateway.send("GET", "/v1/models", key), 401, "invalid_api_key")
    assert (await gateway.send("GET", "/v1/models", last["key"])).status_code == 200
    for body in ({"overlap_s": -1}, {"overlap_s": 10**9}, {"overlap": 1}):
        assert (await gateway.send("POST", f"/admin/keys/{key_id}/rotate", body=body)).status_code == 400
    refused(await gateway.send("POST", "/admin/keys/nobody/rotate"), 404, "not_found")


async def test_the_configurations_keys_are_not_changed_over_http(gateway):
    refused(await gateway.send("POST", "/admin/keys/admin/rotate"), 409, "key_is_configured")
    refused(await gateway.send("PATCH", "/admin/keys/admin", body={"is_admin": False}), 409, "key_is_configured")


async def test_tenants_are_made_changed_listed_and_disabled(gateway):
    said = {"allows_text": True, "policy": POLICY}
    made = (await gateway.send("PUT", "/admin/tenants/beta", body=said)).json()
    assert made == {"tenant": "beta", "allows_text": True, "disabled": False, "disabled_at": None, "policy": POLICY}
    assert (await gateway.send("GET", "/admin/tenants/beta")).json() == made
    changed = await gateway.patch("/admin/tenants/beta", {"policy": {"scopes": None, "limits": []}})
    assert changed == made | {"policy": POLICY | {"scopes": None, "limits": []}}
    _, key = await gateway.key(tenant="beta")
    assert (await gateway.send("GET", "/v1/models", key)).status_code == 200
    assert (await gateway.patch("/admin/tenants/beta", {"disabled": True}))["disabled"] is True
    refused(await gateway.send("GET", "/v1/models", key), 401, "invalid_api_key")
    await gateway.patch("/admin/tenants/beta", {"disabled": False})
    assert (await gateway.send("GET", "/v1/models", key)).status_code == 200
    assert (await gateway.send("PUT", "/admin/tenants/beta", body={})).json()["policy"] == NO_POLICY
    listed = (await gateway.send("GET", "/admin/tenants")).json()["data"]
    assert [row["tenant"] for row in listed] == ["admin", "beta"]


@pytest.mark.parametrize(
    ("method", "tenant", "body", "status"),
    [
        ("GET", "nobody", None, 404),
        ("PATCH", "nobody", {}, 404),
        ("DELETE", "acme", None, 405),
        ("PUT", "UPPER", {}, 400),
        ("PUT", "a%00b", {}, 400),
        ("PUT", "..%2fadmin", {}, 404),
        ("PUT", "x" * 64, {}, 400),
        ("PUT", "acme", {"allows_text": "yes"}, 400),
        ("PUT", "acme", {"tenant": "other"}, 400),
        ("PATCH", "admin", {"disabled": True}, 409),  # it would lock out who asks for it
        ("PUT", "admin", {"disabled": True}, 409),
    ],
)
async def test_a_bad_word_about_a_tenant_is_refused(gateway, method, tenant, body, status):
    before = await gateway.office.tenants()
    assert (await gateway.send(method, f"/admin/tenants/{tenant}", body=body)).status_code == status
    assert await gateway.office.tenants() == before


ADMIN_ROUTES = [
    ("POST", "/admin/keys"),
    ("GET", "/admin/keys"),
    ("GET", "/admin/keys/x"),
    ("PATCH", "/admin/keys/x"),
    ("POST", "/admin/keys/x/rotate"),
    ("DELETE", "/admin/keys/x"),
    ("GET", "/admin/tenants"),
    ("GET", "/admin/tenants/x"),
    ("PUT", "/admin/tenants/x"),
    ("PATCH", "/admin/tenants/x"),
    ("GET", "/admin/audit"),
    ("GET", "/admin/audit/verify"),
]


@pytest.mark.parametrize(("method", "path"), ADMIN_ROUTES)
async def test_nobody_but_an_admin_administers(gateway, method, path):
    _, key = await gateway.key()
    refused(await gateway.send(method, path, key, {}), 403, "admin_key_required")
    assert (await gateway.client.request(method, path)).status_code == 401


async def test_every_change_is_in_the_audit_log_and_no_secret_is(gateway):
    key_id, key = await gateway.key(name="ci", policy={"models": ["rag"]})
    await gateway.patch(f"/admin/keys/{key_id}", {"rpm": 9})
    await gateway.patch(f"/admin/keys/{key_id}", {"rpm": 9})  # changes nothing, and so says nothing
    new = (await gateway.send("POST", f"/admin/keys/{key_id}/rotate", body={"overlap_s": 5})).json()["key"]
    await gateway.patch("/admin/tenants/acme", {"policy": {"budget": {"amount": 1}}})
    await gateway.send("DELETE", f"/admin/keys/{key_id}")
    rows = await gateway.audit()
    assert [(row["actor"], row["action"], row["subject"]) for row in reversed(rows)] == [
        ("configuration", "tenant.created", "admin"),
        ("configuration", "key.created", "admin"),
        ("admin", "tenant.created", "acme"),
        ("admin", "key.created", key_id),
        ("admin", "key.changed", key_id),
        ("admin", "key.rotated", key_id),
        ("admin", "tenant.changed", "acme"),
        ("admin", "key.revoked", key_id),
    ]
    assert rows[3]["details"] == {"requests_per_minute": {"from": None, "to": 9}}
    text = json.dumps(rows)
    assert not any(secret in text for secret in (key.split("-", 2)[2], new.split("-", 2)[2], ADMIN_KEY))
    assert [row["action"] for row in await gateway.audit(f"?subject={key_id}&action=key.revoked")] == ["key.revoked"]
    page = (await gateway.send("GET", "/admin/audit?limit=3")).json()
    assert len(page["data"]) == 3 and page["has_more"]
    rest = await gateway.audit(f"?before={page['data'][-1]['sequence']}")
    assert page["data"] + rest == rows


async def test_a_refused_change_leaves_no_row(gateway):
    before = await gateway.audit()
    await gateway.send("PATCH", "/admin/keys/nobody", body={"rpm": 1})
    await gateway.send("POST", "/admin/keys/admin/rotate")
    await gateway.send("PATCH", "/admin/tenants/admin", body={"disabled": True})
    assert await gateway.audit() == before


async def test_the_log_is_verified_over_http(gateway):
    before = (await gateway.send("GET", "/admin/audit/verify")).json()
    await gateway.key()
    after = (await gateway.send("GET", f"/admin/audit/verify?anchor={before['anchor']}")).json()
    assert before["ok"] and after["ok"] and after["anchor"].startswith("4:") and after["broken_at"] is None
    forged = f"{before['anchor'].split(':')[0]}:{'0' * 64}"
    broken = (await gateway.send("GET", f"/admin/audit/verify?anchor={forged}")).json()
    assert (broken["ok"], broken["broken_at"]) == (False, 2)
    refused(await gateway.send("GET", "/admin/audit/verify?anchor=x"), 400, "invalid_value")


def header_tricks(key, key_id, stored):
    """What is sent in place of a good request's headers, as raw bytes."""
    bearer = f"Authorization: Bearer {key}\r\n".encode()
    return {
        "nothing": b"",
        "stored hash as secret": f"Authorization: Bearer sk-{key_id}-{stored}\r\n".encode(),
        "basic": f"Authorization: Basic {key}\r\n".encode(),
        "two headers": bearer + b"Authorization: Bearer sk-nobody-0123456789abcdef\r\n",
        "two headers, the good one last": b"Authorization: Bearer sk-nobody-0123456789abcdef\r\n" + bearer,
        "same header twice": bearer + bearer,
        "one header with two": f"Authorization: Bearer {key}, Bearer {key}\r\n".encode(),
        "both kinds": bearer + f"x-api-key: {key}\r\n".encode(),
        "64 KB": b"Authorization: Bearer sk-" + b"a" * 65_536 + b"\r\n",
        "many headers": b"".join(b"x-%d: y\r\n" % i for i in range(2000)),
        "forwarded from home": b"X-Forwarded-For: 127.0.0.1\r\nX-Real-IP: 127.0.0.1\r\nForwarded: for=127.0.0.1\r\n",
        "user of a proxy": b"X-Forwarded-User: admin\r\nX-Authenticated-User: admin\r\n",
        "non-ascii": f"Authorization: Bearer {key}é\r\n".encode(),
        "nul inside": f"Authorization: Bearer {key[:10]}\0{key[10:]}\r\n".encode(),
        "nul at the end": f"Authorization: Bearer {key}\0\r\n".encode(),
        "folded line": f"Authorization: Bearer\r\n {key}\r\n".encode(),
        "space before the colon": f"Authorization : Bearer {key}\r\n".encode(),
        "key in the query": b"",
        "key in capitals": f"Authorization: Bearer {key.upper()}\r\n".encode(),
        "wildcard": b"Authorization: Bearer *\r\n",
        "sql": f"Authorization: Bearer sk-{key_id}' OR '1'='1-0123456789abcdef\r\n".encode(),
        "newline in the log": b"Authorization: Bearer sk-a%0aINFO-0123456789abcdef\r\n",
        "alg none": b"Authorization: Bearer eyJhbGciOiJub25lIn0.eyJzdWIiOiJhIn0.\r\n",
    }


TRICKS = tuple(header_tricks("k" * 40, "i", "h"))
TAKEN = {
    "lower case": b"authorization: bearer %s\r\n",
    "capitals": b"AUTHORIZATION: BEARER %s\r\n",
    "spaces around": b"Authorization:    Bearer    %s   \r\n",
    "anthropic's": b"X-Api-Key: %s\r\n",
    "beside a spoofed address": b"X-Forwarded-For: 10.0.0.1\r\nAuthorization: Bearer %s\r\n",
}


@pytest.fixture
async def port(gateway):
    """The application behind the server that production has."""
    number = free_port()
    server = uvicorn.Server(
        uvicorn.Config(gateway.app, host="127.0.0.1", port=number, lifespan="off", log_config=None, access_log=False)
    )
    task = asyncio.create_task(server.serve())
    while not server.started:  # noqa: ASYNC110 - uvicorn offers a flag only
        await asyncio.sleep(0.01)
    yield number
    server.should_exit = True
    await task


async def raw_status(port, headers, path=b"/admin/keys"):
    """Sends bytes as they are; returns the status and the whole answer."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET " + path + b" HTTP/1.1\r\nHost: gateway\r\nConnection: close\r\n" + headers + b"\r\n")
    async with asyncio.timeout(20):
        answer = await reader.read()
    writer.close()
    return int(answer.split(b" ", 2)[1]), answer


@pytest.mark.parametrize("name", TRICKS)
async def test_a_trick_of_authentication_opens_nothing_and_tells_nothing(gateway, port, name, caplog):
    key_id, key = await gateway.key(is_admin=True)
    stored = (await gateway.office.key(key_id)).secret_hmac.hex()
    path = f"/admin/keys?api_key={key}&authorization=Bearer%20{key}" if name == "key in the query" else "/admin/keys"
    status, answer = await raw_status(port, header_tricks(key, key_id, stored)[name], path.encode())
    # 400 where the server itself refuses to read the headers.
    assert status in (400, 401), answer
    secret = key.split("-", 2)[2]
    assert secret.encode() not in answer and stored.encode() not in answer and secret not in caplog.text
    if status == 401:
        assert b'"code":"invalid_api_key"' in answer and b"www-authenticate: Bearer" in answer
    assert (await raw_status(port, TAKEN["lower case"] % key.encode()))[0] == 200  # the server goes on


@pytest.mark.parametrize("name", TAKEN)
async def test_what_is_no_trick_is_taken(gateway, port, name):
    _, key = await gateway.key(is_admin=True)
    assert (await raw_status(port, TAKEN[name] % key.encode()))[0] == 200


async def test_a_forwarded_address_makes_no_difference_to_a_limit(gateway, port):
    _, key = await gateway.key(rpm=1)
    for i, wanted in enumerate((200, 429)):
        headers = TAKEN["lower case"] % key.encode() + b"X-Forwarded-For: 10.0.0.%d\r\n" % i
        assert (await raw_status(port, headers, b"/v1/models"))[0] == wanted


async def test_an_expired_key_is_refused_over_http(gateway):
    now = time.time()
    _, key = await gateway.office.create_key("test", NewKey("acme", expires_unix_s=int(now) - 1))
    refused(await gateway.send("GET", "/v1/models", key), 401, "invalid_api_key")
