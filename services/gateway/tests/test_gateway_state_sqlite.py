"""The database: group commit, isolation of failures, bounds, migrations, and what survives kill -9."""

import asyncio
import sqlite3
import subprocess
import sys
import threading

import pytest

from chassis.errors import Code, PlatformError
from gateway.backends.sqlite import Database
from gateway.backends.sqlite_schema import MIGRATIONS
from testkit.waiting import eventually

TABLE = (("CREATE TABLE notes (id INTEGER PRIMARY KEY, text TEXT NOT NULL UNIQUE) STRICT",),)


def add(text):
    return lambda connection: connection.execute("INSERT INTO notes (text) VALUES (?)", (text,)).lastrowid


def count(connection):
    return connection.execute("SELECT count(*) FROM notes").fetchone()[0]


@pytest.fixture
async def database(tmp_path):
    opened = await Database.open(tmp_path / "test.db", TABLE)
    yield opened
    await opened.close()


async def test_waiting_writes_share_a_transaction(database):
    commits = 0

    def watch(connection):
        def trace(statement):
            nonlocal commits
            commits += statement == "COMMIT"

        connection.set_trace_callback(trace)

    await database.write(watch)
    gate, started = threading.Event(), threading.Event()

    def block(_):
        started.set()
        gate.wait(10)

    first = asyncio.create_task(database.write(block))
    await asyncio.to_thread(started.wait, 10)
    others = [asyncio.create_task(database.write(add(str(i)))) for i in range(100)]
    await eventually(lambda: database.num_waiting_writes == 100)
    gate.set()
    await asyncio.gather(first, *others)
    assert await database.read(count) == 100
    assert commits == 3  # the watcher's own, the gate's, and one for the hundred


async def test_failed_unit_is_rolled_back_alone(database):
    def half_done(connection):
        add("half")(connection)
        raise ValueError("stop")

    results = await asyncio.gather(
        database.write(add("a")),
        database.write(half_done),
        database.write(add("a")),  # breaks UNIQUE
        database.write(add("b")),
        return_exceptions=True,
    )
    assert isinstance(results[1], ValueError)
    assert isinstance(results[2], sqlite3.IntegrityError)
    texts = await database.read(lambda c: [t for (t,) in c.execute("SELECT text FROM notes ORDER BY id")])
    assert texts == ["a", "b"]


async def test_write_of_cancelled_caller_is_still_written(database):
    gate = threading.Event()
    blocker = asyncio.create_task(database.write(lambda _: gate.wait(10)))
    leaver = asyncio.create_task(database.write(add("kept")))
    await asyncio.sleep(0)
    leaver.cancel()
    with pytest.raises(asyncio.CancelledError):
        await leaver
    gate.set()
    await blocker
    await database.write(add("later"))
    assert await database.read(count) == 2


async def test_full_queue_is_overloaded_and_recovers(tmp_path):
    database = await Database.open(tmp_path / "test.db", TABLE, max_pending=3)
    gate, started = threading.Event(), threading.Event()

    def block(_):
        started.set()
        gate.wait(10)

    blocker = asyncio.create_task(database.write(block))
    await asyncio.to_thread(started.wait, 10)
    waiting = [asyncio.create_task(database.write(add(str(i)))) for i in range(3)]
    await asyncio.sleep(0)
    with pytest.raises(PlatformError) as refused:
        await database.write(add("refused"))
    assert refused.value.code is Code.OVERLOADED
    gate.set()
    await asyncio.gather(blocker, *waiting)
    await database.write(add("again"))
    assert await database.read(count) == 4
    await database.close()


async def test_write_that_takes_too_long_is_deadline_exceeded(database):
    gate = threading.Event()
    with pytest.raises(PlatformError) as late:
        await database.write(lambda _: gate.wait(10), timeout_s=0.05)
    assert late.value.code is Code.DEADLINE_EXCEEDED
    gate.set()


async def test_query_that_nobody_waits_for_is_stopped(database):
    forever = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT count(*) FROM n"
    for _ in range(3):  # more than there are readers: each must be free again
        with pytest.raises(PlatformError) as late:
            await database.read(lambda c: c.execute(forever).fetchone(), timeout_s=0.1)
        assert late.value.code is Code.DEADLINE_EXCEEDED
    assert await database.read(count, timeout_s=5) == 0


