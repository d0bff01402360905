"""Start records, budgets, prices and reports over HTTP: the real ledger, the fake generator."""

import asyncio
import csv
import io
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import pytest
from starlette.types import ASGIApp

from chassis.errors import Code, PlatformError
from chassis.telemetry import tracer
from gateway.api.http import Limits, make_app
from gateway.api.http_usage import usage_router
from gateway.api.settlement import Recorder
from gateway.backends import events
from gateway.backends.graph_files import Services, assemble, read_graphs
from gateway.backends.sqlite import Database
from gateway.backends.sqlite_ledger import SqliteLedger
from gateway.backends.sqlite_outbox import SqliteOutbox
from gateway.backends.sqlite_prices import SqlitePrices
from gateway.backends.sqlite_schema import MIGRATIONS
from gateway.backends.sqlite_usage import SqliteUsage
from gateway.core.ledger import Final, StartRecords
from gateway.core.money import Price, PriceEntry
from gateway.core.policy import Budget, Policy
from gateway.core.ports import LimitState, Principal, RequestRecord
from gateway.core.services import Usage
from gateway.core.serving import Serving
from gateway.core.sizing import Sizes
from gateway.core.usage_reports import Selection
from testkit import eventually

GRAPHS_DIR = Path(__file__).parents[2] / "src" / "gateway" / "graphs"
MODEL, ADMIN = "smollm2-135m-instruct", "sk-admin-secret"
RICH, POOR, OTHER = "sk-rich-secret", "sk-poor-secret", "sk-other-secret"


class Keys:
    """Who is who; tests change policies in place."""

    def __init__(self):
        self.principals = {
            ADMIN: Principal("admin", "admin", is_admin=True),
            RICH: Principal("rich", "acme"),
            POOR: Principal("poor", "acme", policy=Policy(budget=Budget(100))),
            OTHER: Principal("other", "umbrella"),
        }

    async def authenticate(self, key: str) -> Principal:
        return self.principals[key]


class NoLimits:
    async def hit(self, principal: Principal) -> LimitState:
        return LimitState(True, None, 0, 0.0)


class Finals:
    """The generator's book: it says the same of every id."""

    def __init__(self):
        self.answer = Final(Usage(2, 7, 0), 1, is_complete=True)
        self.asked: list[str] = []
        self.error: Exception | None = None

    async def final(self, usage_id: str, *, timeout_s: float) -> Final:
        self.asked.append(usage_id)
        if self.error is not None:
            raise self.error
        return self.answer


@dataclass
class Shop:
    """The application and its parts."""

    app: ASGIApp
    database: Database
    keys: Keys
    finals: Finals
    world: object
    recorder: Recorder

    def client(self, key: str) -> httpx.AsyncClient:
        headers = {"authorization": f"Bearer {key}"}
        transport = httpx.ASGITransport(app=self.app)
        return httpx.AsyncClient(transport=transport, base_url="http://gateway", headers=headers, trust_env=False)

    async def chat(self, key: str, **fields: object) -> httpx.Response:
        body = {"model": MODEL, "messages": [{"role": "user", "content": "one two"}], "max_tokens": 4} | fields
        async with self.client(key) as client:
            return await client.post("/v1/chat/completions", json=body)

    async def get(self, path: str, key: str = ADMIN) -> httpx.Response:
        async with self.client(key) as client:
            return await client.get(path)

    async def put_price(self, **fields: object) -> httpx.Response:
        price = {"model": MODEL, "input_micros": 1_000_000, "output_micros": 10_000_000} | fields
        async with self.client(ADMIN) as client:
            return await client.put("/admin/prices", json=price)

    async def open_records(self) -> list[tuple[object, ...]]:
        statement = "SELECT key_id, model, key_reserved_micros FROM open_usage"
        return await self.database.read(lambda c: c.execute(statement).fetchall())


