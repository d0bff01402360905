"""Two workers over one database: a change at one is seen by the other within a second, with the bus and without it."""

import asyncio
import contextlib
import time
from dataclasses import replace

import pytest

from chassis.errors import PlatformError
from chassis.nats_bus import NatsBus
from contracts import subjects
from gateway.api.consumers import RevocationListener
from gateway.backends.bus_control import BusControl
from gateway.backends.sqlite import Database
from gateway.backends.sqlite_keys import SqliteKeys
from gateway.backends.sqlite_schema import MIGRATIONS
from gateway.core.administration import Administration, NewKey
from gateway.core.keys import KeyRing, TenantRow
from gateway.core.policy import Policy
from testkit import eventually
from testkit.servers import nats_server

pytestmark = pytest.mark.integration

PROMISED_S = 1.0
SLACK_S = 0.5  # of a busy machine: eventually looks every 50 ms


class Worker:
    """A process's share: its own connection to the file, its own ring, its own connection to the bus."""

    def __init__(self, database, bus, **rest):
        book = SqliteKeys(database)
        self.database, self.bus, self.ring = database, bus, KeyRing(book, b"pepper", **rest)
        self.office = Administration(book, b"pepper", self.ring, BusControl(bus))
        self.listener = RevocationListener(bus, self.ring)


@contextlib.asynccontextmanager
async def worker(path, nats_url, **rest):
    database = await Database.open(path, MIGRATIONS)
    bus = NatsBus.connect(nats_url, "gateway", subjects.STREAMS)
    made = Worker(database, bus, **rest)
    listening = asyncio.create_task(made.listener.listen())
    try:
        yield made
    finally:
        listening.cancel()
        await asyncio.wait([listening])
        await bus.close()
        await database.close()


async def opens(ring, key):
    try:
        return await ring.authenticate(key)
    except PlatformError:
        return None


async def every_change(first, second):
    """Each way to take something away, as (what to do, what the second worker must say after it)."""
    office = first.office
    made = {}
    for kind in ("revoked", "rotated", "narrowed", "of narrow", "of ended"):
        made[kind] = await office.create_key("test", NewKey(kind.split()[-1]))
        assert await opens(second.ring, made[kind][1])  # it is in the second worker's cache
    await second.ring.tenant("ended")
    ids = {kind: key_id for kind, (key_id, _) in made.items()}

    async def is_refused(kind):
        return await opens(second.ring, made[kind][1]) is None

    async def may_not_ask(kind):
        return not (await second.ring.authenticate(made[kind][1])).may_ask("rag")

    nothing = Policy(models=frozenset())
    return {
        "revoked": (lambda: office.revoke_key("test", ids["revoked"]), is_refused),
        "rotated": (lambda: office.rotate_key("test", ids["rotated"], overlap_s=0), is_refused),
        "narrowed": (
            lambda: office.change_key("test", ids["narrowed"], lambda row: replace(row, policy=nothing)),
            may_not_ask,
        ),
        "of narrow": (lambda: office.put_tenant("test", TenantRow("narrow", policy=nothing)), may_not_ask),
        "of ended": (lambda: office.put_tenant("test", TenantRow("ended", disabled_unix_s=1)), is_refused),
    }


async def test_with_the_bus_a_change_is_heard(tmp_path):
    path = tmp_path / "gateway.db"
    with nats_server() as nats:
        # An hour: whatever the second worker knows it has heard.
        async with worker(path, nats.url) as first, worker(path, nats.url, ttl_s=3600.0) as second:
            probe_id, probe = await first.office.create_key("test", NewKey("acme"))

            async def has_heard():
                await second.ring.authenticate(probe)
                await first.office.change_key("test", probe_id, lambda row: replace(row, name=str(time.time())))
                await asyncio.sleep(0.05)
                return len(second.ring._keys) == 0

            await eventually(has_heard, timeout_s=20)  # both are on the bus
            for kind, (change, is_seen) in (await every_change(first, second)).items():
                assert not await is_seen(kind)  # which puts the key into the cache anew
                await change()
                began = time.monotonic()
                await eventually(lambda kind=kind, is_seen=is_seen: is_seen(kind), timeout_s=20)
                assert time.monotonic() - began < PROMISED_S, kind


async def test_without_the_bus_a_change_is_seen_within_the_caches_second(tmp_path):
    path = tmp_path / "gateway.db"
    with nats_server() as nats:
        async with worker(path, nats.url) as first, worker(path, nats.url) as second:
            nats.stop()
            for kind, (change, is_seen) in (await every_change(first, second)).items():
                assert not await is_seen(kind)  # which puts the key into the cache anew
                await change()
                began = time.monotonic()
                await eventually(lambda kind=kind, is_seen=is_seen: is_seen(kind), timeout_s=20)
                assert time.monotonic() - began < PROMISED_S + SLACK_S, kind
