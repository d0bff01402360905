"""The gateway's database: one SQLite file, one writer thread with group commit, readers in threads of their own.

Many callers' units of work share one transaction and so one fsync; each caller hears of its own only after COMMIT. A
unit that fails is rolled back alone (a savepoint each). Knows nothing of the tables.
"""

import asyncio
import logging
import queue
import sqlite3
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Generic, TypeVar

from chassis.errors import Code, PlatformError

T = TypeVar("T")
Unit = Callable[[sqlite3.Connection], T]

_log = logging.getLogger(__name__)

_MAX_BATCH = 256
_WRITE_TIMEOUT_S = 10.0
_READ_TIMEOUT_S = 5.0
_BUSY_TIMEOUT_MS = 5_000  # only another program that opened the file can make us wait
_OPS_PER_DEADLINE_CHECK = 20_000


class _Entry(Generic[T]):
    """A unit of work and who waits for it. Accepted is executed: a caller that goes away does not take it along."""

    def __init__(self, unit: Unit[T], future: asyncio.Future[T], *, survives_power_loss: bool) -> None:
        self.unit = unit
        self.future = future
        self.survives_power_loss = survives_power_loss
        self.result: T
        self.error: BaseException | None = None

    def run(self, connection: sqlite3.Connection) -> None:
        connection.execute("SAVEPOINT unit")
        try:
            self.result = self.unit(connection)
        except Exception as error:
            self.error = error
            if not connection.in_transaction:
                raise  # SQLite gave up the whole transaction (disk full, I/O error): so must the batch
            connection.execute("ROLLBACK TO unit")
        connection.execute("RELEASE unit")

    def settle(self, lost: PlatformError | None = None) -> None:
        """Tells the caller, in the loop's thread."""
        if self.future.done():  # it has gone
            return
        if self.error is not None:
            self.future.set_exception(_translated(self.error))
        elif lost is not None:
            self.future.set_exception(lost)
        else:
            self.future.set_result(self.result)


class Database:
    """An open database. Use open() and, at the end, close()."""

    def __init__(self, path: Path, *, num_readers: int, max_pending: int) -> None:
        self._path = path
        self._loop = asyncio.get_running_loop()
        self._max_pending = max_pending
        self._writes: queue.SimpleQueue[_Entry[Any] | None] = queue.SimpleQueue()
        self._reads_left = max_pending
        self._readers = ThreadPoolExecutor(num_readers, "sqlite-reader")
        self._local = threading.local()
        self._read_connections: list[sqlite3.Connection] = []
        self._is_closed = False
        self._opened: Future[None] = Future()
        self._writer = threading.Thread(target=self._write_until_closed, name="sqlite-writer", daemon=True)

    @classmethod
    async def open(
        cls,
        path: Path,
        migrations: Sequence[Sequence[str]],
        *,
        num_readers: int = 2,
        max_pending: int = 4096,
    ) -> "Database":
        """Opens or creates the file and brings its schema up to date.

        Raises FAILED_PRECONDITION when a newer program has written it, UNAVAILABLE when it cannot be opened.
        """
        database = cls(path, num_readers=num_readers, max_pending=max_pending)
        database._writer.start()
        try:
            await asyncio.wrap_future(database._opened)
            await database.write(lambda connection: _migrate(connection, migrations), timeout_s=600.0)
        except BaseException:
            await database.close()
            raise
        return database

    async def write(self, unit: Unit[T], *, timeout_s: float = _WRITE_TIMEOUT_S, survives_power_loss: bool = True) -> T:
        """Runs a unit of work in the writer thread and returns its result once it is on disk.

        With survives_power_loss=False it returns once the system has it: a kill of this process loses nothing, and
        half of the time is saved.
        Raises what the unit raises (it is rolled back), OVERLOADED when too many wait, UNAVAILABLE when the disk does
        not take it, and DEADLINE_EXCEEDED when nothing is known after timeout_s: it may still be written then, as it
        will be when the caller is cancelled.
        """
        if self._is_closed:
            raise PlatformError(Code.UNAVAILABLE, "the database is closed")
        if self._writes.qsize() >= self._max_pending:
            raise PlatformError(Code.OVERLOADED, "too many writes are waiting", retry_after_s=1.0)
        entry = _Entry(unit, self._loop.create_future(), survives_power_loss=survives_power_loss)
        self._writes.put(entry)
        return await _within(timeout_s, entry.future)

    async def read(self, query: Unit[T], *, timeout_s: float = _READ_TIMEOUT_S) -> T:
        """Runs a query on a reader's connection; it sees every write that returned before. Raises as write() does."""
        if self._is_closed:
            raise PlatformError(Code.UNAVAILABLE, "the database is closed")
        if self._reads_left == 0:
            raise PlatformError(Code.OVERLOADED, "too many reads are waiting", retry_after_s=1.0)
        self._reads_left -= 1
        future = asyncio.get_running_loop().run_in_executor(
            self._readers, self._read, query, time.monotonic() + timeout_s
        )
        try:
            return await _within(timeout_s, future)
        finally:
            self._reads_left += 1

    @property
    def num_waiting_writes(self) -> int:
        """Writes that wait for the writer."""
        return self._writes.qsize()

    async def close(self) -> None:
        """Finishes what was accepted and closes the file. Blocks no loop; harmless twice."""
        if not self._is_closed:
            self._is_closed = True
            self._writes.put(None)
        await asyncio.to_thread(self._writer.join)
        await asyncio.to_thread(self._readers.shutdown)
        for connection in self._read_connections:
            connection.close()
        self._read_connections.clear()

    def _read(self, query: Unit[T], deadline: float) -> T:
        try:
            connection = getattr(self._local, "connection", None)
            if connection is None:
                connection = self._local.connection = _connect(self._path)
                connection.execute("PRAGMA query_only = ON")
                self._read_connections.append(connection)
            # Stops a query that nobody waits for any more.
            connection.set_progress_handler(lambda: time.monotonic() > deadline, _OPS_PER_DEADLINE_CHECK)
            return query(connection)
        except sqlite3.Error as error:
            raise _translated(error) from error

    def _write_until_closed(self) -> None:
        try:
            connection = _connect(self._path)
        except (sqlite3.Error, OSError) as error:
            self._opened.set_exception(PlatformError(Code.UNAVAILABLE, f"cannot open {self._path}: {error}"))
            return
        self._opened.set_result(None)
        is_open = True
        while is_open:
            batch, is_open = self._next_batch()
            if batch:
                lost = _commit(connection, batch)
                # One call for all: each wakes the loop with a system call, and takes the interpreter from it.
                self._loop.call_soon_threadsafe(_settle, batch, lost)
        connection.close()

    def _next_batch(self) -> tuple[list[_Entry[Any]], bool]:
        """Waits for one entry, then takes what else has come meanwhile; False: it was the last batch."""
        batch: list[_Entry[Any]] = []
        entry = self._writes.get()
        while entry is not None:
            batch.append(entry)
            if len(batch) == _MAX_BATCH:
                return batch, True
            try:
                entry = self._writes.get_nowait()
            except queue.Empty:
                return batch, True
        return batch, False


