"""The audit log in SQLite: rows are written by whoever makes a change, in the change's own transaction."""

import logging
import sqlite3
import time

from gateway.backends.sqlite import Database
from gateway.core.audit import START, Anchor, AuditFilter, AuditRow, Chain, Change, link

_log = logging.getLogger(__name__)

_COLUMNS = "sequence, at_unix_ms, actor, action, subject, details_json, previous_hash, hash"
_ROWS_A_READ = 2_000  # so that a reader is never kept for long


def append(connection: sqlite3.Connection, change: Change) -> None:
    """Writes a change into the log; to be called in the unit of work that makes the change."""
    last = connection.execute("SELECT sequence, hash FROM audit ORDER BY sequence DESC LIMIT 1").fetchone()
    row = link(change, time.time_ns() // 1_000_000, Anchor(*last) if last else START)
    connection.execute(
        f"INSERT INTO audit ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
        (
            row.sequence,
            row.at_unix_ms,
            row.actor,
            row.action,
            row.subject,
            row.details_json,
            row.previous_hash,
            row.hash,
        ),
    )
    # The line is an anchor that is kept elsewhere. It is written before COMMIT: one without a row was rolled back.
    _log.info(
        "administrative change",
        extra={"actor": row.actor, "action": row.action, "subject": row.subject, "anchor": str(row.anchor)},
    )


class SqliteAudit:
    """Reads the table audit. Implements core.audit.AuditLog."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def newest(self, wanted: AuditFilter, *, limit: int, before: int | None) -> list[AuditRow]:
        """Returns rows, newest first; with `before` those with smaller numbers."""

        def query(connection: sqlite3.Connection) -> list[AuditRow]:
            found = connection.execute(
                f"""
                SELECT {_COLUMNS} FROM audit
                WHERE (:before IS NULL OR sequence < :before) AND (:actor IS NULL OR actor = :actor)
                    AND (:action IS NULL OR action = :action) AND (:subject IS NULL OR subject = :subject)
                ORDER BY sequence DESC LIMIT :limit
                """,
                {
                    "before": before,
                    "actor": wanted.actor,
                    "action": wanted.action,
                    "subject": wanted.subject,
                    "limit": limit,
                },
            )
            return [AuditRow(*row) for row in found]

        return await self._database.read(query)

    async def verify(self, anchor: Anchor) -> Chain:
        """Walks the whole chain, in a reader's thread."""
        chain = Chain(anchor)
        last, num_rows = -(2**63), _ROWS_A_READ  # a forged row may have any number

        def walk(connection: sqlite3.Connection) -> tuple[int, int]:
            rows = connection.execute(
                f"SELECT {_COLUMNS} FROM audit WHERE sequence > ? ORDER BY sequence LIMIT ?", (last, _ROWS_A_READ)
            ).fetchall()
            for row in rows:
                chain.take(AuditRow(*row))
            return (rows[-1][0] if rows else last), len(rows)

        while num_rows == _ROWS_A_READ and chain.broken_at is None:
            last, num_rows = await self._database.read(walk)
        chain.end()
        return chain
