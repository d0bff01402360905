"""A database of the release before keys had policies and usage had costs: everything in it goes on."""

import pytest

from gateway.backends import events
from gateway.backends.sqlite import Database
from gateway.backends.sqlite_keys import SqliteKeys
from gateway.backends.sqlite_ledger import SqliteLedger
from gateway.backends.sqlite_outbox import SqliteOutbox
from gateway.backends.sqlite_schema import MIGRATIONS
from gateway.backends.sqlite_usage import SqliteUsage
from gateway.core.keys import KeyRing, secret_hmac
from gateway.core.ledger import Opening
from gateway.core.money import Bound, purses_of
from gateway.core.policy import UNRESTRICTED
from gateway.core.ports import RequestRecord
from gateway.core.usage_reports import Group, Selection

PEPPER = b"a pepper of tests"
KEY_ID, SECRET = "0123456789abcdef", "s" * 43
DAY_MS = 86_400_000
STATEMENTS = (
    ("INSERT INTO tenants VALUES ('acme', 1)", ()),
    ("INSERT INTO keys VALUES (?, 'acme', ?, 0, 60, 1, NULL)", (KEY_ID, secret_hmac(PEPPER, SECRET))),
    *(
        (
            "INSERT INTO usage VALUES (NULL, 'req', '', 'acme', ?, 'm', '/v1/chat/completions', 10, 5, 2, "
            "'stop', 200, 0, ?, 0.1, 0.05, ?)",
            (KEY_ID, at_ms, error),
        )
        for at_ms, error in ((DAY_MS - 1, ""), (DAY_MS, ""), (DAY_MS + 1, "overloaded"))
    ),
    ("INSERT INTO usage_totals VALUES ('acme', ?, 'm', 3, 1, 30, 15, 6)", (KEY_ID,)),
)


@pytest.fixture
async def database(tmp_path):
    path = tmp_path / "gateway.db"
    released = await Database.open(path, MIGRATIONS[:2])
    for statement, values in STATEMENTS:
        await released.write(lambda connection, s=statement, v=values: connection.execute(s, v).rowcount)
    await released.close()
    migrated = await Database.open(path, MIGRATIONS)
    yield migrated
    await migrated.close()


async def test_keys_go_on_and_nothing_restricts_them(database):
    principal = await KeyRing(SqliteKeys(database), PEPPER).authenticate(f"sk-{KEY_ID}-{SECRET}")
    assert (principal.tenant, principal.requests_per_minute, principal.allows_text) == ("acme", 60, True)
    assert (principal.policy, principal.tenant_policy) == (UNRESTRICTED, UNRESTRICTED)
    assert purses_of(principal) == ()


async def test_what_was_used_is_in_the_reports_by_day_too(database):
    reports = SqliteUsage(database)
    (whole,) = await reports.sums([Group.TENANT], Selection())
    days = await reports.sums([Group.DAY], Selection())
    assert (whole["num_requests"], whole["completion_tokens"], whole["cost_micros"]) == (3, 15, 0)
    assert [(day["day"], day["num_requests"], day["num_errors"]) for day in days] == [
        ("1970-01-01", 1, 0),
        ("1970-01-02", 2, 1),
    ]
    rows, _ = await reports.rows(Selection(), (0, 0), 10)
    assert [(row["prompt_tokens"], row["is_exact"], row["cost_micros"]) for row in rows] == [(10, 1, 0)] * 3


async def test_the_ledger_goes_on_behind_it(database):
    ledger = SqliteLedger(database, SqliteOutbox(database), events.request_completed)
    opening = Opening("u1", "req_2", "", "", "acme", KEY_ID, "m", "/v1/chat/completions", 2 * DAY_MS)
    await ledger.open(opening, Bound(), ())
    assert await ledger.left_open() == []  # those of former processes: there are none
    await ledger.record(
        RequestRecord(
            request_id="req_2",
            trace_id="",
            traceparent="",
            tenant="acme",
            key_id=KEY_ID,
            model="m",
            route="/v1/chat/completions",
            prompt_tokens=1,
            completion_tokens=1,
            cached_tokens=0,
            finish_reason="stop",
            http_status=200,
            stream=False,
            started_unix_ms=2 * DAY_MS,
            duration_s=0.1,
            usage_id="u1",
        )
    )
    (whole,) = await SqliteUsage(database).sums([Group.KEY], Selection())
    assert (whole["num_requests"], whole["prompt_tokens"]) == (4, 31)
