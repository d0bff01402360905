"""Access keys: who gets in, who does not, and how fast a revocation works."""

import asyncio

import pytest

from chassis.errors import Code, PlatformError
from gateway.backends.sqlite import Database
from gateway.backends.sqlite_keys import SqliteKeys
from gateway.backends.sqlite_schema import MIGRATIONS
from gateway.core.keys import KeyRing
from testkit.clock import FakeClock

BOOTSTRAP = "sk-boot-0123456789abcdef-_x"


class Announcer:
    def __init__(self):
        self.said = []

    async def keys_revoked(self, key_ids):
        self.said += key_ids


class CountingStore(SqliteKeys):
    num_finds = 0

    async def find(self, key_id):
        self.num_finds += 1
        return await super().find(key_id)


@pytest.fixture
async def database(tmp_path):
    opened = await Database.open(tmp_path / "gateway.db", MIGRATIONS)
    yield opened
    await opened.close()


@pytest.fixture
def store(database):
    return CountingStore(database)


@pytest.fixture
def clock():
    return FakeClock()


@pytest.fixture
def announcer():
    return Announcer()


@pytest.fixture
def ring(store, announcer, clock):
    return KeyRing(store, b"pepper", announcer, clock=clock, max_cached=100)


async def refused(ring, key):
    with pytest.raises(PlatformError) as error:
        await ring.authenticate(key)
    return error.value.code, error.value.message, error.value.reason


async def test_created_key_names_its_owner(ring):
    key_id, key = await ring.create("acme", requests_per_minute=7)
    principal = await ring.authenticate(key)
    assert (principal.key_id, principal.tenant, principal.requests_per_minute) == (key_id, "acme", 7)
    assert not principal.is_admin and not principal.allows_text


async def test_every_wrong_key_gets_the_same_answer(ring):
    key_id, key = await ring.create("acme", requests_per_minute=None)
    _, revoked = await ring.create("acme", requests_per_minute=None)
    await ring.revoke(revoked.split("-")[1])
    wrong = [
        "",
        "sk-",
        "Bearer x",
        f"sk-{key_id}-",
        f"sk-{key_id}-short",
        f"sk-{key_id}-" + "x" * 43,
        "sk-nobody-" + "x" * 43,
        key + "\n",
        key[:-1] + "\u0000",
        key.upper(),
        "sk-" + "a" * 70_000,
        "sk-ключ-" + "x" * 43,
        revoked,
    ]
    answers = {await refused(ring, text) for text in wrong}
    assert len(answers) == 1 and answers.pop()[0] is Code.UNAUTHENTICATED


async def test_stored_hash_is_no_key(ring, database):
    key_id, key = await ring.create("acme", requests_per_minute=None)
    row = await database.read(lambda c: c.execute("SELECT * FROM keys").fetchone())
    assert key.split("-", 2)[2] not in str(row)
    await refused(ring, f"sk-{key_id}-{row[2].hex()}")


async def test_other_pepper_opens_nothing(ring, store, announcer):
    _, key = await ring.create("acme", requests_per_minute=None)
    await refused(KeyRing(store, b"other", announcer), key)


async def test_revoked_key_is_refused_at_once_and_announced(ring, announcer):
    key_id, key = await ring.create("acme", requests_per_minute=None)
    await ring.authenticate(key)
    await ring.revoke(key_id)
    await refused(ring, key)
    assert announcer.said == [key_id]


async def test_revocation_elsewhere_works_within_a_second_or_on_hearing_of_it(ring, store, announcer, clock):
    other = KeyRing(store, b"pepper", announcer, clock=clock)
    key_id, key = await ring.create("acme", requests_per_minute=None)
    second_id, second = await ring.create("acme", requests_per_minute=None)
    await other.authenticate(key)
    await other.authenticate(second)
    await ring.revoke(key_id)
    await ring.revoke(second_id)
    other.forget([key_id])
    await refused(other, key)
    clock.advance(1.0)
    await refused(other, second)


async def test_revocation_during_a_lookup_is_not_cached_over(ring, store, announcer, clock):
    key_id, key = await ring.create("acme", requests_per_minute=None)
    read, go_on = asyncio.Event(), asyncio.Event()

    class SlowStore(CountingStore):
        async def find(self, key_id):
            row = await super().find(key_id)
            read.set()
            await go_on.wait()
            return row

    slow = KeyRing(SlowStore(store._database), b"pepper", announcer, clock=clock)
    lookup = asyncio.create_task(slow.authenticate(key))
    await read.wait()
    await slow.revoke(key_id)
    go_on.set()
    await lookup  # had read before the revocation: this one may pass
    await refused(slow, key)


async def test_many_requests_with_one_key_read_the_store_once(ring, store):
    _, key = await ring.create("acme", requests_per_minute=None)
    await asyncio.gather(*(ring.authenticate(key) for _ in range(200)))
    assert store.num_finds == 1


async def test_unknown_keys_do_not_fill_the_memory(ring):
    for i in range(300):
        await refused(ring, f"sk-unknown{i}-" + "x" * 43)
    assert len(ring._cache) <= 100


async def test_bootstrap_key_is_upserted_and_may_hold_dashes(ring):
    for _ in range(2):
        await ring.bootstrap(BOOTSTRAP, "default", is_admin=False, allows_text=True)
    principal = await ring.authenticate(BOOTSTRAP)
    assert principal.tenant == "default" and principal.allows_text and principal.requests_per_minute is None
    # A key that is created later does not change what the tenant allows.
    _, key = await ring.create("default", requests_per_minute=None)
    assert (await ring.authenticate(key)).allows_text


async def test_revoked_bootstrap_key_stays_revoked_until_its_secret_changes(ring):
    await ring.bootstrap(BOOTSTRAP, "default", is_admin=True, allows_text=False)
    await ring.revoke("boot")
    await ring.bootstrap(BOOTSTRAP, "default", is_admin=True, allows_text=False)
    await refused(ring, BOOTSTRAP)
    await ring.bootstrap(BOOTSTRAP + "2", "default", is_admin=True, allows_text=False)
    assert (await ring.authenticate(BOOTSTRAP + "2")).is_admin


async def test_malformed_bootstrap_key_is_refused_without_being_shown(ring):
    with pytest.raises(PlatformError) as error:
        await ring.bootstrap("hunter2-hunter2", "default", is_admin=False, allows_text=False)
    assert error.value.code is Code.INVALID_ARGUMENT and "hunter2" not in error.value.message


async def test_unknown_key_cannot_be_revoked(ring):
    with pytest.raises(PlatformError) as error:
        await ring.revoke("nobody")
    assert error.value.code is Code.NOT_FOUND


async def test_keys_are_listed_without_secrets(ring):
    key_id, key = await ring.create("acme", requests_per_minute=3)
    (row,) = await ring.all()
    assert row.key_id == key_id and "secret" not in repr(row) and key not in repr(row)