@pytest.fixture
async def shop(world, tmp_path: Path) -> AsyncIterator[Shop]:
    database = await Database.open(tmp_path / "gateway.db", MIGRATIONS)
    ledger = SqliteLedger(database, SqliteOutbox(database), events.request_completed)
    keys, finals = Keys(), Finals()
    recorder = Recorder(ledger, finals)
    stages = (StartRecords(ledger, Sizes(_graphs(world), world.generator, world.embedder)),)
    app = make_app(
        catalog=world.catalog,
        serving=Serving(world.catalog, stages),
        embedder=world.embedder,
        keys=keys,
        limiter=NoLimits(),
        recorder=recorder,
        limits=Limits(timeout_s=30.0, max_body_bytes=64 * 1024, max_upload_bytes=1024 * 1024),
        routers=(usage_router(SqliteUsage(database), SqlitePrices(database)),),
    )
    yield Shop(app, database, keys, finals, world, recorder)
    await recorder.close()
    await database.close()


async def _rows(shop: Shop) -> list[dict[str, object]]:
    rows, _ = await SqliteUsage(shop.database).rows(Selection(), (0, 0), 1000)
    return [dict(row) for row in rows]


def _graphs(world):
    services = Services(world.generator, world.embedder, world.retriever, tracer().start_as_current_span)
    return assemble(read_graphs(GRAPHS_DIR), services)


# Start records.


async def test_a_start_record_stands_while_the_generator_works_and_not_afterwards(shop: Shop) -> None:
    shop.world.generator.token_s = 0.2
    asking = asyncio.create_task(shop.chat(RICH, stream=True))
    await eventually(shop.open_records)
    assert await shop.open_records() == [("rich", MODEL, 0)]
    (call,) = shop.world.generator.calls
    assert call.usage_id and call.usage_id != (await asking).headers["x-request-id"]
    await eventually(lambda: _rows(shop))
    assert await shop.open_records() == []


async def test_a_request_that_cannot_be_written_down_does_not_run(shop: Shop) -> None:
    await shop.database.close()
    assert (await shop.chat(RICH)).status_code == 503
    assert not shop.world.generator.calls


async def test_a_stream_that_broke_off_is_settled_with_the_generators_number(shop: Shop) -> None:
    shop.world.generator.error = PlatformError(Code.UNAVAILABLE, "gone")
    shop.world.generator.fail_after = 2
    await shop.chat(RICH, stream=True)
    (row,) = await eventually(lambda: _rows(shop))
    assert (row["prompt_tokens"], row["completion_tokens"], row["is_exact"]) == (2, 7, 1)
    assert shop.finals.asked == [shop.world.generator.calls[0].usage_id]


async def test_what_was_received_is_written_where_the_asking_fails_unexpectedly(shop: Shop) -> None:
    shop.world.generator.error = PlatformError(Code.UNAVAILABLE, "gone")
    shop.world.generator.fail_after = 2
    shop.finals.error = ValueError("nobody thought of this")
    await shop.chat(RICH, stream=True)
    (row,) = await eventually(lambda: _rows(shop))
    assert (row["completion_tokens"], row["is_exact"]) == (2, 0)
    assert await shop.open_records() == []


async def test_a_stream_that_ended_well_is_not_asked_for(shop: Shop) -> None:
    await shop.chat(RICH, stream=True)
    (row,) = await eventually(lambda: _rows(shop))
    assert (row["completion_tokens"], row["is_exact"]) == (4, 1) and not shop.finals.asked


async def test_embeddings_have_a_start_record_too(shop: Shop) -> None:
    shop.world.embedder.delay_s = 0.3
    async with shop.client(RICH) as client:
        asking = asyncio.create_task(
            client.post("/v1/embeddings", json={"model": "all-minilm-l6-v2", "input": ["a b", "c"]})
        )
        await eventually(shop.open_records)
        assert (await asking).status_code == 200
    (row,) = await eventually(lambda: _rows(shop))
    assert (row["model"], row["prompt_tokens"]) == ("all-minilm-l6-v2", 3)
    assert await shop.open_records() == [] and not shop.finals.asked


