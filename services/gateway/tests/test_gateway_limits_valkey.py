"""Limits in a real Valkey: what gateways share, what a dead one leaves, and what happens while Valkey is away."""

import asyncio
import itertools
import random
import time
from contextlib import asynccontextmanager

import pytest
import redis.asyncio as redis

from gateway.backends.valkey_limits import ValkeyLimiter
from gateway.core.limits import LocalLimiter
from gateway.core.meters import Meter, Scope
from gateway.core.policy import Algorithm, Counted, Limit
from testkit import free_port
from testkit.servers import ValkeyServer, running, valkey_server
from testkit.waiting import eventually

pytestmark = pytest.mark.integration

_numbers = itertools.count()
PATIENT_S = 2.0  # where a test is about counting: the machine may be busy


def meter(counted, amount, *, algorithm=Algorithm.FIXED_WINDOW, window_s=60.0, tag="acme"):
    name = f"pressroom:limit:{{{tag}}}:test{next(_numbers)}"
    return Meter(name, Scope.KEY, Limit(counted, amount, window_s, algorithm))


@asynccontextmanager
async def gateway(url, *, runs=True, **options):
    """A limiter as a gateway has it; with runs=False its background is dead."""
    limiter = ValkeyLimiter.connect(url, **options)
    limiter.look = redis.from_url(url)  # for the tests' eyes
    task = asyncio.create_task(limiter.run()) if runs else None
    try:
        yield limiter
    finally:
        if task is not None:
            task.cancel()
            await asyncio.wait({task})
        await limiter.close()
        await limiter.look.aclose()


async def held(limiter, *meters):
    """What is held in Valkey, by what it adds up to and by what it lists."""
    sums = [await limiter.look.hget(one.name, "held") for one in meters]
    lists = [await limiter.look.zcard(f"{one.name}:held") for one in meters]
    return [int(one or 0) for one in sums], lists


@pytest.mark.parametrize("algorithm", [Algorithm.FIXED_WINDOW, Algorithm.SLIDING_LOG, Algorithm.TOKEN_BUCKET])
async def test_streams_over_two_gateways_never_use_more_than_the_limit_and_all_of_it_comes_back(valkey, algorithm):
    tokens = meter(Counted.TOKENS, 1000, algorithm=algorithm, window_s=3600.0)
    requests = meter(Counted.CONCURRENCY, 20)
    chance = random.Random(5)
    used, allowed = [], 0
    async with gateway(valkey.url, timeout_s=PATIENT_S) as one, gateway(valkey.url, timeout_s=PATIENT_S) as other:

        async def stream(limiter):
            nonlocal allowed
            verdict = await limiter.reserve((tokens, requests), 10, 40)
            assert verdict.is_shared
            if not verdict.allowed:
                return
            allowed += 1
            assert 10 <= verdict.tokens <= 40
            await asyncio.sleep(chance.random() / 50)
            used.append(chance.randint(0, verdict.tokens))
            limiter.settle(verdict, used[-1])

        for _ in range(4):
            await asyncio.gather(*(stream(one if i % 2 else other) for i in range(50)))
            assert sum(used) <= 1000
        await eventually(lambda: nothing_held(one, tokens, requests))
        assert allowed == len(used) and allowed > 20
        left = await one.reserve((tokens,), 1, 10_000)
        # Of an hour's bucket a token or two flow back in the seconds of this test.
        assert left.tokens == pytest.approx(1000 - sum(used), abs=3)


async def nothing_held(limiter, *meters):
    sums, lists = await held(limiter, *meters)
    return not any(sums) and not any(lists)


async def test_a_request_takes_two_round_trips_one_of_them_after_its_answer(valkey):
    limits = (meter(Counted.TOKENS, 100), meter(Counted.REQUESTS, 10), meter(Counted.CONCURRENCY, 5))
    async with gateway(valkey.url, timeout_s=PATIENT_S) as limiter:
        for _ in range(2):  # the first loads the scripts
            await limiter.look.config_resetstat()
            verdict = await limiter.reserve(limits, 5, 5)
            assert (await calls(limiter)) == 1
            limiter.settle(verdict, 3)
            await eventually(lambda: nothing_held(limiter, *limits))
        assert (await calls(limiter)) == 2


async def calls(limiter):
    stats = await limiter.look.info("commandstats")
    return stats.get("cmdstat_evalsha", {"calls": 0})["calls"]


async def test_what_a_killed_gateway_held_is_free_after_its_lease_and_its_tokens_count_as_used(valkey):
    places, tokens = meter(Counted.CONCURRENCY, 1), meter(Counted.TOKENS, 100)
    async with (
        gateway(valkey.url, timeout_s=PATIENT_S, lease_s=0.6, runs=False) as dead,
        gateway(valkey.url, timeout_s=PATIENT_S, lease_s=0.6) as alive,
    ):
        assert (await dead.reserve((places, tokens), 30, 30)).allowed
        assert not (await alive.reserve((places,), 0, 0)).allowed
        verdict = await eventually(lambda: allowed(alive, (places, tokens), 5))
        assert verdict.standings[1].remaining == 100 - 30 - 5
        alive.settle(verdict, 5)
        await eventually(lambda: nothing_held(alive, places, tokens))


async def allowed(limiter, meters, tokens):
    verdict = await limiter.reserve(meters, tokens, tokens)
    return verdict if verdict.allowed else None


async def test_a_request_that_outlives_its_lease_keeps_its_place(valkey):
    places = meter(Counted.CONCURRENCY, 1)
    async with gateway(valkey.url, timeout_s=PATIENT_S, lease_s=0.9) as limiter:
        verdict = await limiter.reserve((places,), 0, 0)
        for _ in range(8):
            await asyncio.sleep(0.3)
            assert not (await limiter.reserve((places,), 0, 0)).allowed
        limiter.settle(verdict, 0)
        await eventually(lambda: allowed(limiter, (places,), 0))


