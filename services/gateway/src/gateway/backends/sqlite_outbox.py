"""The outbox in SQLite: messages are added in the transaction of what they tell of. Implements core.outbox.Outbox."""

import asyncio
import sqlite3
import time
from collections.abc import Sequence

from gateway.backends.sqlite import Database
from gateway.core.outbox import Message, Pending

_WAITING = "published_unix_ms IS NULL AND refused IS NULL"
_MAX_PRUNED = 5_000  # rows deleted in one transaction, so that pruning holds up no other writer
# A batch is bounded in bytes too: payloads may be large.
_MAX_BATCH_BYTES = 8 * 1024 * 1024


def add(connection: sqlite3.Connection, message: Message) -> None:
    """Adds a message; to be called inside a unit of work. Call Outbox.notify() once the unit has returned."""
    connection.execute(
        """
        INSERT INTO outbox (subject, message_id, payload, traceparent, request_id, created_unix_ms)
        VALUES (?, ?, ?, ?, ?, ?)
        """,
        (
            message.subject,
            message.message_id,
            message.payload,
            message.traceparent,
            message.request_id,
            int(time.time() * 1000),
        ),
    )


def withdraw(connection: sqlite3.Connection, message_id: str) -> bool:
    """Removes a message that was not published yet; to be called inside a unit of work."""
    deleted = connection.execute(f"DELETE FROM outbox WHERE message_id = ? AND {_WAITING}", (message_id,))
    return deleted.rowcount == 1


class SqliteOutbox:
    """Reads and settles the table outbox."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._written = asyncio.Event()
        self._written.set()  # what an earlier process left behind

    def notify(self) -> None:
        """Wakes the relay; to be called after a unit that added messages has returned."""
        self._written.set()

    async def wait(self, timeout_s: float) -> None:
        """Returns when something was written since the last call, or after timeout_s."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._written.wait()
        except TimeoutError:
            return  # the relay looks again all the same: another process may have written
        finally:
            self._written.clear()

    async def unpublished(self, limit: int) -> Sequence[Pending]:
        """The oldest ones that were neither published nor set aside; at least one, if there is one."""

        def query(connection: sqlite3.Connection) -> list[Pending]:
            found: list[Pending] = []
            size_bytes = 0
            for row in connection.execute(
                f"""
                SELECT id, subject, message_id, payload, traceparent, request_id
                FROM outbox WHERE {_WAITING} ORDER BY id LIMIT ?
                """,
                (limit,),
            ):
                found.append(Pending(row[0], Message(*row[1:])))
                size_bytes += len(row[3])
                if size_bytes > _MAX_BATCH_BYTES:
                    break
            return found

        return await self._database.read(query)

    async def settle(self, published: Sequence[int], refused: Sequence[tuple[int, str]]) -> None:
        """Marks what the bus has, and sets aside, with the reason, what it will never take."""
        now_ms = int(time.time() * 1000)

        def unit(connection: sqlite3.Connection) -> None:
            connection.executemany(
                "UPDATE outbox SET published_unix_ms = ? WHERE id = ?", [(now_ms, row_id) for row_id in published]
            )
            connection.executemany(
                "UPDATE outbox SET refused = ? WHERE id = ?", [(reason[:1000], row_id) for row_id, reason in refused]
            )

        # What a power loss takes from this is published once more, which consumers are used to.
        await self._database.write(unit, survives_power_loss=False)

    async def prune(self, older_than_s: float) -> int:
        """Deletes what was published longer ago; returns how many, at most a few thousand in one call."""
        before_ms = int((time.time() - older_than_s) * 1000)

        def unit(connection: sqlite3.Connection) -> int:
            return connection.execute(
                """
                DELETE FROM outbox WHERE id IN (
                    SELECT id FROM outbox WHERE published_unix_ms IS NOT NULL AND published_unix_ms < ? LIMIT ?
                )
                """,
                (before_ms, _MAX_PRUNED),
            ).rowcount

        return await self._database.write(unit)
