"""The ledger and the outbox: sums are exact, texts go only where allowed, and the bus gets everything in the end."""

import asyncio
import subprocess
import sys

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pressroom.events.v1 import events_pb2

from chassis import context
from chassis.errors import Code, PlatformError
from contracts import subjects
from gateway.api.relay import Relay
from gateway.backends import events, sqlite_outbox
from gateway.backends.sqlite import Database
from gateway.backends.sqlite_keys import SqliteKeys
from gateway.backends.sqlite_ledger import SqliteLedger
from gateway.backends.sqlite_outbox import SqliteOutbox
from gateway.backends.sqlite_schema import MIGRATIONS
from gateway.backends.sqlite_usage import SqliteUsage
from gateway.core.audit import Change
from gateway.core.keys import KeyRow
from gateway.core.outbox import Message
from gateway.core.ports import RequestRecord
from gateway.core.usage_reports import TOTALS, Selection
from testkit.waiting import eventually


def record(**changes):
    fields = {
        "request_id": "req_1",
        "trace_id": "ab" * 16,
        "traceparent": "00-" + "ab" * 16 + "-" + "cd" * 8 + "-01",
        "tenant": "acme",
        "key_id": "k1",
        "model": "rag",
        "route": "/v1/chat/completions",
        "prompt_tokens": 10,
        "completion_tokens": 5,
        "cached_tokens": 2,
        "finish_reason": "stop",
        "http_status": 200,
        "stream": True,
        "started_unix_ms": 1_700_000_000_000,
        "duration_s": 1.5,
    }
    return RequestRecord(**(fields | changes))


class ScriptedBus:
    """Takes messages; while `error` is set it raises that instead."""

    def __init__(self):
        self.published = []
        self.contexts = []
        self.error = None
        self.refuses = None

    async def publish(self, subject, payload, *, message_id, traceparent=None, timeout_s=5.0):
        if self.error is not None:
            raise self.error
        if message_id == self.refuses:
            raise PlatformError(Code.PAYLOAD_TOO_LARGE, "too large")
        self.published.append(Message(subject, message_id, payload, traceparent))
        self.contexts.append(context.current().request_id)

    @property
    def ids(self):
        return [message.message_id for message in self.published]


@pytest.fixture
async def database(tmp_path):
    opened = await Database.open(tmp_path / "gateway.db", MIGRATIONS)
    yield opened
    await opened.close()


@pytest.fixture
def outbox(database):
    return SqliteOutbox(database)


@pytest.fixture
def ledger(database, outbox):
    return SqliteLedger(database, outbox, events.request_completed)


@pytest.fixture
def bus():
    return ScriptedBus()


@pytest.fixture
async def relay(outbox, bus):
    task = asyncio.create_task(Relay(outbox, bus).run())
    yield task
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def put(database, outbox, *ids):
    def unit(connection):
        for message_id in ids:
            sqlite_outbox.add(connection, Message("pressroom.test", message_id, b"x"))

    await database.write(unit)
    outbox.notify()


async def test_record_writes_row_totals_and_event_together(ledger, database, outbox):
    await ledger.record(record())
    row = await database.read(lambda c: c.execute("SELECT tenant, prompt_tokens, stream FROM usage").fetchone())
    assert row == ("acme", 10, 1)
    (pending,) = await outbox.unpublished(10)
    assert pending.message.subject == subjects.EVENTS_REQUEST_COMPLETED
    assert pending.message.traceparent == record().traceparent
    event = events_pb2.RequestCompleted.FromString(pending.message.payload)
    assert (event.request_id, event.usage.completion_tokens, event.usage.cached_tokens) == ("req_1", 5, 2)
    assert not event.HasField("grounded")


async def test_grounded_false_is_told_apart_from_absent(ledger, outbox):
    await ledger.record(record(grounded=False))
    (pending,) = await outbox.unpublished(10)
    event = events_pb2.RequestCompleted.FromString(pending.message.payload)
    assert event.HasField("grounded") and event.grounded is False


