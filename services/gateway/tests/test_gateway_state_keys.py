"""Access keys: who gets in, who does not, and how fast a change works."""

import asyncio
import hmac
import statistics
import time
from dataclasses import replace

import pytest

from chassis.errors import Code, PlatformError
from gateway.backends.sqlite import Database
from gateway.backends.sqlite_keys import SqliteKeys
from gateway.backends.sqlite_schema import MIGRATIONS
from gateway.core import keys
from gateway.core.administration import Administration, NewKey
from gateway.core.keys import KeyRing, TenantRow, secret_hmac, split_key
from gateway.core.policy import Policy
from testkit.clock import FakeClock

BOOTSTRAP = "sk-boot-0123456789abcdef-_x"
PEPPER = b"pepper"


class Announcer:
    """The bus: tells the rings that listen, unless it is down."""

    def __init__(self):
        self.said = []
        self.rings = []
        self.is_down = False

    async def access_changed(self, *, key_ids, tenants):
        self.said.append((key_ids, tenants))
        for ring in () if self.is_down else self.rings:
            ring.forget(key_ids, tenants)


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
def unix():
    return FakeClock(1_700_000_000.0)


@pytest.fixture
def ring(store, clock, unix):
    return KeyRing(store, PEPPER, clock=clock, now=unix, max_cached=100)


@pytest.fixture
def office(store, ring, announcer, unix):
    return Administration(store, PEPPER, ring, announcer, now=unix)


async def refused(ring, key):
    with pytest.raises(PlatformError) as error:
        await ring.authenticate(key)
    return error.value.code, error.value.message, error.value.reason, error.value.param, error.value.retry_after_s


async def test_created_key_names_its_owner(ring, office):
    wanted = NewKey("acme", requests_per_minute=7, policy=Policy(models=frozenset({"rag"})))
    key_id, key = await office.create_key("test", wanted)
    principal = await ring.authenticate(key)
    assert (principal.key_id, principal.tenant, principal.requests_per_minute) == (key_id, "acme", 7)
    assert not principal.is_admin and not principal.allows_text
    assert principal.may_ask("rag") and not principal.may_ask("other")


async def refused_keys(office, unix):
    """One of every kind that must not get in, by what is wrong with it."""
    key_id, key = await office.create_key("test", NewKey("acme"))
    revoked_id, revoked = await office.create_key("test", NewKey("acme"))
    await office.revoke_key("test", revoked_id)
    _, expired = await office.create_key("test", NewKey("acme", expires_unix_s=int(unix()) + 5))
    _, disabled = await office.create_key("test", NewKey("gone"))
    await office.put_tenant("test", TenantRow("gone", disabled_unix_s=1))
    rotated_id, rotated = await office.create_key("test", NewKey("acme"))
    await office.rotate_key("test", rotated_id, overlap_s=5)
    unix.advance(5)
    return {
        "unknown": "sk-nobody-" + "x" * 43,
        "wrong": f"sk-{key_id}-" + "x" * 43,
        "wrong by one": key[:-1] + ("A" if key[-1] != "A" else "B"),
        "revoked": revoked,
        "expired": expired,
        "of a disabled tenant": disabled,
        "rotated away": rotated,
        "revoked and wrong": f"sk-{revoked_id}-" + "x" * 43,
    }


MALFORMED = [
    "",
    "sk-",
    "Bearer x",
    "sk-a-",
    "sk-a-short",
    "sk-a-" + "x" * 43 + "\n",
    "sk-a-" + "x" * 42 + "\0",
    "SK-A-" + "x" * 43,
    "sk-" + "a" * 70_000,
    "sk-ключ-" + "x" * 43,
    "sk-../../etc/passwd-" + "x" * 43,
    "sk-a' OR '1'='1-" + "x" * 43,
]


async def test_every_key_that_lets_nobody_in_gets_the_same_answer(ring, office, unix):
    kinds = await refused_keys(office, unix)
    answers = {await refused(ring, key) for key in [*kinds.values(), *MALFORMED]}
    assert len(answers) == 1 and answers.pop()[0] is Code.UNAUTHENTICATED