# Budgets.


async def test_a_budget_that_does_not_hold_the_request_is_openais_insufficient_quota(shop: Shop) -> None:
    await shop.put_price()
    refused = await shop.chat(POOR, max_tokens=10)  # up to 2 + 100
    assert refused.status_code == 429 and int(refused.headers["retry-after"]) > 0
    error = refused.json()["error"]
    assert error["code"] == "insufficient_quota" and "102 micros" in error["message"]
    assert not shop.world.generator.calls
    assert (await shop.chat(POOR, max_tokens=9)).status_code == 200
    (bad, good) = await eventually(lambda: _at_least(shop, 2))
    assert (bad["error_code"], bad["cost_micros"], good["cost_micros"]) == ("insufficient_quota", 0, 92)


async def _at_least(shop: Shop, num: int) -> list[dict[str, object]] | None:
    rows = await _rows(shop)
    return rows if len(rows) >= num else None


async def test_the_last_cent_is_given_once_to_fifty_requests_at_a_time(shop: Shop) -> None:
    await shop.put_price(input_micros=0)
    shop.world.generator.token_s = 0.05
    answers = await asyncio.gather(*(shop.chat(POOR, max_tokens=4) for _ in range(50)))  # 40 each, of 100
    assert sorted(answer.status_code for answer in answers) == [200] * 2 + [429] * 48
    await eventually(lambda: _at_least(shop, 50))
    assert sum(row["cost_micros"] for row in await _rows(shop)) == 80
    assert await shop.open_records() == []


async def test_what_was_reserved_and_not_used_can_be_spent(shop: Shop) -> None:
    await shop.put_price(input_micros=0)
    shop.world.generator.script = "abcdef"  # two tokens, however many were allowed
    for _ in range(3):  # up to 50 each, of 100
        assert (await shop.chat(POOR, max_tokens=5)).status_code == 200
        await eventually(lambda: _none_open(shop))
    assert sum(row["cost_micros"] for row in await _rows(shop)) == 60


async def _none_open(shop: Shop) -> bool:
    return not await shop.open_records()


@pytest.mark.parametrize(
    ("fields", "most"),
    [
        ({"max_tokens": 4}, 2 + 40),
        ({"max_tokens": 4, "n": 3}, 2 + 120),
        ({"max_tokens": None}, 2 + 620),  # the rest of a context of 64
        ({"model": "rag", "max_tokens": 4}, 2 + 620),  # the graph writes the prompt
    ],
)
async def test_what_is_reserved_is_the_most_that_it_can_cost(shop: Shop, fields, most: int) -> None:
    await shop.put_price()
    await shop.put_price(model="rag")
    shop.keys.principals[POOR] = Principal("poor", "acme", policy=Policy(budget=Budget(most - 1)))
    assert (await shop.chat(POOR, **fields)).status_code == 429
    shop.keys.principals[POOR] = Principal("poor", "acme", policy=Policy(budget=Budget(most)))
    assert (await shop.chat(POOR, **fields)).status_code != 429


async def test_prompts_of_ids_and_encoders_are_bounded_too(shop: Shop) -> None:
    await shop.put_price(model="all-minilm-l6-v2", input_micros=10_000_000)
    await shop.put_price()
    async with shop.client(POOR) as client:
        long = await client.post(
            "/v1/embeddings",
            json={"model": "all-minilm-l6-v2", "input": "one two " * 6},
        )
        short = await client.post("/v1/embeddings", json={"model": "all-minilm-l6-v2", "input": ["four"]})
        ids = {"model": MODEL, "prompt": [[1, 2, 3], [4]], "max_tokens": 5}  # 4 + 100, of what is left of 100
        many = await client.post("/v1/completions", json=ids)
        few = await client.post("/v1/completions", json=ids | {"max_tokens": 4})
    assert [a.status_code for a in (long, short, many, few)] == [429, 200, 429, 200]


