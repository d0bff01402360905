"""The usage ledger in SQLite: what is under way, and the row, the sums and the event of what has ended.

Implements ports.Ledger and core.ledger.Openings. Every change is one transaction; a budget is judged in the one that
reserves it, and there is one writer, so that no two requests are given the same cent.
"""

import sqlite3
import uuid
from collections.abc import Callable, Sequence
from dataclasses import replace

from gateway.backends import sqlite_outbox
from gateway.backends.sqlite import Database
from gateway.backends.sqlite_outbox import SqliteOutbox
from gateway.backends.sqlite_prices import price_at
from gateway.core.ledger import Opening
from gateway.core.money import Bound, Purse, day_of, first_day, key_owner, quota_exceeded, tenant_owner
from gateway.core.outbox import Message
from gateway.core.ports import RequestRecord
from gateway.core.services import Usage

_OPENING = "usage_id, request_id, trace_id, traceparent, tenant, key_id, model, route, started_unix_ms"


class SqliteLedger:
    """Writes the tables open_usage, usage, usage_totals, usage_days and spent_days."""

    def __init__(self, database: Database, outbox: SqliteOutbox, completed: Callable[[RequestRecord], Message]) -> None:
        self._database = database
        self._outbox = outbox
        self._completed = completed
        self._process = uuid.uuid4().hex  # one process owns the file: what others opened, they left

    async def open(self, opening: Opening, bound: Bound, purses: Sequence[Purse]) -> None:
        """See Openings.open. A power loss may take it: whatever ran in this house has stopped with us then."""

        def unit(connection: sqlite3.Connection) -> None:
            reserved = _reserve(connection, opening, bound, purses) if purses else {}
            connection.execute(
                f"INSERT INTO open_usage (opened_by, {_OPENING}, key_reserved_micros, tenant_reserved_micros) "
                "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    self._process,
                    opening.usage_id,
                    opening.request_id,
                    opening.trace_id,
                    opening.traceparent,
                    opening.tenant,
                    opening.key_id,
                    opening.model,
                    opening.route,
                    opening.started_unix_ms,
                    reserved.get(key_owner(opening.key_id), 0),
                    reserved.get(tenant_owner(opening.tenant), 0),
                ),
            )

        await self._database.write(unit, survives_power_loss=False)

    async def left_open(self) -> Sequence[Opening]:
        """See Openings.left_open."""

        def query(connection: sqlite3.Connection) -> list[Opening]:
            rows = connection.execute(f"SELECT {_OPENING} FROM open_usage WHERE opened_by <> ?", (self._process,))
            return [Opening(*row) for row in rows]

        return await self._database.read(query)

    async def record(self, record: RequestRecord) -> None:
        """Writes the usage row, the sums and the event, and strikes off the start record; durable when it returns.

        Once it has begun it is written even if the caller is cancelled.
        """

        def unit(connection: sqlite3.Connection) -> bool:
            if record.usage_id and _is_written(connection, record.usage_id):
                return False
            _insert(connection, record)
            connection.execute("DELETE FROM open_usage WHERE usage_id = ?", (record.usage_id,))
            sqlite_outbox.add(connection, self._completed(_with_allowed_text(connection, record)))
            return True

        if await self._database.write(unit):
            self._outbox.notify()


def _reserve(connection: sqlite3.Connection, opening: Opening, bound: Bound, purses: Sequence[Purse]) -> dict[str, int]:
    """Returns what is to be reserved, by owner; raises RATE_LIMITED where a purse does not hold it."""
    wanted_micros = price_at(connection, opening.model, opening.started_unix_ms).most_micros(bound)
    today = day_of(opening.started_unix_ms)
    for purse in purses:
        left_micros = purse.budget.amount_micros - _committed(connection, opening, purse, today)
        if wanted_micros > left_micros or (wanted_micros == 0 and left_micros < 0):
            raise quota_exceeded(purse, left_micros, wanted_micros, today)
    return {purse.owner: wanted_micros for purse in purses}