def _connect(path: Path) -> sqlite3.Connection:
    # The thread that closes a reader's connection is not the one that used it, and by then it is idle.
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    connection.execute(f"PRAGMA busy_timeout = {_BUSY_TIMEOUT_MS}")
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")  # a commit is on disk when it returns, power loss included
    connection.execute("PRAGMA foreign_keys = ON")
    connection.execute("PRAGMA journal_size_limit = 67108864")
    return connection


def _settle(batch: Sequence[_Entry[Any]], lost: PlatformError | None) -> None:
    for entry in batch:
        entry.settle(lost)


def _commit(connection: sqlite3.Connection, batch: Sequence[_Entry[Any]]) -> PlatformError | None:
    """Runs all and commits once; returns what they are told where that failed."""
    is_synced = any(entry.survives_power_loss for entry in batch)
    try:
        connection.execute(f"PRAGMA synchronous = {'FULL' if is_synced else 'NORMAL'}")  # with WAL, NORMAL never syncs
        connection.execute("BEGIN IMMEDIATE")
        for entry in batch:
            entry.run(connection)
        connection.execute("COMMIT")
    except Exception as error:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        _log.error("database transaction lost", extra={"error": str(error), "num_units": len(batch)})
        return PlatformError(Code.UNAVAILABLE, "the database could not write", retryable=True)
    return None


def _translated(error: BaseException) -> BaseException:
    """The one place where SQLite's errors become ours; what is not SQLite's stays as it is."""
    if not isinstance(error, sqlite3.Error):
        return error
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF
    if code == sqlite3.SQLITE_INTERRUPT:
        return PlatformError(Code.DEADLINE_EXCEEDED, "the database query took too long")
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR):
        return PlatformError(Code.UNAVAILABLE, "the database could not do it now", retryable=True)
    if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
        return PlatformError(Code.DATA_LOSS, "the database file is damaged")
    return error  # a mistake of ours: it is to be seen as what it is


async def _within(timeout_s: float, future: "asyncio.Future[T]") -> T:
    # Not asyncio.wait_for: in Python 3.11 it swallows a cancel that arrives together with the result.
    try:
        async with asyncio.timeout(timeout_s):
            return await future
    except TimeoutError:
        raise PlatformError(Code.DEADLINE_EXCEEDED, "the database did not answer in time") from None


def _migrate(connection: sqlite3.Connection, migrations: Sequence[Sequence[str]]) -> None:
    connection.execute(
        "CREATE TABLE IF NOT EXISTS schema_version (version INTEGER PRIMARY KEY, applied_unix_s INTEGER)"
    )
    (found,) = connection.execute("SELECT coalesce(max(version), 0) FROM schema_version").fetchone()
    if found > len(migrations):
        raise PlatformError(
            Code.FAILED_PRECONDITION,
            f"the database has schema version {found}, this program knows {len(migrations)}: use a newer program",
        )
    for version, statements in enumerate(migrations[found:], start=found + 1):
        for statement in statements:
            connection.execute(statement)
        connection.execute("INSERT INTO schema_version VALUES (?, ?)", (version, int(time.time())))
        _log.info("database migrated", extra={"version": version})