@pytest.mark.parametrize("is_cached", [False, True])
async def test_every_refusal_takes_the_same_steps(ring, office, store, unix, monkeypatch, is_cached):
    """One read of the store, one digest, and the same comparisons in constant time."""
    kinds = await refused_keys(office, unix) | {f"malformed {text[:20]!r}": text for text in MALFORMED}
    steps = []
    compare = hmac.compare_digest

    def watched_hmac(pepper, secret):
        steps.append("hmac")
        return secret_hmac(pepper, secret)

    def watched_compare(one, other):
        steps.append(("compare", len(one), len(other)))
        return compare(one, other)

    monkeypatch.setattr(keys, "secret_hmac", watched_hmac)
    monkeypatch.setattr(hmac, "compare_digest", watched_compare)
    seen = {}
    for kind, key in kinds.items():
        ring.forget([(split_key(key) or ("", ""))[0]])
        if is_cached:
            await refused(ring, key)
        steps.clear()
        num_finds = store.num_finds
        await refused(ring, key)
        seen[kind] = (store.num_finds - num_finds, *steps)
    comparisons = [("compare", 32, 32)] * (4 if is_cached else 2)
    assert set(seen.values()) == {(1, "hmac", *comparisons)}, seen


async def test_no_refusal_takes_longer_than_another(ring, office, unix):
    kinds = await refused_keys(office, unix) | {"malformed": "sk-a-short"}
    took = {kind: [] for kind in kinds}
    for number in range(150):
        for kind, key in kinds.items():  # in turn, so that what else the machine does meets all of them
            # Every unknown id is a new one, and the known ones are remembered.
            sent = f"sk-nobody{number}-" + "x" * 43 if kind == "unknown" else key
            began = time.perf_counter()
            await refused(ring, sent)
            took[kind].append(time.perf_counter() - began)
    medians = {kind: statistics.median(times) for kind, times in took.items()}
    # They differ by some percent; a cache that knew some of the answers would make it twenty times.
    assert max(medians.values()) < 3 * min(medians.values()), medians


async def test_a_new_key_and_a_new_secret_work_at_once_where_the_old_state_is_remembered(ring, office, store, clock):
    other = KeyRing(store, PEPPER, clock=clock)  # it hears nothing
    key_id, old = await office.create_key("test", NewKey("acme"))
    await other.authenticate(old)
    new, _ = await office.rotate_key("test", key_id, overlap_s=0)
    await other.authenticate(new)
    await refused(other, old)


async def test_stored_hash_is_no_key(ring, office, database):
    key_id, key = await office.create_key("test", NewKey("acme"))
    await office.rotate_key("test", key_id, overlap_s=60)
    rows = await database.read(lambda c: c.execute("SELECT * FROM keys").fetchall())
    assert key.split("-", 2)[2] not in str(rows)
    for kept in [value for value in rows[0] if isinstance(value, bytes)]:
        await refused(ring, f"sk-{key_id}-{kept.hex()}")


async def test_other_pepper_opens_nothing(office, store):
    _, key = await office.create_key("test", NewKey("acme"))
    await refused(KeyRing(store, b"other"), key)


async def test_a_key_expires_while_it_is_cached(ring, office, unix):
    _, key = await office.create_key("test", NewKey("acme", expires_unix_s=int(unix()) + 10))
    unix.advance(9.9)
    await ring.authenticate(key)
    unix.advance(0.1)
    await refused(ring, key)


async def test_both_secrets_work_until_the_overlap_ends(ring, office, unix):
    key_id, old = await office.create_key("test", NewKey("acme", requests_per_minute=7, name="ci"))
    new, _ = await office.rotate_key("test", key_id, overlap_s=60)
    assert await ring.authenticate(old) == await ring.authenticate(new)
    unix.advance(59.9)
    await ring.authenticate(old)
    unix.advance(0.1)
    await refused(ring, old)
    principal = await ring.authenticate(new)
    assert (principal.key_id, principal.requests_per_minute) == (key_id, 7)
    assert (await office.key(key_id)).name == "ci"