async def test_a_key_without_a_budget_does_not_pay_for_counting(shop: Shop) -> None:
    async def tokenize(*_, **__):
        raise AssertionError("the prompt was counted")

    shop.world.generator.tokenize = tokenize
    await shop.put_price()
    assert (await shop.chat(RICH)).status_code == 200


# Prices.


async def test_prices_are_put_and_listed(shop: Shop) -> None:
    later = int((datetime.now(UTC) + timedelta(days=3)).timestamp())
    assert (await shop.put_price()).status_code == 200
    put = (await shop.put_price(cached_input_micros=5, effective_from=later)).json()
    assert put == {
        "model": MODEL,
        "input_micros": 1_000_000,
        "cached_input_micros": 5,
        "output_micros": 10_000_000,
        "effective_from": later,
    }
    statement = "SELECT actor, action, subject FROM audit"
    told = await shop.database.read(lambda c: c.execute(statement).fetchall())
    assert told == [("admin", "price.set", MODEL)] * 2
    now, then = (await shop.get("/admin/prices")).json()["data"]
    assert now["cached_input_micros"] == now["input_micros"] == 1_000_000 and then == put


@pytest.mark.parametrize(
    "fields",
    [
        {"input_micros": -1},
        {"input_micros": 1.5},
        {"input_micros": "1"},
        {"input_micros": 10**16},
        {"output_micros": None},
        {"model": ""},
        {"effective_from": 1},
        {"currency": "EUR"},
    ],
)
async def test_bad_prices_are_refused_and_the_field_is_named(shop: Shop, fields) -> None:
    answer = await shop.put_price(**fields)
    is_past = fields == {"effective_from": 1}  # nothing is wrong with the field itself: it comes too late
    assert answer.status_code == (409 if is_past else 400)
    assert answer.json()["error"]["param"] == next(iter(fields))
    assert (await shop.get("/admin/prices")).json()["data"] == []


# Reports.


@pytest.fixture
async def used(shop: Shop) -> Shop:
    """Two days, two tenants, three keys."""
    ledger = SqliteLedger(shop.database, SqliteOutbox(shop.database), events.request_completed)
    await SqlitePrices(shop.database).put(_price(), "admin", now_unix_ms=0)
    day = datetime(2026, 3, 1, 12, tzinfo=UTC)
    for number, (tenant, key, model, days, error) in enumerate(
        [
            ("acme", "rich", MODEL, 0, ""),
            ("acme", "rich", "rag", 1, "=cmd()"),
            ("acme", "poor", MODEL, 1, ""),
            ("umbrella", "other", MODEL, 1, ""),
        ]
    ):
        await ledger.record(_record(number, tenant, key, model, day + timedelta(days=days), error))
    return shop


def _price() -> PriceEntry:
    return PriceEntry(MODEL, 0, Price(1_000_000, 1_000_000, 2_000_000))


def _record(number: int, tenant: str, key: str, model: str, at: datetime, error: str) -> RequestRecord:
    return RequestRecord(
        request_id=f'=HYPERLINK("x{number}")',
        trace_id="",
        traceparent="",
        tenant=tenant,
        key_id=key,
        model=model,
        route="/v1/chat/completions",
        prompt_tokens=10,
        completion_tokens=number,
        cached_tokens=1,
        finish_reason="stop",
        http_status=200,
        stream=False,
        started_unix_ms=int(at.timestamp() * 1000),
        duration_s=0.5,
        error_code=error,
        usage_id=f"u{number}",
    )


