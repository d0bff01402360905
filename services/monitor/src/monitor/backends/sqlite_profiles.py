"""Samples that wait and profiles that were made, in one SQLite file. Implements core.profiles.Waiting and Profiles.

One file for both, so that a batch leaves the queue and enters its profile in one transaction: whenever the process is
killed, each sample is in exactly one of the two. One thread owns the connection.
"""

import asyncio
import contextlib
import json
import sqlite3
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from chassis.errors import Code, PlatformError
from monitor.core.profiles import Added, Batch, Profile, Profiled
from monitor.core.samples import Sample

T = TypeVar("T")

# Ids that are remembered after their sample is gone. Only what was not acknowledged when the process died comes
# again, and that is at most a handful of the newest.
_NUM_REMEMBERED = 100_000
_TIMEOUT_S = 15.0
_BUSY_TIMEOUT_S = 5.0

_SCHEMA = """
    CREATE TABLE IF NOT EXISTS seen (key INTEGER PRIMARY KEY AUTOINCREMENT, message_id TEXT NOT NULL UNIQUE);
    CREATE TABLE IF NOT EXISTS waiting (
        key INTEGER PRIMARY KEY,
        model TEXT NOT NULL,
        window_start_unix_s INTEGER NOT NULL,
        window_s INTEGER NOT NULL,
        ended_unix_s REAL NOT NULL,
        prompt TEXT NOT NULL,
        response TEXT NOT NULL,
        num_deaths INTEGER NOT NULL DEFAULT 0
    );
    CREATE TABLE IF NOT EXISTS profiles (
        model TEXT NOT NULL,
        window_start_unix_s INTEGER NOT NULL,
        window_s INTEGER NOT NULL,
        num_records INTEGER NOT NULL,
        statistics_json TEXT NOT NULL,
        binary BLOB NOT NULL,
        PRIMARY KEY (model, window_start_unix_s, window_s)
    );
    CREATE INDEX IF NOT EXISTS profiles_by_window ON profiles (window_start_unix_s);
"""


