"""The platform's limits in SQLite. Implements core.platform_limits.LimitStore."""

import sqlite3
from collections.abc import Sequence

from gateway.backends import sqlite_audit
from gateway.backends.sqlite import Database
from gateway.core.audit import Change
from gateway.core.policy import Limit, Policy, policy_from_json


class SqliteLimits:
    """Reads and writes the one row of platform_limits."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def limits(self) -> tuple[Limit, ...]:
        """Reads them; none where none were ever set."""

        def query(connection: sqlite3.Connection) -> tuple[Limit, ...]:
            row = connection.execute("SELECT limits_json FROM platform_limits").fetchone()
            return policy_from_json(row[0]).limits if row else ()

        return await self._database.read(query)

    async def set_limits(self, limits: Sequence[Limit], change: Change) -> None:
        """Replaces them, in one transaction with the audit log; durable when it returns."""
        text = Policy(limits=tuple(limits)).to_json()

        def unit(connection: sqlite3.Connection) -> None:
            connection.execute("INSERT OR REPLACE INTO platform_limits (id, limits_json) VALUES (1, ?)", (text,))
            sqlite_audit.append(connection, change)

        await self._database.write(unit)
