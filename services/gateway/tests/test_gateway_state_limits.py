"""A key's requests per minute: one contract for the limiter in memory and the one in Valkey, which may leave."""

import asyncio
import time
import uuid

import pytest
import redis

from gateway.backends.valkey_limits import ValkeyLimiter
from gateway.core.breaker import Breaker
from gateway.core.limits import LocalLimiter
from gateway.core.ports import Principal
from testkit.clock import FakeClock
from testkit.servers import ValkeyServer, valkey_server
from testkit.waiting import eventually


def principal(limit, key_id=None):
    return Principal(key_id or uuid.uuid4().hex, "acme", requests_per_minute=limit)


class LimiterContract:
    """What every limiter does; a subclass gives `limiter`."""

    async def test_key_without_limit_is_never_refused(self, limiter):
        state = await limiter.hit(principal(None))
        assert state.allowed and state.limit is None

    async def test_exactly_n_pass_and_the_headers_count_down(self, limiter):
        sender = principal(3)
        states = [await limiter.hit(sender) for _ in range(5)]
        assert [s.allowed for s in states] == [True, True, True, False, False]
        assert [s.remaining for s in states] == [2, 1, 0, 0, 0]
        assert all(s.limit == 3 and 0 < s.reset_s <= 60 for s in states)

    async def test_exactly_n_pass_of_many_at_once(self, limiter):
        sender = principal(17)
        states = await asyncio.gather(*(limiter.hit(sender) for _ in range(60)))
        assert sum(s.allowed for s in states) == 17

    async def test_keys_do_not_share_a_window(self, limiter):
        first, second = principal(1), principal(1)
        assert (await limiter.hit(first)).allowed and (await limiter.hit(second)).allowed

    async def test_changed_limit_counts_at_once(self, limiter):
        key_id = uuid.uuid4().hex
        for _ in range(2):
            assert (await limiter.hit(principal(2, key_id))).allowed
        assert not (await limiter.hit(principal(2, key_id))).allowed
        assert (await limiter.hit(principal(3, key_id))).allowed
        assert not (await limiter.hit(principal(1, key_id))).allowed


class TestLocalLimiter(LimiterContract):
    @pytest.fixture
    def clock(self):
        return FakeClock(1000.0)

    @pytest.fixture
    def limiter(self, clock):
        return LocalLimiter(clock=clock, max_meters=100)

    async def test_next_window_begins_anew(self, limiter, clock):
        sender = principal(1)
        assert (await limiter.hit(sender)).allowed
        assert not (await limiter.hit(sender)).allowed
        clock.advance(60.0)
        assert (await limiter.hit(sender)).allowed

    async def test_memory_is_bounded(self, limiter):
        for _ in range(500):
            await limiter.hit(principal(5))
        assert len(limiter._counters) == 100

    async def test_lets_its_share_through_and_at_least_one(self, clock):
        limiter = LocalLimiter(clock=clock, share=0.25)
        sender, small = principal(10), principal(1)
        assert sum([(await limiter.hit(sender)).allowed for _ in range(20)]) == 2
        assert sum([(await limiter.hit(small)).allowed for _ in range(20)]) == 1


@pytest.mark.integration
class TestValkeyLimiter(LimiterContract):
    @pytest.fixture
    async def limiter(self, valkey: ValkeyServer):
        # A generous time-out: this contract is about counting, and the machine may be busy.
        connected = ValkeyLimiter.connect(valkey.url, timeout_s=2.0)
        yield connected
        await connected.close()

    async def test_two_gateways_share_a_count(self, limiter, valkey):
        other = ValkeyLimiter.connect(valkey.url, timeout_s=2.0)
        first = ValkeyLimiter.connect(valkey.url, timeout_s=2.0)
        sender = principal(40)
        states = await asyncio.gather(*((first if i % 2 else other).hit(sender) for i in range(100)))
        assert sum(s.allowed for s in states) == 40
        assert first.is_shared and other.is_shared
        await first.close()
        await other.close()

    async def test_window_is_cleaned_up(self, limiter, valkey):
        sender = principal(1)
        await limiter.hit(sender)
        key = f"pressroom:rpm:{{acme}}:{sender.key_id}"
        with redis.Redis.from_url(valkey.url) as client:
            assert 0 < client.pttl(key) <= 62_000


@pytest.mark.integration
async def test_frozen_valkey_costs_one_time_out_and_limits_go_on(caplog):
    with valkey_server() as server:
        limiter = ValkeyLimiter.connect(server.url)
        sender = principal(5)
        await eventually(lambda: _counts_in_valkey(limiter))
        used = [(await limiter.hit(sender)).allowed for _ in range(2)]
        server.pause()
        try:
            started = time.monotonic()
            used += [(await limiter.hit(sender)).allowed for _ in range(10)]
            # 75 ms for the hit that finds out; the breaker spares the others.
            assert time.monotonic() - started < 0.075 + 0.25
            assert not limiter.is_shared
            assert sum(used) <= 5
        finally:
            server.resume()
        await eventually(lambda: _counts_in_valkey(limiter))
        assert limiter.is_shared
        assert sum("counted locally" in r.message for r in caplog.records) == 1
        await limiter.close()


@pytest.mark.integration
async def test_valkey_that_is_killed_and_started_again_is_used_again():
    with valkey_server() as server:
        limiter = ValkeyLimiter.connect(server.url)
        await eventually(lambda: _counts_in_valkey(limiter))
        server.kill9()
        sender = principal(3)
        states = await asyncio.gather(*(limiter.hit(sender) for _ in range(20)))
        assert sum(s.allowed for s in states) == 3
        server.start()
        await eventually(lambda: _counts_in_valkey(limiter))
        await limiter.close()


async def test_valkey_that_was_never_there_costs_nothing():
    limiter = ValkeyLimiter.connect("redis://:secret@127.0.0.1:1/0")
    sender = principal(2)
    started = time.monotonic()
    states = [await limiter.hit(sender) for _ in range(20)]
    assert sum(s.allowed for s in states) == 2
    assert time.monotonic() - started < 0.5
    await limiter.close()


async def _counts_in_valkey(limiter):
    await limiter.hit(principal(1))
    return limiter.is_shared


def test_open_breaker_permits_one_try_per_cooldown_and_waits_longer_each_time():
    clock = FakeClock(100.0)
    breaker = Breaker(cooldown_s=1.0, max_cooldown_s=4.0, clock=clock)
    assert breaker.permits() and breaker.failed() and breaker.is_open
    assert not breaker.permits()
    waits = []
    for _ in range(4):
        waited = 0.0
        while not breaker.permits():
            clock.advance(0.5)
            waited += 0.5
        waits.append(waited)
        assert not breaker.permits(), "a second caller must not try as well"
        assert not breaker.failed()
    assert waits == [1.0, 2.0, 4.0, 4.0]
    clock.advance(4.0)
    assert breaker.permits() and breaker.succeeded() and not breaker.is_open
    assert breaker.failed()
    clock.advance(1.0)
    assert breaker.permits()