async def test_a_rotation_without_overlap_ends_the_old_secret_at_once(ring, office):
    key_id, old = await office.create_key("test", NewKey("acme"))
    await ring.authenticate(old)
    new, _ = await office.rotate_key("test", key_id, overlap_s=0)
    await refused(ring, old)
    await ring.authenticate(new)


async def test_a_second_rotation_leaves_two_secrets_and_not_three(ring, office):
    key_id, first = await office.create_key("test", NewKey("acme"))
    second, _ = await office.rotate_key("test", key_id, overlap_s=60)
    third, _ = await office.rotate_key("test", key_id, overlap_s=60)
    await refused(ring, first)
    await ring.authenticate(second)
    await ring.authenticate(third)


async def change_all(office, ids):
    """Every change that takes something away; returns what must be refused or narrowed after it."""
    await office.revoke_key("test", ids["revoked"])
    await office.rotate_key("test", ids["rotated"], overlap_s=0)
    await office.change_key("test", ids["narrowed"], lambda row: replace(row, policy=Policy(models=frozenset())))
    await office.put_tenant("test", TenantRow("narrow", policy=Policy(scopes=frozenset())))
    await office.put_tenant("test", TenantRow("ended", disabled_unix_s=1))


@pytest.mark.parametrize("is_bus_down", [False, True])
async def test_a_change_is_seen_by_another_worker_within_a_second(ring, office, store, announcer, clock, is_bus_down):
    other = KeyRing(store, PEPPER, clock=clock)
    announcer.rings, announcer.is_down = [other], is_bus_down
    tenants = {"revoked": "acme", "rotated": "acme", "narrowed": "acme", "of narrow": "narrow", "of ended": "ended"}
    made = {kind: await office.create_key("test", NewKey(tenant)) for kind, tenant in tenants.items()}
    keys = {kind: key for kind, (_, key) in made.items()}
    for key in keys.values():
        await other.authenticate(key)
    await other.tenant("ended")
    await change_all(office, {kind: key_id for kind, (key_id, _) in made.items()})
    if is_bus_down:
        for key in keys.values():
            await other.authenticate(key)  # it has not heard yet
        clock.advance(1.0)
    for kind in ("revoked", "rotated", "of ended"):
        await refused(other, keys[kind])
    assert not (await other.authenticate(keys["narrowed"])).may_ask("rag")
    assert not (await other.authenticate(keys["of narrow"])).has_scope("inference")
    assert (await other.tenant("ended")).disabled_unix_s == 1


async def test_revocation_during_a_lookup_is_not_cached_over(office, store, announcer, clock):
    key_id, key = await office.create_key("test", NewKey("acme"))
    read, go_on = asyncio.Event(), asyncio.Event()

    class SlowStore(CountingStore):
        async def find(self, key_id):
            row = await super().find(key_id)
            read.set()
            await go_on.wait()
            return row

    slow = KeyRing(SlowStore(store._database), PEPPER, clock=clock)
    announcer.rings = [slow]
    lookup = asyncio.create_task(slow.authenticate(key))
    await read.wait()
    await office.revoke_key("test", key_id)
    go_on.set()
    await lookup  # had read before the revocation: this one may pass
    await refused(slow, key)


async def test_many_requests_with_one_key_read_the_store_once(ring, office, store):
    _, key = await office.create_key("test", NewKey("acme"))
    await asyncio.gather(*(ring.authenticate(key) for _ in range(200)))
    assert store.num_finds == 1


async def test_unknown_keys_do_not_fill_the_memory(ring):
    for i in range(300):
        await refused(ring, f"sk-unknown{i}-" + "x" * 43)
    assert len(ring._keys) <= 100


async def test_a_configured_key_is_upserted_and_may_hold_dashes(ring, office):
    for _ in range(2):
        await office.configure_key(BOOTSTRAP, "default", is_admin=False, allows_text=True)
    principal = await ring.authenticate(BOOTSTRAP)
    assert principal.tenant == "default" and principal.allows_text and principal.requests_per_minute is None
    # A key that is created later does not change what the tenant allows.
    _, key = await office.create_key("test", NewKey("default"))
    assert (await ring.authenticate(key)).allows_text


