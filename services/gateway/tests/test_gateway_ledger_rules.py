"""The ledger's rules: what was emitted is what is written, once, and budgets hold to the last cent."""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chassis.errors import Code, PlatformError
from gateway.backends import events
from gateway.backends.sqlite import Database
from gateway.backends.sqlite_ledger import SqliteLedger
from gateway.backends.sqlite_outbox import SqliteOutbox
from gateway.backends.sqlite_prices import SqlitePrices
from gateway.backends.sqlite_schema import MIGRATIONS
from gateway.backends.sqlite_usage import SqliteUsage
from gateway.core.account import Account
from gateway.core.ledger import Final, Opening, recover, settled
from gateway.core.money import Bound, Price, PriceEntry, Purse, first_day, key_owner, purses_of, tenant_owner
from gateway.core.policy import Budget, Policy
from gateway.core.ports import Principal, RequestRecord
from gateway.core.services import Delta, Done, Started, Usage
from gateway.core.usage_reports import Group, Selection

PRICE = Price(input_micros=1_000_000, cached_input_micros=500_000, output_micros=2_000_000)  # 1, 0.5 and 2 a token
NOW_MS = int(time.time() * 1000)


@dataclass
class Book:
    """The generator's book: what each usage id used, until a process with a book of its own takes its place."""

    used: dict[str, Usage] = field(default_factory=dict)
    closed: set[str] = field(default_factory=set)
    num_away: int = 0  # so many questions fail first
    is_complete: bool = True

    async def final(self, usage_id: str, *, timeout_s: float) -> Final:
        await asyncio.sleep(0)
        if self.num_away:
            self.num_away -= 1
            raise PlatformError(Code.UNAVAILABLE, "away")
        self.closed.add(usage_id)
        used = self.used.get(usage_id)
        return Final(used or Usage(), int(used is not None), self.is_complete)

    def emit(self, usage_id: str, usage: Usage) -> bool:
        if usage_id in self.closed:
            return False
        self.used[usage_id] = self.used.get(usage_id, Usage()) + usage
        return True


@asynccontextmanager
async def opened(folder: Path) -> AsyncIterator[Database]:
    database = await Database.open(folder / "gateway.db", MIGRATIONS)
    try:
        yield database
    finally:
        await database.close()


@pytest.fixture
async def database(tmp_path: Path) -> AsyncIterator[Database]:
    async with opened(tmp_path) as database:
        yield database


def ledger_of(database: Database) -> SqliteLedger:
    return SqliteLedger(database, SqliteOutbox(database), events.request_completed)


def opening(usage_id: str, key_id: str = "k1", tenant: str = "acme", model: str = "m", at_ms: int = NOW_MS) -> Opening:
    return Opening(usage_id, "req_1", "", "", tenant, key_id, model, "/v1/x", at_ms)


def record(opening: Opening, usage: Usage = Usage(), *, is_exact: bool = True) -> RequestRecord:
    return RequestRecord(
        request_id=opening.request_id,
        trace_id="",
        traceparent="",
        tenant=opening.tenant,
        key_id=opening.key_id,
        model=opening.model,
        route=opening.route,
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        cached_tokens=usage.cached_tokens,
        finish_reason="stop",
        http_status=200,
        stream=False,
        started_unix_ms=opening.started_unix_ms,
        duration_s=0.0,
        usage_id=opening.usage_id,
        is_exact=is_exact,
    )


async def priced(database: Database, price: Price = PRICE, model: str = "m", since_ms: int = 0) -> None:
    await SqlitePrices(database).put(PriceEntry(model, since_ms, price), "admin", now_unix_ms=0)


async def reserved(database: Database) -> tuple[int, int, int]:
    """Start records, and what they reserve of keys and of tenants."""
    statement = (
        "SELECT count(*), coalesce(sum(key_reserved_micros), 0), coalesce(sum(tenant_reserved_micros), 0), "
        "min(0, min(key_reserved_micros), min(tenant_reserved_micros)) FROM open_usage"
    )
    num, keys, tenants, least = await database.read(lambda c: c.execute(statement).fetchone())
    assert not least
    return num, keys, tenants


async def spent(database: Database, owner: str) -> int:
    statement = "SELECT coalesce(sum(cost_micros), 0) FROM spent_days WHERE owner = ?"
    (micros,) = await database.read(lambda c: c.execute(statement, (owner,)).fetchone())
    return int(micros)


def purses(micros: int, key_id: str = "k1", period: str = "total") -> tuple[Purse, ...]:
    return (Purse(key_owner(key_id), Budget(micros, period)),)


# What was emitted is what is written.