class SqliteProfiles:
    """An open file. Made by `open`; to be closed."""

    def __init__(self, connection: sqlite3.Connection, thread: ThreadPoolExecutor, max_waiting: int) -> None:
        self._connection = connection
        self._thread = thread
        self._max_waiting = max_waiting
        self._num_waiting = 0
        self._oldest: float | None = None

    @classmethod
    async def open(cls, path: Path, *, max_waiting: int) -> "SqliteProfiles":
        """Opens or creates the file; raises PlatformError(UNAVAILABLE) where that cannot be done."""
        thread = ThreadPoolExecutor(1, "sqlite-profiles")

        def connect() -> SqliteProfiles:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            connection = sqlite3.connect(path, isolation_level=None, timeout=_BUSY_TIMEOUT_S, check_same_thread=False)
            # FULL: an acknowledged sample outlives a power loss too. secure_delete: a text that is profiled is wiped.
            for pragma in ("journal_mode = WAL", "synchronous = FULL", "secure_delete = ON"):
                connection.execute(f"PRAGMA {pragma}")
            connection.executescript(_SCHEMA)
            opened = cls(connection, thread, max_waiting)
            opened._count()
            return opened

        return await _within(thread, connect)

    async def close(self) -> None:
        """Finishes what runs and closes the file."""
        await _within(self._thread, self._connection.close)
        self._thread.shutdown(wait=False)

    # core.profiles.Waiting

    @property
    def num_waiting(self) -> int:
        return self._num_waiting

    @property
    def oldest_ended_unix_s(self) -> float | None:
        return self._oldest

    async def add(self, sample: Sample) -> Added:
        return await self._write(lambda: self._add(sample))

    def _add(self, sample: Sample) -> Added:
        execute = self._connection.execute
        inserted = execute("INSERT OR IGNORE INTO seen (message_id) VALUES (?)", (sample.message_id,))
        if inserted.rowcount == 0:
            return Added.DUPLICATE
        key = inserted.lastrowid
        assert key is not None
        execute("DELETE FROM seen WHERE key <= ?", (key - _NUM_REMEMBERED,))
        if self._num_waiting >= self._max_waiting:
            return Added.DROPPED
        execute(
            "INSERT INTO waiting (key, model, window_start_unix_s, window_s, ended_unix_s, prompt, response)"
            " VALUES (?, ?, ?, ?, ?, ?, ?)",
            (
                key,
                sample.model,
                sample.window_start_unix_s,
                sample.window_s,
                sample.ended_unix_s,
                sample.prompt,
                sample.response,
            ),
        )
        return Added.WAITING

    async def next_batch(self, max_samples: int) -> Batch | None:
        return await self._write(lambda: self._next_batch(max_samples))

    def _next_batch(self, max_samples: int) -> Batch | None:
        first = self._connection.execute(
            "SELECT model, window_start_unix_s, window_s, key, num_deaths FROM waiting ORDER BY key LIMIT 1"
        ).fetchone()
        if first is None:
            return None
        model, start, window_s, key, num_deaths = first
        if num_deaths:
            where, parameters, max_samples = "key = ?", [key], 1
        else:
            where = "model = ? AND window_start_unix_s = ? AND window_s = ? AND num_deaths = 0"
            parameters = [model, start, window_s]
        rows = self._connection.execute(
            f"SELECT key, prompt, response FROM waiting WHERE {where} ORDER BY key LIMIT ?", (*parameters, max_samples)
        ).fetchall()
        so_far = self._connection.execute(
            "SELECT binary FROM profiles WHERE model = ? AND window_start_unix_s = ? AND window_s = ?",
            (model, start, window_s),
        ).fetchone()
        return Batch(
            model=model,
            window_start_unix_s=start,
            window_s=window_s,
            binary=so_far[0] if so_far else None,
            keys=tuple(row[0] for row in rows),
            texts=tuple((row[1], row[2]) for row in rows),
        )

    async def finish(self, batch: Batch, profiled: Profiled) -> None:
        statistics_json = json.dumps(profiled.statistics, allow_nan=False, separators=(",", ":"))
        await self._write(lambda: self._finish(batch, profiled, statistics_json))

    def _finish(self, batch: Batch, profiled: Profiled, statistics_json: str) -> None:
        self._forget(batch.keys)
        num_records = len(batch.keys) - len(profiled.failed)
        if num_records == 0:
            return
        self._connection.execute(
            "INSERT INTO profiles (model, window_start_unix_s, window_s, num_records, statistics_json, binary)"
            " VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT DO UPDATE SET num_records = num_records + excluded.num_records,"
            " statistics_json = excluded.statistics_json, binary = excluded.binary",
            (batch.model, batch.window_start_unix_s, batch.window_s, num_records, statistics_json, profiled.binary),
        )

    async def charge(self, batch: Batch, max_deaths: int) -> int:
        return await self._write(lambda: self._charge(batch.keys, max_deaths))

    def _charge(self, keys: Sequence[int], max_deaths: int) -> int:
        marks = ",".join("?" * len(keys))
        self._connection.execute(f"UPDATE waiting SET num_deaths = num_deaths + 1 WHERE key IN ({marks})", keys)
        skipped = self._connection.execute(
            f"DELETE FROM waiting WHERE key IN ({marks}) AND num_deaths >= ?", (*keys, max_deaths)
        )
        return skipped.rowcount

    def _forget(self, keys: Sequence[int]) -> None:
        self._connection.execute(f"DELETE FROM waiting WHERE key IN ({','.join('?' * len(keys))})", keys)

    # core.profiles.Profiles

    async def newest(self, model: str | None, limit: int) -> Sequence[Profile]:
        where, parameters = ("WHERE model = ?", (model,)) if model else ("", ())

        def query() -> list[Profile]:
            rows = self._connection.execute(
                "SELECT model, window_start_unix_s, window_s, num_records, statistics_json FROM profiles"
                f" {where} ORDER BY window_start_unix_s DESC, model LIMIT ?",
                (*parameters, limit),
            )
            return [Profile(*row) for row in rows]

        return await _within(self._thread, query)

    async def prune(self, oldest_start_unix_s: int, max_profiles: int) -> int:
        num_pruned = await self._write(lambda: self._prune(oldest_start_unix_s, max_profiles))
        # Texts that were wiped from the file still stand in its write-ahead log until that is emptied.
        await _within(self._thread, lambda: self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall())
        return num_pruned

    def _prune(self, oldest_start_unix_s: int, max_profiles: int) -> int:
        aged = self._connection.execute("DELETE FROM profiles WHERE window_start_unix_s < ?", (oldest_start_unix_s,))
        surplus = self._connection.execute(
            "DELETE FROM profiles WHERE rowid IN"
            " (SELECT rowid FROM profiles ORDER BY window_start_unix_s DESC LIMIT -1 OFFSET ?)",
            (max_profiles,),
        )
        return aged.rowcount + surplus.rowcount

    # Inside, all in the thread.

    async def _write(self, unit: Callable[[], T]) -> T:
        """Runs a unit of work in one transaction; returns when it is on disk."""
        return await _within(self._thread, lambda: self._transact(unit))

    def _transact(self, unit: Callable[[], T]) -> T:
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            result = unit()
            self._connection.execute("COMMIT")
        except BaseException:
            with contextlib.suppress(sqlite3.Error):  # SQLite gave the transaction up itself (disk full)
                self._connection.execute("ROLLBACK")
            raise
        self._count()
        return result

    def _count(self) -> None:
        (self._num_waiting,) = self._connection.execute("SELECT count(*) FROM waiting").fetchone()
        oldest = self._connection.execute("SELECT ended_unix_s FROM waiting ORDER BY key LIMIT 1").fetchone()
        self._oldest = oldest[0] if oldest else None


async def _within(thread: ThreadPoolExecutor, work: Callable[[], T]) -> T:
    """Runs work in the thread, translates what SQLite raises. What is not heard of in time may still happen."""
    try:
        async with asyncio.timeout(_TIMEOUT_S):
            return await asyncio.get_running_loop().run_in_executor(thread, work)
    except TimeoutError:
        raise PlatformError(Code.UNAVAILABLE, "the disk of the profiles does not answer") from None
    except (sqlite3.Error, OSError) as error:
        raise PlatformError(Code.UNAVAILABLE, f"the profiles cannot be read or written: {error}") from error