async def test_what_an_admin_says_of_a_tenant_outlives_a_restart(ring, office):
    await office.configure_key(BOOTSTRAP, "default", is_admin=False, allows_text=True)
    await office.put_tenant("test", TenantRow("default", allows_text=False, policy=Policy(priority=3)))
    await office.configure_key(BOOTSTRAP, "default", is_admin=False, allows_text=True)
    principal = await ring.authenticate(BOOTSTRAP)
    assert not principal.allows_text and principal.tenant_policy.priority == 3


async def test_a_revoked_configured_key_stays_revoked_until_its_secret_changes(ring, office):
    await office.configure_key(BOOTSTRAP, "default", is_admin=True, allows_text=False)
    await office.revoke_key("test", "boot")
    await office.configure_key(BOOTSTRAP, "default", is_admin=True, allows_text=False)
    await refused(ring, BOOTSTRAP)
    await office.configure_key(BOOTSTRAP + "2", "default", is_admin=True, allows_text=False)
    assert (await ring.authenticate(BOOTSTRAP + "2")).is_admin


async def test_a_configured_key_is_changed_in_the_configuration_only(office):
    await office.configure_key(BOOTSTRAP, "default", is_admin=True, allows_text=False)
    for change in (
        office.rotate_key("test", "boot", overlap_s=0),
        office.change_key("test", "boot", lambda row: replace(row, is_admin=False)),
    ):
        with pytest.raises(PlatformError) as error:
            await change
        assert error.value.reason == "key_is_configured"


async def test_malformed_configured_key_is_refused_without_being_shown(office):
    with pytest.raises(PlatformError) as error:
        await office.configure_key("hunter2-hunter2", "default", is_admin=False, allows_text=False)
    assert error.value.code is Code.INVALID_ARGUMENT and "hunter2" not in error.value.message


async def test_unknown_and_revoked_keys_cannot_be_changed(office):
    key_id, _ = await office.create_key("test", NewKey("acme"))
    await office.revoke_key("test", key_id)
    await office.revoke_key("test", key_id)  # twice is harmless
    for name, code in (("nobody", Code.NOT_FOUND), (key_id, Code.FAILED_PRECONDITION)):
        for change in (
            office.rotate_key("test", name, overlap_s=0),
            office.change_key("test", name, lambda row: replace(row, name="x")),
        ):
            with pytest.raises(PlatformError) as error:
                await change
            assert error.value.code is code
    with pytest.raises(PlatformError) as error:
        await office.revoke_key("test", "nobody")
    assert error.value.code is Code.NOT_FOUND


async def test_keys_are_listed_without_secrets(office):
    key_id, key = await office.create_key("test", NewKey("acme", requests_per_minute=3))
    (row,) = await office.keys()
    assert (
        row.key_id == key_id and "secret" not in repr(row) and "former_hmac" not in repr(row) and key not in repr(row)
    )


async def test_a_job_works_for_its_key_and_tenant_even_when_the_key_is_revoked(ring, office):
    key_id, _ = await office.create_key("test", NewKey("acme", is_admin=True, policy=Policy(models=frozenset({"rag"}))))
    await office.put_tenant("test", TenantRow("acme", allows_text=True, policy=Policy(priority=2)))
    await office.revoke_key("test", key_id)
    principal = await ring.principal(key_id, "acme")
    assert (principal.may_ask("rag"), principal.may_ask("x"), principal.tenant_policy.priority) == (True, False, 2)
    assert not principal.is_admin and not principal.allows_text
    # A key of another tenant's says nothing here.
    assert (await ring.principal(key_id, "other")).may_ask("x")
    await office.put_tenant("test", TenantRow("acme", disabled_unix_s=1))
    with pytest.raises(PlatformError) as error:
        await ring.principal(key_id, "acme")
    assert error.value.reason == "tenant_disabled"
