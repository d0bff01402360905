"""The audit log cannot be changed through SQL, and a file that was changed all the same is found out."""

import asyncio
import shutil
import sqlite3

import pytest

from chassis.errors import Code, PlatformError
from gateway.api.http_admin_audit import shape
from gateway.backends import sqlite_audit
from gateway.backends.sqlite import Database
from gateway.backends.sqlite_audit import SqliteAudit
from gateway.backends.sqlite_schema import MIGRATIONS
from gateway.core.audit import START, Anchor, AuditFilter, Change, link, read_anchor

NUM_ROWS = 4500  # more than one read takes


async def write(database, number):
    await database.write(
        lambda connection: sqlite_audit.append(
            connection, Change("admin", "key.created", f"key{number}", {"number": number})
        )
    )


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A database with rows, and the anchor of the last one."""
    path = tmp_path_factory.mktemp("audit") / "gateway.db"

    async def fill():
        database = await Database.open(path, MIGRATIONS)
        for start in range(0, NUM_ROWS, 500):
            await asyncio.gather(*(write(database, number) for number in range(start, start + 500)))
        chain = await SqliteAudit(database).verify(START)
        await database.close()  # everything is in the one file now
        return chain.head

    return path, asyncio.run(fill())


@pytest.fixture
def copy(written, tmp_path):
    """Somebody else's hands on a copy of the file: a connection without the triggers."""
    path = tmp_path / "gateway.db"
    shutil.copy(written[0], path)
    connection = sqlite3.connect(path, isolation_level=None)
    for name in ("audit_is_in_order", "audit_is_not_changed", "audit_is_not_cut"):
        connection.execute(f"DROP TRIGGER {name}")
    yield connection, path
    connection.close()


async def verified(path, anchor=START):
    database = await Database.open(path, MIGRATIONS)
    try:
        return await SqliteAudit(database).verify(anchor)
    finally:
        await database.close()


async def test_rows_that_came_at_the_same_time_make_one_chain(written):
    path, anchor = written
    chain = await verified(path, anchor)
    assert (chain.broken_at, chain.head.sequence) == (None, NUM_ROWS)


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE audit SET actor = 'nobody' WHERE sequence = 5",
        "UPDATE audit SET hash = 'x'",
        "DELETE FROM audit",
        "DELETE FROM audit WHERE sequence = 4500",
        "INSERT OR REPLACE INTO audit VALUES (5, 0, '', '', '', '', '', '')",
        "REPLACE INTO audit SELECT * FROM audit WHERE sequence = 5",
        "INSERT INTO audit VALUES (9999, 0, '', '', '', '', '', '')",
        "INSERT INTO audit VALUES (0, 0, '', '', '', '', '', '')",
        "INSERT INTO audit SELECT 5, 0, '', '', '', '', '', '' ON CONFLICT DO UPDATE SET actor = ''",
    ],
)
async def test_sql_cannot_change_the_log(written, tmp_path, statement):
    path = tmp_path / "gateway.db"
    shutil.copy(written[0], path)
    database = await Database.open(path, MIGRATIONS)
    with pytest.raises(sqlite3.IntegrityError, match="append-only"):
        await database.write(lambda connection: connection.execute(statement))
    assert (await SqliteAudit(database).verify(written[1])).broken_at is None
    await database.close()


@pytest.mark.parametrize(
    ("statements", "broken_at"),
    [
        (["UPDATE audit SET actor = 'mallory' WHERE sequence = 2100"], 2100),
        (["UPDATE audit SET at_unix_ms = at_unix_ms + 1 WHERE sequence = 1"], 1),
        (["UPDATE audit SET details_json = '{}' WHERE sequence = 4500"], 4500),
        (["UPDATE audit SET hash = upper(hash) WHERE sequence = 7"], 7),
        (["DELETE FROM audit WHERE sequence = 2000"], 2000),
        (["DELETE FROM audit WHERE sequence = 1"], 1),
        (["DELETE FROM audit WHERE sequence < 4000"], 1),
        (["DELETE FROM audit WHERE sequence = 7", "UPDATE audit SET sequence = sequence - 1 WHERE sequence > 7"], 7),
        (["UPDATE audit SET sequence = -sequence WHERE sequence = 9"], 1),
        (["INSERT INTO audit VALUES (4501, 0, 'x', 'y', 'z', '{}', 'a', 'b')"], 4501),
    ],
)
async def test_a_row_that_was_changed_is_found(copy, statements, broken_at):
    connection, path = copy
    for statement in statements:
        connection.execute(statement)
    chain = await verified(path)
    assert chain.broken_at == broken_at and chain.problem