def _committed(connection: sqlite3.Connection, opening: Opening, purse: Purse, today: int) -> int:
    """What was spent in the budget's period, and what is reserved; a reservation counts whenever it was made."""
    (spent,) = connection.execute(
        "SELECT coalesce(sum(cost_micros), 0) FROM spent_days WHERE owner = ? AND day >= ?",
        (purse.owner, first_day(purse.budget.period, today)),
    ).fetchone()
    column, value = ("key", opening.key_id) if purse.owner == key_owner(opening.key_id) else ("tenant", opening.tenant)
    (reserved,) = connection.execute(
        f"SELECT coalesce(sum({column}_reserved_micros), 0) FROM open_usage "
        f"WHERE {'key_id' if column == 'key' else 'tenant'} = ? AND {column}_reserved_micros > 0",
        (value,),
    ).fetchone()
    return int(spent) + int(reserved)


def _is_written(connection: sqlite3.Connection, usage_id: str) -> bool:
    found = connection.execute("SELECT 1 FROM usage WHERE usage_id = ? AND usage_id <> ''", (usage_id,)).fetchone()
    return found is not None


def _insert(connection: sqlite3.Connection, record: RequestRecord) -> None:
    usage = Usage(record.prompt_tokens, record.completion_tokens, record.cached_tokens)
    cost_micros = price_at(connection, record.model, record.started_unix_ms).cost_micros(usage)
    connection.execute(
        """
        INSERT INTO usage (request_id, trace_id, tenant, key_id, model, route, prompt_tokens, completion_tokens,
            cached_tokens, finish_reason, http_status, stream, started_unix_ms, duration_s, ttft_s, error_code,
            usage_id, cost_micros, is_exact, repeat, repeated_prompt_tokens, repeated_completion_tokens)
        VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
        """,
        (
            record.request_id,
            record.trace_id,
            record.tenant,
            record.key_id,
            record.model,
            record.route,
            record.prompt_tokens,
            record.completion_tokens,
            record.cached_tokens,
            record.finish_reason,
            record.http_status,
            record.stream,
            record.started_unix_ms,
            record.duration_s,
            record.ttft_s,
            record.error_code,
            record.usage_id,
            cost_micros,
            record.is_exact,
            record.repeat,
            record.repeated_prompt_tokens,
            record.repeated_completion_tokens,
        ),
    )
    _add_to_sums(connection, record, cost_micros)


_ADDED = """
    num_requests = num_requests + 1,
    num_errors = num_errors + excluded.num_errors,
    prompt_tokens = prompt_tokens + excluded.prompt_tokens,
    completion_tokens = completion_tokens + excluded.completion_tokens,
    cached_tokens = cached_tokens + excluded.cached_tokens,
    cost_micros = cost_micros + excluded.cost_micros
"""


def _add_to_sums(connection: sqlite3.Connection, record: RequestRecord, cost_micros: int) -> None:
    whose = (record.tenant, record.key_id, record.model)
    figures = (
        bool(record.error_code),
        record.prompt_tokens,
        record.completion_tokens,
        record.cached_tokens,
        cost_micros,
    )
    day = day_of(record.started_unix_ms)
    connection.execute(
        "INSERT INTO usage_totals VALUES (?, ?, ?, 1, ?, ?, ?, ?, ?) "
        f"ON CONFLICT (tenant, key_id, model) DO UPDATE SET {_ADDED}",
        (*whose, *figures),
    )
    connection.execute(
        "INSERT INTO usage_days VALUES (?, ?, ?, ?, 1, ?, ?, ?, ?, ?) "
        f"ON CONFLICT (day, tenant, key_id, model) DO UPDATE SET {_ADDED}",
        (day, *whose, *figures),
    )
    if cost_micros:
        for owner in (key_owner(record.key_id), tenant_owner(record.tenant)):
            connection.execute(
                "INSERT INTO spent_days VALUES (?, ?, ?) "
                "ON CONFLICT (owner, day) DO UPDATE SET cost_micros = cost_micros + excluded.cost_micros",
                (owner, day, cost_micros),
            )


def _with_allowed_text(connection: sqlite3.Connection, record: RequestRecord) -> RequestRecord:
    """Removes the texts unless the tenant allows them, whatever the caller thinks."""
    if not record.prompt_text and not record.completion_text:
        return record
    allowed = connection.execute("SELECT allows_text FROM tenants WHERE tenant = ?", (record.tenant,)).fetchone()
    return record if allowed and allowed[0] else replace(record, prompt_text="", completion_text="")