@pytest.mark.parametrize(("allows", "seen"), [(True, ("in", "out")), (False, ("", "")), (None, ("", ""))])
async def test_text_leaves_only_where_the_tenant_allows_it(ledger, outbox, database, allows, seen):
    if allows is not None:
        row, change = KeyRow("k1", "acme", b"h" * 32, False, None, 0, allows_text=allows), Change("", "", "", {})
        await SqliteKeys(database).revise_key("k1", lambda _: (row, change))
    await ledger.record(record(prompt_text="in", completion_text="out"))
    (pending,) = await outbox.unpublished(10)
    event = events_pb2.RequestCompleted.FromString(pending.message.payload)
    assert (event.prompt_text, event.completion_text) == seen


async def test_event_with_the_longest_texts_fits_the_bus():
    message = events.request_completed(record(prompt_text="\U0001f600" * 10**6, completion_text="\U0001f600" * 10**6))
    assert len(message.payload) < 1024 * 1024


async def test_two_requests_that_share_an_id_are_both_kept(ledger, outbox):
    await ledger.record(record())
    await ledger.record(record())
    assert len({p.message.message_id for p in await outbox.unpublished(10)}) == 2


_records = st.builds(
    record,
    tenant=st.sampled_from(["acme", "other"]),
    key_id=st.sampled_from(["k1", "k2"]),
    model=st.sampled_from(["rag", "smollm2-135m-instruct"]),
    prompt_tokens=st.integers(0, 10_000),
    completion_tokens=st.integers(0, 10_000),
    cached_tokens=st.integers(0, 10_000),
    error_code=st.sampled_from(["", "rate_limit_exceeded"]),
)


@given(batch=st.lists(_records, max_size=40))
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_totals_are_the_sums_of_rows_and_of_records(tmp_path_factory, batch):
    async def scenario():
        database = await Database.open(tmp_path_factory.mktemp("ledger") / "gateway.db", MIGRATIONS)
        ledger = SqliteLedger(database, SqliteOutbox(database), events.request_completed)
        await asyncio.gather(*(ledger.record(entry) for entry in batch))
        totals = await SqliteUsage(database).sums(TOTALS, Selection())
        rows = await database.read(lambda c: c.execute(ROWS).fetchall())
        await database.close()
        return totals, rows

    totals, rows = asyncio.run(scenario())
    expected: dict[tuple[str, str, str], list[int]] = {}
    for entry in batch:
        sums = expected.setdefault((entry.tenant, entry.key_id, entry.model), [0, 0, 0, 0, 0])
        for i, value in enumerate(
            (1, bool(entry.error_code), entry.prompt_tokens, entry.completion_tokens, entry.cached_tokens)
        ):
            sums[i] += value
    assert {tuple(t.values())[:3]: list(t.values())[3:8] for t in totals} == expected
    assert {row[:3]: list(row[3:]) for row in rows} == expected


ROWS = """
    SELECT tenant, key_id, model, count(*), sum(error_code != ''), sum(prompt_tokens), sum(completion_tokens),
        sum(cached_tokens)
    FROM usage GROUP BY tenant, key_id, model
"""

RECORDER = """
import asyncio, sys
from pathlib import Path
from gateway.backends import events
from gateway.backends.sqlite import Database
from gateway.backends.sqlite_ledger import SqliteLedger
from gateway.backends.sqlite_outbox import SqliteOutbox
from gateway.backends.sqlite_schema import MIGRATIONS
from gateway.core.ports import RequestRecord
from gateway.core.usage_reports import TOTALS, Selection

async def main():
    database = await Database.open(Path(sys.argv[1]), MIGRATIONS)
    ledger = SqliteLedger(database, SqliteOutbox(database), events.request_completed)
    async def write(first):
        for i in range(first, 10**9, 20):
            await ledger.record(RequestRecord(
                f"req_{i}", "", "", "acme", "k1", "rag", "/v1/x", i, 1, 0, "stop", 200, False, 0, 0.0))
            print(i, flush=True)
    await asyncio.gather(*(write(i) for i in range(20)))

asyncio.run(main())
"""