async def test_a_log_that_was_changed_can_still_be_listed(copy):
    connection, path = copy
    connection.execute("UPDATE audit SET details_json = '{' WHERE sequence = 4500")
    database = await Database.open(path, MIGRATIONS)
    (row,) = await SqliteAudit(database).newest(AuditFilter(), limit=1, before=None)
    assert shape(row)["details"] == "{"
    await database.close()


@pytest.mark.parametrize("num_left", [0, 1, 2000, 4499])
async def test_rows_that_were_cut_off_are_found_with_an_anchor_only(copy, written, num_left):
    connection, path = copy
    connection.execute("DELETE FROM audit WHERE sequence > ?", (num_left,))
    assert (await verified(path)).broken_at is None  # what is left is a chain
    chain = await verified(path, written[1])
    assert chain.broken_at == num_left + 1 and "anchor" in chain.problem


async def test_a_chain_that_was_written_anew_is_found_with_an_anchor_only(copy, written):
    connection, path = copy
    rows = connection.execute("SELECT at_unix_ms, actor, action, subject FROM audit ORDER BY sequence").fetchall()
    connection.execute("BEGIN")
    connection.execute("DELETE FROM audit")
    last = START
    for at_unix_ms, actor, action, subject in rows:
        row = link(Change("mallory" if subject == "key77" else actor, action, subject, {}), at_unix_ms, last)
        values = (row.sequence, row.at_unix_ms, row.actor, row.action, row.subject, row.details_json, row.previous_hash)
        connection.execute("INSERT INTO audit VALUES (?, ?, ?, ?, ?, ?, ?, ?)", (*values, row.hash))
        last = row.anchor
    connection.execute("COMMIT")
    assert (await verified(path)).broken_at is None
    chain = await verified(path, written[1])
    assert chain.broken_at == NUM_ROWS and "anew" in chain.problem


async def test_a_byte_that_was_changed_in_the_file_is_found(written, tmp_path):
    path = tmp_path / "gateway.db"
    change_bytes(written[0], path, b'{"number": 2345}', b'{"number": 9345}')
    assert (await verified(path)).broken_at == 2346


def change_bytes(source, target, old, new):
    content = source.read_bytes()
    assert content.count(old) == 1 and len(old) == len(new)
    target.write_bytes(content.replace(old, new))


async def test_a_change_that_fails_leaves_no_row_and_no_hole(tmp_path):
    database = await Database.open(tmp_path / "gateway.db", MIGRATIONS)

    def failing(connection):
        sqlite_audit.append(connection, Change("admin", "key.created", "key0", {}))
        raise PlatformError(Code.CONFLICT, "no")

    outcomes = await asyncio.gather(
        write(database, 1), database.write(failing), write(database, 2), return_exceptions=True
    )
    assert isinstance(outcomes[1], PlatformError)
    chain = await SqliteAudit(database).verify(START)
    assert (chain.broken_at, chain.head.sequence) == (None, 2)
    await database.close()


async def test_two_processes_write_one_chain(tmp_path):
    path = tmp_path / "gateway.db"
    first = await Database.open(path, MIGRATIONS)
    second = await Database.open(path, MIGRATIONS)
    await asyncio.gather(*(write(one, number) for number in range(100) for one in (first, second)))
    chain = await SqliteAudit(first).verify(START)
    assert (chain.broken_at, chain.head.sequence) == (None, 200)
    await first.close()
    await second.close()


async def test_a_row_says_its_anchor_in_the_log(tmp_path, caplog):
    caplog.set_level("INFO")
    database = await Database.open(tmp_path / "gateway.db", MIGRATIONS)
    await write(database, 1)
    head = (await SqliteAudit(database).verify(START)).head
    (said,) = [record for record in caplog.records if record.message == "administrative change"]
    assert read_anchor(said.anchor) == head
    await database.close()


def test_an_anchor_is_read_as_it_was_written():
    anchor = Anchor(12, "ab" * 32)
    assert read_anchor(str(anchor)) == anchor
    for text in ("", "12", "12:", "x:" + "a" * 64, "12:" + "a" * 63, "-1:" + "a" * 64, "1" * 30 + ":" + "a" * 64):
        with pytest.raises(PlatformError):
            read_anchor(text)
