"""Prices in SQLite. Implements core.money.PriceList; the ledger reads the same table within its own units of work."""

import sqlite3
from collections.abc import Sequence
from dataclasses import asdict

from chassis.errors import Code, PlatformError
from gateway.backends import sqlite_audit
from gateway.backends.sqlite import Database
from gateway.core.audit import Change
from gateway.core.money import Price, PriceEntry

_COLUMNS = "model, effective_unix_ms, input_micros, cached_input_micros, output_micros"


def price_at(connection: sqlite3.Connection, model: str, unix_ms: int) -> Price:
    """The model's price at a moment; a tuned model without one has its base's, and what has none costs nothing."""
    for name in (model, model.partition(":")[0]) if ":" in model else (model,):
        row = connection.execute(
            """
            SELECT input_micros, cached_input_micros, output_micros FROM prices
            WHERE model = ? AND effective_unix_ms <= ? ORDER BY effective_unix_ms DESC LIMIT 1
            """,
            (name, unix_ms),
        ).fetchone()
        if row is not None:
            return Price(*row)
    return Price()


class SqlitePrices:
    """Reads and writes the table prices."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def put(self, entry: PriceEntry, actor: str, now_unix_ms: int) -> None:
        """See PriceList.put; with its row in the audit log."""
        if entry.effective_unix_ms < now_unix_ms:
            raise PlatformError(
                Code.FAILED_PRECONDITION,
                "effective_from lies in the past: what was used then has its cost already",
                param="effective_from",
                reason="invalid_value",
            )
        price = entry.price

        details = asdict(price) | {"effective_unix_ms": entry.effective_unix_ms}

        def unit(connection: sqlite3.Connection) -> None:
            sqlite_audit.append(connection, Change(actor, "price.set", entry.model, details))
            connection.execute(
                f"INSERT OR REPLACE INTO prices ({_COLUMNS}) VALUES (?, ?, ?, ?, ?)",
                (
                    entry.model,
                    entry.effective_unix_ms,
                    price.input_micros,
                    price.cached_input_micros,
                    price.output_micros,
                ),
            )

        await self._database.write(unit)

    async def all(self) -> Sequence[PriceEntry]:
        """Every price, by model and time."""

        def query(connection: sqlite3.Connection) -> list[PriceEntry]:
            rows = connection.execute(f"SELECT {_COLUMNS} FROM prices ORDER BY model, effective_unix_ms")
            return [PriceEntry(model, since, Price(*prices)) for model, since, *prices in rows]

        return await self._database.read(query)