async def test_frozen_valkey_costs_one_time_out_then_nothing_and_it_is_used_again_by_itself(caplog):
    with valkey_server() as server:
        tokens, places = meter(Counted.TOKENS, 100), meter(Counted.CONCURRENCY, 3)
        async with gateway(server.url) as limiter:
            before = await eventually(lambda: shared(limiter, (tokens, places), 10))
            server.pause()
            try:
                started = time.monotonic()
                during = await limiter.reserve((tokens, places), 10, 10)
                first_s = time.monotonic() - started
                started = time.monotonic()
                refused = [await limiter.reserve((tokens, places), 100, 100) for _ in range(100)]
                later_s = (time.monotonic() - started) / 100
                assert during.allowed and not during.is_shared
                assert not any(one.allowed for one in refused)
                assert first_s < 0.075 + 0.15
                # A try for each cool-down costs the time-out again, in the background or here; the others nothing.
                assert later_s < 0.005
                assert not limiter.is_shared
                # Memory has counted along: 20 of 100 are held, by what was taken there and by what was taken here.
                assert refused[0].standings[0].remaining == 80 and refused[0].standings[1].remaining == 1
                limiter.settle(before, 4)
            finally:
                server.resume()
            await eventually(lambda: limiter.is_shared)
            limiter.settle(during, 7)
            await eventually(lambda: nothing_held(limiter, tokens, places))
            after = await limiter.reserve((tokens, places), 1, 1000)
            # Valkey knows of the 4, memory of the 4 and the 7; nothing is negative, nothing is lost for good.
            assert after.is_shared and after.tokens == 96
            assert limiter._local.judge((tokens,), 1, 1000).tokens <= 100 - 4 - 7
        assert sum("counted locally" in record.message for record in caplog.records) >= 1


async def shared(limiter, meters, tokens):
    verdict = await limiter.reserve(meters, tokens, tokens)
    if verdict.is_shared:
        return verdict
    limiter.settle(verdict, 0)
    return None


async def test_what_a_frozen_valkey_carries_out_late_is_taken_back():
    with valkey_server() as server:
        places = meter(Counted.CONCURRENCY, 5)
        async with gateway(server.url) as limiter:
            limiter.settle(await eventually(lambda: shared(limiter, (places,), 0)), 0)
            await eventually(lambda: nothing_held(limiter, places))
            server.pause()
            try:
                verdict = await limiter.reserve((places,), 0, 0)  # it is in the socket of the frozen server
                assert verdict.allowed and not verdict.is_shared
            finally:
                server.resume()
            await eventually(lambda: limiter.is_shared)
            await eventually(lambda: nothing_held(limiter, places))
            assert limiter._local.judge((places,), 0, 0).standings[0].remaining == 3
            limiter.settle(verdict, 0)


async def test_a_client_that_leaves_while_its_limits_are_judged_leaves_nothing_held(valkey):
    places = meter(Counted.CONCURRENCY, 100)
    async with gateway(valkey.url, timeout_s=PATIENT_S) as limiter:
        limiter.settle(await limiter.reserve((places,), 0, 0), 0)
        for hops in range(12):
            task = asyncio.create_task(limiter.reserve((places,), 0, 0))
            for _ in range(hops):
                await asyncio.sleep(0)
            task.cancel()
            if (await asyncio.wait({task}))[0] and not task.cancelled():
                limiter.settle(task.result(), 0)
        await eventually(lambda: nothing_held(limiter, places))
        assert not limiter._live and not limiter._unsettled


async def test_valkey_that_lost_everything_begins_anew_and_settling_leaves_no_debt():
    with valkey_server() as server:
        tokens = meter(Counted.TOKENS, 100)
        async with gateway(server.url) as limiter:
            verdict = await eventually(lambda: shared(limiter, (tokens,), 60))
            await limiter.look.flushall()
            limiter.settle(verdict, 10)
            await eventually(lambda: not limiter._unsettled)
            after = await eventually(lambda: shared(limiter, (tokens,), 100))
            assert after.allowed and after.standings[0].remaining == 0


async def test_while_valkey_is_away_each_gateway_lets_through_its_share():
    tokens = meter(Counted.TOKENS, 100)
    async with gateway("redis://:secret@127.0.0.1:1/0", local=LocalLimiter(share=0.5)) as limiter:
        verdicts = [await limiter.reserve((tokens,), 10, 10) for _ in range(20)]
    assert sum(verdict.allowed for verdict in verdicts) == 5


class ClusteredValkey(ValkeyServer):
    """One node that has all slots: it refuses what a cluster of several would refuse."""

    def _argv(self):
        argv = super()._argv()
        with open(argv[1], "a") as config:
            config.write(f"cluster-enabled yes\ncluster-port {free_port()}\n")
        return argv


async def test_the_limits_of_one_tenant_lie_in_one_slot_of_a_cluster():
    with running(ClusteredValkey()) as server:
        limits = (meter(Counted.TOKENS, 100, algorithm=Algorithm.SLIDING_LOG), meter(Counted.CONCURRENCY, 2))
        async with gateway(server.url, timeout_s=PATIENT_S) as limiter:
            await limiter.look.execute_command("CLUSTER", "ADDSLOTSRANGE", 0, 16383)
            verdict = await eventually(lambda: shared(limiter, limits, 5))
            limiter.settle(verdict, 5)
            await eventually(lambda: nothing_held(limiter, *limits))
            assert limiter.is_shared