async def test_full_disk_fails_the_writes_and_nothing_else(database):
    await database.write(add("before"))

    def fill(connection):
        (pages,) = connection.execute("PRAGMA page_count").fetchone()
        connection.execute(f"PRAGMA max_page_count = {pages}")

    await database.write(fill)
    results = await asyncio.gather(*(database.write(add(f"{i}" * 100_000)) for i in range(3)), return_exceptions=True)
    assert [r.code for r in results if isinstance(r, PlatformError)] == [Code.UNAVAILABLE] * 3
    assert await database.read(count) == 1
    await database.write(lambda c: c.execute("PRAGMA max_page_count = 1000000").fetchall())
    await database.write(add("after"))
    assert await database.read(count) == 2


async def test_readers_cannot_write(database):
    with pytest.raises(sqlite3.OperationalError):
        await database.read(add("no"))


async def test_every_connection_keeps_what_it_commits(database):
    pragmas = await database.write(
        lambda c: tuple(
            c.execute(f"PRAGMA {name}").fetchone()[0] for name in ("journal_mode", "synchronous", "foreign_keys")
        )
    )
    assert pragmas == ("wal", 2, 1)


async def test_migrations_run_once_and_in_order(tmp_path):
    path = tmp_path / "test.db"
    await (await Database.open(path, TABLE)).close()
    more = (*TABLE, ("ALTER TABLE notes ADD COLUMN more TEXT", "INSERT INTO notes (text, more) VALUES ('a', 'b')"))
    for _ in range(2):
        database = await Database.open(path, more)
        assert await database.read(count) == 1
        await database.close()


async def test_failed_migration_leaves_the_former_schema(tmp_path):
    path = tmp_path / "test.db"
    with pytest.raises(sqlite3.OperationalError):
        await Database.open(path, (*TABLE, ("CREATE TABLE other (a TEXT)", "not sql")))
    database = await Database.open(path, ())
    tables = await database.read(lambda c: [n for (n,) in c.execute("SELECT name FROM sqlite_master")])
    assert "notes" not in tables and "other" not in tables
    await database.close()


async def test_newer_schema_is_refused(tmp_path):
    path = tmp_path / "test.db"
    await (await Database.open(path, TABLE)).close()
    with pytest.raises(PlatformError) as refused:
        await Database.open(path, ())
    assert refused.value.code is Code.FAILED_PRECONDITION


async def test_file_that_is_no_database_is_refused(tmp_path):
    path = tmp_path / "test.db"
    path.write_bytes(b"this is not a database, whatever its name says" * 100)
    with pytest.raises(PlatformError):
        await Database.open(path, TABLE)


async def test_our_schema_is_made(tmp_path):
    database = await Database.open(tmp_path / "gateway.db", MIGRATIONS)
    assert await database.read(lambda c: c.execute("PRAGMA foreign_key_check").fetchall()) == []
    await database.close()


WRITER = f"""
import asyncio, sys
from pathlib import Path
from gateway.backends.sqlite import Database

async def main():
    database = await Database.open(Path(sys.argv[1]), {TABLE!r})
    async def write(first):
        for i in range(first, 10**9, 20):
            await database.write(lambda c: c.execute("INSERT INTO notes (id, text) VALUES (?, ?)", (i, str(i))))
            print(i, flush=True)
    await asyncio.gather(*(write(i) for i in range(1, 21)))

asyncio.run(main())
"""


async def test_kill_9_loses_nothing_that_was_answered(tmp_path):
    path = tmp_path / "test.db"
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", WRITER, str(path), stdout=subprocess.PIPE)
    assert process.stdout is not None
    answered = [int(await process.stdout.readline()) for _ in range(300)]
    process.kill()
    answered += [int(line) for line in (await process.stdout.read()).splitlines(keepends=True) if line.endswith(b"\n")]
    await process.wait()
    database = await Database.open(path, TABLE)
    written = await database.read(lambda c: {i for (i,) in c.execute("SELECT id FROM notes")})
    assert len(answered) >= 300 and set(answered) <= written
    assert await database.read(lambda c: c.execute("PRAGMA integrity_check").fetchone()) == ("ok",)
    await database.close()