async def test_the_report_is_by_tenant_key_and_model_where_nothing_is_asked(used: Shop) -> None:
    data = (await used.get("/admin/usage")).json()["data"]
    assert [(row["tenant"], row["key_id"], row["model"]) for row in data] == [
        ("acme", "poor", MODEL),
        ("acme", "rich", "rag"),
        ("acme", "rich", MODEL),
        ("umbrella", "other", MODEL),
    ]
    assert data[0] == {
        "tenant": "acme",
        "key_id": "poor",
        "model": MODEL,
        "num_requests": 1,
        "num_errors": 0,
        "prompt_tokens": 10,
        "completion_tokens": 2,
        "cached_tokens": 1,
        "cost_micros": 14,
    }


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("group_by=day", [("2026-03-01", 10), ("2026-03-02", 30)]),
        ("group_by=tenant", [("acme", 24), ("umbrella", 16)]),
        ("group_by=tenant&from=2026-03-02", [("acme", 14), ("umbrella", 16)]),
        ("group_by=key&to=2026-03-01", [("rich", 10)]),
        ("group_by=model&key=rich", [("rag", 0), (MODEL, 10)]),
        ("group_by=key&tenant=umbrella&from=2026-03-01&to=2026-03-02", [("other", 16)]),
        ("group_by=day&model=nothing", []),
    ],
)
async def test_sums_by_what_is_asked(used: Shop, query: str, expected) -> None:
    data = (await used.get(f"/admin/usage?{query}")).json()["data"]
    assert [(next(iter(row.values())), row["cost_micros"]) for row in data] == expected


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("group_by=colour", "group_by"),
        ("group_by=tenant;DROP", "group_by"),
        ("from=yesterday", "from"),
        ("to=2026-13-01", "to"),
        ("format=xml", "format"),
        (f"tenant={'x' * 300}", "tenant"),
    ],
)
async def test_bad_reports_are_refused_and_the_field_is_named(used: Shop, query: str, param: str) -> None:
    answer = await used.get(f"/admin/usage?{query}")
    assert answer.status_code == 400 and answer.json()["error"]["param"] == param


async def test_sums_as_csv(used: Shop) -> None:
    answer = await used.get("/admin/usage?group_by=day,tenant&format=csv")
    assert (
        answer.headers["content-type"].startswith("text/csv") and "attachment" in answer.headers["content-disposition"]
    )
    assert answer.text.endswith("\r\n") and answer.text.count("\r\n") == 4
    rows = list(csv.DictReader(io.StringIO(answer.text, newline="")))
    assert [(row["day"], row["tenant"], row["cost_micros"]) for row in rows] == [
        ("2026-03-01", "acme", "10"),
        ("2026-03-02", "acme", "14"),
        ("2026-03-02", "umbrella", "16"),
    ]


async def test_rows_as_csv_cannot_run_as_formulas(used: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.api.http_usage._PAGE_ROWS", 2)  # several pages
    text = (await used.get("/admin/usage/rows?from=2026-03-02")).text
    rows = list(csv.DictReader(io.StringIO(text, newline="")))
    assert [row["completion_tokens"] for row in rows] == ["1", "2", "3"]
    assert rows[0]["request_id"] == '\'=HYPERLINK("x1")' and rows[0]["error_code"] == "'=cmd()"


async def test_a_key_sees_its_own_usage_and_no_other(used: Shop) -> None:
    data = (await used.get("/v1/usage", RICH)).json()["data"]
    assert [(row["model"], row["num_requests"]) for row in data] == [("rag", 1), (MODEL, 1)]
    assert (await used.get("/v1/usage?group_by=day&model=rag", RICH)).json()["data"][0]["day"] == "2026-03-02"
    for query in ("group_by=tenant", "group_by=key"):
        assert (await used.get(f"/v1/usage?{query}", RICH)).status_code == 400
    assert (await used.get("/v1/usage?key=poor&tenant=umbrella", RICH)).json()["data"] == data


async def test_reports_of_nothing(shop: Shop) -> None:
    assert (await shop.get("/admin/usage")).json() == {"object": "list", "data": []}
    assert (await shop.get("/admin/usage?format=csv")).text.startswith("tenant,key")
    assert (await shop.get("/v1/usage", RICH)).json()["data"] == []
    assert (await shop.get("/admin/usage/rows")).text.startswith("id,started_unix_ms")