async def test_kill_9_keeps_ledger_totals_and_outbox_equal(tmp_path):
    path, answered = tmp_path / "gateway.db", []
    for _ in range(2):
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", RECORDER, str(path), stdout=subprocess.PIPE
        )
        assert process.stdout is not None
        answered += [int(await process.stdout.readline()) for _ in range(200)]
        process.kill()
        rest = (await process.stdout.read()).splitlines(keepends=True)
        answered += [int(line) for line in rest if line.endswith(b"\n")]
        await process.wait()
    database = await Database.open(path, MIGRATIONS)
    tokens = await database.read(lambda c: [t for (t,) in c.execute("SELECT prompt_tokens FROM usage")])
    (total,) = await SqliteUsage(database).sums(TOTALS, Selection())
    published = await database.read(lambda c: [p for (p,) in c.execute("SELECT payload FROM outbox")])
    events_tokens = [events_pb2.RequestCompleted.FromString(p).usage.prompt_tokens for p in published]
    # At least what was answered; at most one unanswered write for each of the twenty writers of the two runs.
    assert not set(answered) - set(tokens) and len(tokens) <= len(answered) + 40
    assert total["num_requests"] == len(tokens) and total["prompt_tokens"] == sum(tokens)
    assert sorted(events_tokens) == sorted(tokens)
    await database.close()


async def test_relay_publishes_in_order_and_with_the_request_of_each(database, outbox, ledger, bus, relay):
    await put(database, outbox, *(f"m{i}" for i in range(300)))
    await ledger.record(record())
    await eventually(lambda: len(bus.published) == 301)
    assert bus.ids[:300] == [f"m{i}" for i in range(300)]
    assert bus.contexts[-1] == "req_1" and bus.published[-1].traceparent == record().traceparent
    await eventually(_nothing_waits(outbox))


async def test_bus_that_is_away_delays_and_loses_nothing(database, outbox, bus, relay):
    bus.error = PlatformError(Code.UNAVAILABLE, "the bus is not connected")
    for i in range(5):
        await asyncio.wait_for(put(database, outbox, f"m{i}"), 1)  # nobody waits for the bus
    bus.error = None
    await eventually(lambda: len(bus.published) == 5)
    assert bus.ids == [f"m{i}" for i in range(5)]


async def test_what_an_earlier_process_left_is_published(database, bus):
    await put(database, SqliteOutbox(database), "left")
    task = asyncio.create_task(Relay(SqliteOutbox(database), bus).run())
    await eventually(lambda: bus.ids == ["left"])
    task.cancel()


async def test_message_that_the_bus_never_takes_does_not_hold_up_the_others(database, outbox, bus, relay):
    bus.refuses = "bad"
    await put(database, outbox, "a", "bad", "b")
    await eventually(lambda: bus.ids == ["a", "b"])
    await eventually(_nothing_waits(outbox))
    refused = await database.read(lambda c: c.execute("SELECT refused FROM outbox WHERE message_id = 'bad'").fetchone())
    assert "too large" in refused[0]


async def test_bus_that_fails_in_the_middle_of_a_batch_gets_the_rest_once(database, outbox, bus, relay):
    taken = bus.publish

    async def fail_on_third(subject, payload, *, message_id, **rest):
        if message_id == "m2" and not failed:
            failed.append(message_id)
            raise PlatformError(Code.UNAVAILABLE, "gone")
        await taken(subject, payload, message_id=message_id, **rest)

    failed: list[str] = []
    bus.publish = fail_on_third
    await put(database, outbox, *(f"m{i}" for i in range(5)))
    await eventually(lambda: len(bus.published) == 5)
    assert bus.ids == [f"m{i}" for i in range(5)] and failed


async def test_published_rows_are_pruned_and_waiting_ones_are_not(database, outbox):
    await put(database, outbox, "a", "b", "c")
    first, second, _ = await outbox.unpublished(10)
    await outbox.settle([first.id, second.id], [])
    assert await outbox.prune(older_than_s=3600) == 0
    assert await outbox.prune(older_than_s=-1) == 2
    assert [p.message.message_id for p in await outbox.unpublished(10)] == ["c"]


async def test_batch_is_bounded_in_bytes(database, outbox):
    def unit(connection):
        for i in range(20):
            sqlite_outbox.add(connection, Message("pressroom.test", f"m{i}", bytes(1024 * 1024)))

    await database.write(unit)
    assert 1 <= len(await outbox.unpublished(100)) <= 9


def _nothing_waits(outbox):
    async def check():
        return not await outbox.unpublished(1)

    return check