_ACTS = st.lists(
    st.tuples(
        st.sampled_from(["open", "emit", "done", "leave", "crash", "generator away"]),
        st.integers(0, 5),  # which of the open ones
        st.integers(0, 30),
    ),
    max_size=40,
)


@given(acts=_ACTS, budget=st.integers(0, 400))
@settings(max_examples=60, deadline=None)
def test_any_order_of_opening_emitting_leaving_and_crashing_keeps_the_sums(
    tmp_path_factory: pytest.TempPathFactory, acts: Sequence[tuple[str, int, int]], budget: int
) -> None:
    asyncio.run(_live(tmp_path_factory.mktemp("rules"), acts, budget))


async def _live(folder: Path, acts: Sequence[tuple[str, int, int]], budget: int) -> None:
    async with opened(folder) as database:
        await priced(database)
        ledger, book = ledger_of(database), Book()
        running: list[tuple[Opening, Account]] = []
        bound = Bound(10, 30)
        for number, (act, which, amount) in enumerate(acts):
            if act == "open":
                entry = opening(f"u{number}")
                try:
                    await ledger.open(entry, bound, purses(budget))
                except PlatformError as refusal:
                    assert refusal.reason == "insufficient_quota"
                else:
                    account = Account("req_1", "", "", "/v1/x", Principal("k1", "acme"), usage_id=entry.usage_id)
                    account.asks_generator()
                    running.append((entry, account))
            elif act == "generator away":
                book.num_away = 2
            elif act == "crash":
                ledger, running = ledger_of(database), []
                await recover(ledger, ledger, book, patience_s=5.0)
            elif running:
                entry, account = running[which % len(running)]
                if act == "emit":
                    _emit(book, entry.usage_id, account, amount)
                    continue
                running.remove((entry, account))
                if act == "done":
                    account.take(Done(book.used.get(entry.usage_id, Usage())))
                ended = account.record(200)
                if not ended.is_exact:
                    ended = await settled(ended, account, book, patience_s=5.0)
                await ledger.record(replace(ended, model="m"))
            num, keys, _ = await reserved(database)
            assert num == len(running) and keys == num * PRICE.most_micros(bound)
            assert await spent(database, key_owner("k1")) + keys <= budget
        last = ledger_of(database)
        await recover(last, last, book, patience_s=5.0)
        assert await reserved(database) == (0, 0, 0)
        await _check_sums(database, book)


