"""The usage ledger in SQLite: the row, the totals and the event to publish in one transaction.

Implements ports.Ledger and ports.UsageReport.
"""

import sqlite3
from collections.abc import Callable, Mapping
from dataclasses import replace

from gateway.backends import sqlite_outbox
from gateway.backends.sqlite import Database
from gateway.backends.sqlite_outbox import SqliteOutbox
from gateway.core.outbox import Message
from gateway.core.ports import RequestRecord

_TOTALS = (
    "tenant",
    "key_id",
    "model",
    "num_requests",
    "num_errors",
    "prompt_tokens",
    "completion_tokens",
    "cached_tokens",
)


class SqliteLedger:
    """Writes the tables usage and usage_totals."""

    def __init__(self, database: Database, outbox: SqliteOutbox, completed: Callable[[RequestRecord], Message]) -> None:
        self._database = database
        self._outbox = outbox
        self._completed = completed

    async def record(self, record: RequestRecord) -> None:
        """Writes the usage row and the event to publish in one transaction; durable when it returns.

        Once it has begun it is written even if the caller is cancelled.
        """

        def unit(connection: sqlite3.Connection) -> None:
            _insert_usage(connection, record)
            sqlite_outbox.add(connection, self._completed(_with_allowed_text(connection, record)))

        await self._database.write(unit)
        self._outbox.notify()

    async def totals(self) -> list[Mapping[str, object]]:
        """Sums by tenant, key and model."""

        def query(connection: sqlite3.Connection) -> list[Mapping[str, object]]:
            rows = connection.execute(f"SELECT {', '.join(_TOTALS)} FROM usage_totals ORDER BY tenant, key_id, model")
            return [dict(zip(_TOTALS, row, strict=True)) for row in rows]

        return await self._database.read(query)


def _insert_usage(connection: sqlite3.Connection, record: RequestRecord) -> None:
    connection.execute(
        """
        INSERT INTO usage (request_id, trace_id, tenant, key_id, model, route, prompt_tokens, completion_tokens,
            cached_tokens, finish_reason, http_status, stream, started_unix_ms, duration_s, ttft_s, error_code,
            repeat, repeated_prompt_tokens, repeated_completion_tokens)
        VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
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
            record.repeat,
            record.repeated_prompt_tokens,
            record.repeated_completion_tokens,
        ),
    )
    connection.execute(
        """
        INSERT INTO usage_totals VALUES (?, ?, ?, 1, ?, ?, ?, ?)
        ON CONFLICT (tenant, key_id, model) DO UPDATE SET
            num_requests = num_requests + 1,
            num_errors = num_errors + excluded.num_errors,
            prompt_tokens = prompt_tokens + excluded.prompt_tokens,
            completion_tokens = completion_tokens + excluded.completion_tokens,
            cached_tokens = cached_tokens + excluded.cached_tokens
        """,
        (
            record.tenant,
            record.key_id,
            record.model,
            bool(record.error_code),
            record.prompt_tokens,
            record.completion_tokens,
            record.cached_tokens,
        ),
    )


def _with_allowed_text(connection: sqlite3.Connection, record: RequestRecord) -> RequestRecord:
    """Removes the texts unless the tenant allows them, whatever the caller thinks."""
    if not record.prompt_text and not record.completion_text:
        return record
    allowed = connection.execute("SELECT allows_text FROM tenants WHERE tenant = ?", (record.tenant,)).fetchone()
    return record if allowed and allowed[0] else replace(record, prompt_text="", completion_text="")