def _emit(book: Book, usage_id: str, account: Account, amount: int) -> None:
    """The generator works on, within the bound; the gateway sees a part of it only."""
    used = book.used.get(usage_id)
    if used is None:
        assert book.emit(usage_id, Usage(10, 0, 0))
        account.take(Started(10, "v1"))
        used = Usage(10)
    more = min(amount, 30 - used.completion_tokens)
    assert book.emit(usage_id, Usage(0, more, 0))
    account.take(Delta(0, "x", more // 2))


async def _check_sums(database: Database, book: Book) -> None:
    emitted = sum(book.used.values(), Usage())
    for groups in ((Group.TENANT,), (Group.DAY, Group.KEY)):
        found = await SqliteUsage(database).sums(groups, Selection())
        assert sum(int(row["prompt_tokens"]) for row in found) == emitted.prompt_tokens
        assert sum(int(row["completion_tokens"]) for row in found) == emitted.completion_tokens
    cost = sum(int(row["cost_micros"]) for row in await SqliteUsage(database).sums((Group.MODEL,), Selection()))
    assert cost == PRICE.cost_micros(emitted) == await spent(database, key_owner("k1"))
    assert cost == await spent(database, tenant_owner("acme"))


async def test_a_usage_id_is_written_once(database: Database) -> None:
    ledger, entry = ledger_of(database), opening("u1")
    await ledger.open(entry, Bound(), ())
    await asyncio.gather(*(ledger.record(record(entry, Usage(3, 2, 0))) for _ in range(5)))
    (row,) = await SqliteUsage(database).sums((Group.KEY,), Selection())
    assert (row["num_requests"], row["prompt_tokens"]) == (1, 3)
    assert await reserved(database) == (0, 0, 0)
    assert len(await SqliteOutbox(database).unpublished(10)) == 1


async def test_what_another_process_left_is_told_and_what_runs_here_is_not(database: Database) -> None:
    before, now = ledger_of(database), ledger_of(database)
    await before.open(opening("u1"), Bound(), ())
    await now.open(opening("u2"), Bound(), ())
    assert [left.usage_id for left in await now.left_open()] == ["u1"]


async def _one_row(database: Database) -> dict[str, object]:
    ((row,), _) = await SqliteUsage(database).rows(Selection(), (0, 0), 10)
    return dict(row)


async def test_a_dead_gateways_request_is_settled_with_the_generators_number(database: Database) -> None:
    await ledger_of(database).open(opening("u1"), Bound(), ())
    ledger = ledger_of(database)
    await recover(ledger, ledger, Book({"u1": Usage(5, 7, 1)}, num_away=2), patience_s=5.0)
    row = await _one_row(database)
    assert (row["prompt_tokens"], row["completion_tokens"], row["cached_tokens"]) == (5, 7, 1)
    assert (row["error_code"], row["is_exact"], row["finish_reason"]) == ("gateway_died", 1, "error")


@pytest.mark.parametrize("book", [Book(), Book(num_away=10**6), Book(is_complete=False)])
async def test_a_dead_gateways_request_that_nobody_knows_of_says_so(database: Database, book: Book) -> None:
    await ledger_of(database).open(opening("u1"), Bound(9, 9), ())
    ledger = ledger_of(database)
    await recover(ledger, ledger, book, patience_s=0.3)
    row = await _one_row(database)
    assert (row["prompt_tokens"], row["completion_tokens"], row["is_exact"]) == (0, 0, 0)
    assert await reserved(database) == (0, 0, 0)


def _account(usage_id: str) -> Account:
    account = Account("req_1", "", "", "/v1/x", Principal("k1", "acme"), usage_id=usage_id)
    account.asks_generator()
    return account


async def test_a_broken_stream_is_settled_with_the_generators_number() -> None:
    account = _account("u1")
    account.take(Started(5, "v1"))
    account.take(Delta(0, "x", 3))
    ended = await settled(account.record(499), account, Book({"u1": Usage(5, 4, 2)}), patience_s=1.0)
    assert (ended.prompt_tokens, ended.completion_tokens, ended.cached_tokens, ended.is_exact) == (5, 4, 2, True)


@pytest.mark.parametrize("book", [Book(), Book(num_away=10**6)])
async def test_where_the_generator_died_what_was_received_counts_and_says_so(book: Book) -> None:
    account = _account("u1")
    account.take(Started(5, "v1"))
    account.take(Delta(0, "x", 3))
    ended = await settled(account.record(499), account, book, patience_s=0.3)
    assert (ended.prompt_tokens, ended.completion_tokens, ended.is_exact) == (5, 3, False)


async def test_what_never_reached_the_generator_used_nothing() -> None:
    account = _account("u1")
    ended = await settled(account.record(499), account, Book(), patience_s=1.0)
    assert (ended.prompt_tokens, ended.completion_tokens, ended.is_exact) == (0, 0, True)


async def test_a_second_attempt_is_accounted_with_the_first() -> None:
    account = _account("u1")
    account.take(Started(5, "v1"))
    account.left_a_call()
    account.take(Started(5, "v1"))
    account.take(Done(Usage(5, 4)))
    assert not account.is_exact

    async def final(usage_id: str, *, timeout_s: float) -> Final:
        return Final(Usage(10, 4), 2, is_complete=True)

    book = Book()
    book.final = final  # type: ignore[method-assign]
    ended = await settled(account.record(200), account, book, patience_s=1.0)
    assert (ended.prompt_tokens, ended.completion_tokens, ended.is_exact) == (10, 4, True)


# Budgets.


async def test_fifty_requests_on_the_last_cent_never_overshoot(database: Database) -> None:
    await priced(database)
    ledger, bound = ledger_of(database), Bound(10, 20)  # up to 50 micros each
    entries = [opening(f"u{i}") for i in range(50)]
    answers = await asyncio.gather(*(ledger.open(e, bound, purses(175)) for e in entries), return_exceptions=True)
    refused = [answer for answer in answers if answer is not None]
    assert len(refused) == 47
    assert all(isinstance(r, PlatformError) and r.reason == "insufficient_quota" and not r.retryable for r in refused)
    assert (await reserved(database))[:2] == (3, 150)
    for entry, answer in zip(entries, answers, strict=True):
        if answer is None:
            await ledger.record(record(entry, Usage(10, 5)))  # 20 each
    assert await spent(database, key_owner("k1")) == 60 and (await reserved(database)) == (0, 0, 0)
    await ledger.open(opening("next"), bound, purses(175))


async def test_the_narrower_of_key_and_tenant_decides(database: Database) -> None:
    await priced(database)
    ledger = ledger_of(database)
    principal = Principal(
        "k1", "acme", policy=Policy(budget=Budget(1_000)), tenant_policy=Policy(budget=Budget(60, "month"))
    )
    await ledger.open(opening("u1"), Bound(10, 20), purses_of(principal))
    with pytest.raises(PlatformError, match=r"the tenant's budget of the month .* 50 micros, and 10 of 60") as refusal:
        await ledger.open(opening("u2"), Bound(10, 20), purses_of(principal))
    assert refusal.value.code is Code.RATE_LIMITED and refusal.value.reason == "insufficient_quota"
    assert await reserved(database) == (1, 50, 50)


async def test_budgets_of_others_are_not_touched(database: Database) -> None:
    await priced(database)
    ledger = ledger_of(database)
    await ledger.open(opening("u1", key_id="other"), Bound(10, 20), purses(50, "other"))
    await ledger.open(opening("u2"), Bound(10, 20), purses(50))
    assert await reserved(database) == (2, 100, 0)


async def test_what_was_spent_before_there_was_a_budget_counts(database: Database) -> None:
    await priced(database)
    ledger = ledger_of(database)
    await ledger.record(record(opening("u1"), Usage(10, 5)))
    with pytest.raises(PlatformError):
        await ledger.open(opening("u2"), Bound(1, 0), purses(20))
    await ledger.open(opening("u3"), Bound(1, 0), purses(21))


@pytest.mark.parametrize(("period", "is_refused"), [("day", False), ("month", False), ("total", True)])
async def test_a_new_period_begins_with_a_full_budget(database: Database, period: str, is_refused: bool) -> None:
    await priced(database)
    ledger = ledger_of(database)
    long_ago = NOW_MS - 40 * 86_400_000
    await ledger.record(record(opening("u1", at_ms=long_ago), Usage(10, 5)))
    if is_refused:
        with pytest.raises(PlatformError):
            await ledger.open(opening("u2"), Bound(1, 0), purses(20, period=period))
    else:
        await ledger.open(opening("u2"), Bound(1, 0), purses(20, period=period))


async def test_a_model_without_a_price_costs_a_budget_nothing(database: Database) -> None:
    ledger = ledger_of(database)
    await ledger.open(opening("u1"), Bound(10, 20), purses(0))
    assert await reserved(database) == (1, 0, 0)


def test_the_first_day_of_a_period() -> None:
    day = (datetime(2026, 11, 24, tzinfo=UTC) - datetime(1970, 1, 1, tzinfo=UTC)).days
    assert first_day("day", day) == day
    assert first_day("month", day) == day - 23
    assert first_day("total", day) == 0


# Prices.


@given(st.integers(0, 10**6), st.integers(0, 10**6), st.integers(0, 10**6), st.tuples(*[st.integers(0, 10**8)] * 3))
def test_a_request_within_its_bound_never_costs_more_than_was_reserved(
    prompt: int, completion: int, cached: int, prices: tuple[int, int, int]
) -> None:
    price, usage = Price(*prices), Usage(prompt, completion, min(cached, prompt))
    assert 0 <= price.cost_micros(usage) <= price.most_micros(Bound(prompt, completion))


def test_costs_are_rounded_up_to_a_micro() -> None:
    price = Price(input_micros=150_000, cached_input_micros=75_000, output_micros=600_000)
    assert price.cost_micros(Usage(10, 10, 0)) == 8  # 1.5 + 6
    assert price.cost_micros(Usage(1, 0, 1)) == 1 and price.cost_micros(Usage()) == 0


async def test_a_cost_is_that_of_the_moment_at_which_the_request_came(database: Database) -> None:
    ledger = ledger_of(database)
    await priced(database, Price(1_000_000, 0, 0), since_ms=NOW_MS - 1000)
    await priced(database, Price(9_000_000, 0, 0), since_ms=NOW_MS + 1000)
    for number, at_ms in enumerate((NOW_MS - 2000, NOW_MS, NOW_MS + 2000)):
        await ledger.record(record(opening(f"u{number}", at_ms=at_ms), Usage(2, 0)))
    rows, _ = await SqliteUsage(database).rows(Selection(), (0, 0), 10)
    assert [row["cost_micros"] for row in rows] == [0, 2, 18]


async def test_a_tuned_model_has_its_bases_price_unless_it_has_its_own(database: Database) -> None:
    ledger = ledger_of(database)
    await priced(database, Price(1_000_000, 0, 0))
    await priced(database, Price(5_000_000, 0, 0), model="m:dear")
    await ledger.record(record(opening("u1", model="m:tuned"), Usage(1)))
    await ledger.record(record(opening("u2", model="m:dear"), Usage(1)))
    sums = await SqliteUsage(database).sums((Group.MODEL,), Selection())
    assert {row["model"]: row["cost_micros"] for row in sums} == {"m:tuned": 1, "m:dear": 5}


async def test_a_price_that_has_begun_is_not_changed(database: Database) -> None:
    with pytest.raises(PlatformError) as refusal:
        await SqlitePrices(database).put(PriceEntry("m", NOW_MS - 1, PRICE), "admin", NOW_MS)
    assert refusal.value.param == "effective_from"
