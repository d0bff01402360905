"""Breakers, the budget of retries, and the guard: nothing after the first token, nothing beyond the budget."""

import asyncio
import random
from contextlib import aclosing
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chassis.errors import Code, PlatformError
from gateway.core.capacity import Capacity, CapacityBounds
from gateway.core.circuit import Circuit, CircuitRules, CircuitState
from gateway.core.guard import Backend, Guard
from gateway.core.retry_budget import RetryBudget
from gateway.core.services import Abandoned, Delta, Done, Finished, Started, Usage
from testkit import FakeClock

AWAY = PlatformError(Code.UNAVAILABLE, "not there")
BUSY = PlatformError(Code.OVERLOADED, "full")
BROKEN = PlatformError(Code.INTERNAL, "a bug")
BAD = PlatformError(Code.INVALID_ARGUMENT, "no")
LATE = PlatformError(Code.DEADLINE_EXCEEDED, "late")
LOADING = PlatformError(Code.UNAVAILABLE, "the adapter is sick", reason="adapter_probe_failed")
ANSWER = [Started(3, "v1"), Delta(0, "a", 1), Delta(0, "b", 1), Finished(0, "stop"), Done(Usage(3, 2))]
RULES = CircuitRules(consecutive=3, least_outcomes=10, window_s=10, first_open_s=1, longest_open_s=8)


class Replica:
    """Fails as it is told; a script of what each call does: an error, or events with perhaps an error among them."""

    def __init__(self, *script):
        self.script = list(script)
        self.num_calls = 0
        self.num_closed = 0
        self.timeouts = []

    async def generate(self, timeout_s):
        self.num_calls += 1
        self.timeouts.append(timeout_s)
        what = self.script.pop(0) if len(self.script) > 1 else self.script[0]
        try:
            for event in [what] if isinstance(what, Exception) else what:
                if isinstance(event, Exception):
                    raise event
                yield event
                await asyncio.sleep(0)
        finally:
            self.num_closed += 1


class Meter:
    def __init__(self):
        self.outcomes = []

    def retried(self, outcome):
        self.outcomes.append(outcome)


def make_guard(*replicas, clock=None, budget=None, capacity=None):
    clock = clock or FakeClock()

    async def sleep(seconds):
        clock.advance(seconds)

    backends = [Backend(f"r{i}", one, Circuit(RULES, clock, lambda: 1.0)) for i, one in enumerate(replicas)]
    return Guard("generator", backends, Meter(), capacity, budget, sleep), backends, clock


async def run(guard, timeout_s=30.0):
    async with aclosing(guard.stream(lambda one, left_s: one.generate(left_s), timeout_s)) as events:
        return [event async for event in events]


def without_abandoned(events):
    return [event for event in events if event != Abandoned()]


async def error_of(guard, **how):
    with pytest.raises(PlatformError) as caught:
        await run(guard, **how)
    return caught.value


async def test_a_backend_that_is_away_is_replaced_before_the_first_token():
    guard, _, _ = make_guard(Replica(AWAY), Replica(ANSWER))
    for _ in range(4):
        assert without_abandoned(await run(guard)) == ANSWER
    assert guard._meter.outcomes.count("succeeded") >= 1 and "failed" not in guard._meter.outcomes


async def test_what_was_admitted_and_broke_off_before_a_token_is_tried_again_and_told_once():
    for cut in ([ANSWER[0], AWAY], [ANSWER[0], Finished(0, "cancelled"), Done(Usage(3, 0))]):
        guard, _, _ = make_guard(Replica(cut, ANSWER))
        assert await run(guard) == [Abandoned(), *ANSWER]  # what the first try used is known to its backend alone


async def test_nothing_is_tried_again_after_a_token():
    replicas = Replica([*ANSWER[:2], AWAY]), Replica([*ANSWER[:2], AWAY])
    guard, _, _ = make_guard(*replicas)
    got = []
    with pytest.raises(PlatformError):
        async with aclosing(guard.stream(lambda one, left_s: one.generate(left_s), 30.0)) as events:
            async for event in events:
                got.append(event)
    assert got == ANSWER[:2] and sum(r.num_calls for r in replicas) == 1


@pytest.mark.parametrize("error", [BUSY, BROKEN, BAD, LATE, LOADING], ids=lambda error: error.code.value)
async def test_what_is_no_absence_is_not_tried_again(error):
    replica = Replica(error)
    guard, _, _ = make_guard(replica)
    assert await error_of(guard) is error and replica.num_calls == 1


async def test_a_request_is_tried_three_times_at_most():
    replica = Replica(AWAY)
    guard, backends, _ = make_guard(replica)
    backends[0].breaker = Circuit(CircuitRules(consecutive=100), FakeClock())
    assert await error_of(guard) is AWAY
    assert replica.num_calls == 3 and guard._meter.outcomes == ["failed", "failed"]


async def test_no_retry_where_no_time_is_left_and_each_gets_what_is_left():
    replica = Replica(AWAY)
    guard, _, _ = make_guard(replica)
    assert await error_of(guard, timeout_s=0.0) is AWAY
    assert replica.num_calls == 1
    replica = Replica(AWAY, ANSWER)
    guard, _, _ = make_guard(replica)
    await run(guard, timeout_s=5.0)
    assert 0 < replica.timeouts[1] < replica.timeouts[0] <= 5.0


@settings(max_examples=50, deadline=None)
@given(outcomes=st.lists(st.booleans(), min_size=1, max_size=300), seed=st.integers(0, 10**6))
def test_retries_never_exceed_a_tenth_of_the_requests_and_the_first_ten(outcomes, seed):
    chance = random.Random(seed)

    async def send():
        replica = Replica(AWAY)
        guard, backends, _ = make_guard(replica)
        backends[0].breaker = Circuit(CircuitRules(consecutive=10**9, least_outcomes=10**9), FakeClock())
        for number, is_away in enumerate(outcomes, start=1):
            replica.script = [AWAY] if is_away else [ANSWER] if chance.random() < 0.5 else [AWAY, ANSWER]
            try:
                await run(guard)
            except PlatformError as error:
                assert error is AWAY
            assert replica.num_calls - number <= 10 + number * 0.1

    asyncio.run(send())


async def test_the_budget_is_shared_and_says_when_it_denied():
    guard, _, _ = make_guard(Replica(AWAY), Replica(AWAY), budget=RetryBudget(most=1))
    await error_of(guard)
    await error_of(guard)
    assert guard._meter.outcomes == ["failed", "denied", "denied"]


async def test_a_cancelled_stream_closes_the_backends_and_counts_for_nothing():
    replica = Replica(ANSWER)
    guard, backends, _ = make_guard(replica)
    async with aclosing(guard.stream(lambda one, left_s: one.generate(left_s), 30.0)) as events:
        await anext(events)
    assert replica.num_closed == 1 and backends[0].num_running == 0
    assert backends[0].breaker.state is CircuitState.CLOSED


async def test_a_backend_that_fails_is_left_alone_and_comes_back_by_itself():
    sick, well = Replica(AWAY), Replica(ANSWER)
    guard, backends, clock = make_guard(sick, well)
    for _ in range(30):
        assert without_abandoned(await run(guard)) == ANSWER
    assert sick.num_calls <= RULES.consecutive + 1 and backends[0].breaker.state is CircuitState.OPEN
    sick.script = [ANSWER]
    clock.advance(10)
    before = sick.num_calls
    for _ in range(10):
        assert await run(guard) == ANSWER
    assert sick.num_calls >= before + 4 and backends[0].breaker.state is CircuitState.CLOSED


async def test_where_no_retry_is_left_nobodys_request_finds_out_whether_a_backend_is_back():
    sick, well = Replica(AWAY), Replica(ANSWER)
    guard, backends, clock = make_guard(sick, well, budget=RetryBudget(part=0.0, most=4))
    for _ in range(30):
        await run(guard)
    while guard._budget.allows:
        guard._budget.spend()
    clock.advance(100)
    assert backends[0].breaker.state is CircuitState.HALF_OPEN
    before = sick.num_calls
    for _ in range(10):
        assert await run(guard) == ANSWER
    assert sick.num_calls == before


async def test_of_several_at_most_half_are_left_alone():
    replicas = [Replica(AWAY) for _ in range(4)]
    guard, _, _ = make_guard(*replicas, budget=RetryBudget(part=0, most=0))
    for _ in range(60):
        await error_of(guard)
    before = [replica.num_calls for replica in replicas]
    for _ in range(20):
        assert (await error_of(guard)).code is Code.UNAVAILABLE
    asked = [replica.num_calls - b for replica, b in zip(replicas, before, strict=True)]
    assert sum(asked) == 20 and sum(n > 0 for n in asked) == 2


async def test_the_only_backend_is_left_alone_too_and_the_error_says_for_how_long():
    replica = Replica(AWAY)
    guard, _, clock = make_guard(replica, budget=RetryBudget(part=0, most=0))
    for _ in range(10):
        await error_of(guard)
    assert replica.num_calls == 3
    error = await error_of(guard)
    assert error.code is Code.UNAVAILABLE and error.retry_after_s >= 1 and "generator" in error.message
    replica.script = [ANSWER]
    clock.advance(1.1)
    assert await run(guard) == ANSWER


async def test_the_least_busy_backend_is_asked():
    replicas = [Replica(ANSWER), Replica(ANSWER)]
    guard, _, _ = make_guard(*replicas)
    open_streams = [guard.stream(lambda one, left_s: one.generate(left_s), 30.0) for _ in range(10)]
    for stream in open_streams:
        await anext(stream)
    assert [replica.num_calls for replica in replicas] == [5, 5]
    for stream in open_streams:
        await stream.aclose()


async def test_capacity_hears_of_waits_and_of_refusals():
    clock = FakeClock(100.0)
    capacity = Capacity(CapacityBounds(10, 1, 10, late_s=0.0), clock)
    guard, _, _ = make_guard(Replica(ANSWER), capacity=capacity)
    clock.advance(1)
    await run(guard)
    assert capacity.limit == 9
    clock.advance(1)
    guard, _, _ = make_guard(Replica(BUSY), capacity=capacity)
    await error_of(guard)
    assert capacity.limit == 6


async def test_calls_are_guarded_as_streams_are():
    answers = [AWAY, 7]

    async def call(_, left_s):
        assert left_s > 0
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    guard, _, _ = make_guard(Replica(ANSWER))
    assert await guard.call(call, 5.0) == 7
    answers[:] = [BAD]
    with pytest.raises(PlatformError) as caught:
        await guard.call(call, 5.0)
    assert caught.value is BAD


def make_breaker(**changes):
    clock = FakeClock()
    return Circuit(replace(RULES, **changes), clock, lambda: 1.0), clock


def fail(breaker, num=1):
    for _ in range(num):
        breaker.ask()
        breaker.failed()


def test_a_breaker_opens_after_failures_in_a_row_and_not_before():
    breaker, _ = make_breaker()
    fail(breaker, 2)
    breaker.succeeded()
    fail(breaker, 2)
    assert breaker.admits
    fail(breaker)
    assert breaker.state is CircuitState.OPEN and not breaker.admits and breaker.open_s == 1


def test_what_breaks_off_at_one_moment_opens_no_breaker_of_an_only_backend():
    breaker, clock = make_breaker(row_s=0.25, least_outcomes=1000)
    fail(breaker, 20)
    assert breaker.admits
    clock.advance(0.1)
    breaker.succeeded()  # by another replica behind the same name
    fail(breaker, 3)
    clock.advance(0.2)
    fail(breaker)
    assert breaker.admits
    clock.advance(0.1)
    fail(breaker)
    assert not breaker.admits


def test_a_breaker_opens_where_half_fail():
    breaker, clock = make_breaker(consecutive=100)
    for _ in range(4):
        breaker.succeeded()
        fail(breaker)
    assert breaker.admits
    clock.advance(11)  # what is older than the window does not count
    for _ in range(4):
        breaker.succeeded()
        fail(breaker)
    assert breaker.admits
    breaker.succeeded()
    fail(breaker)
    assert breaker.state is CircuitState.OPEN


def test_one_request_at_a_time_tries_a_half_open_breaker_and_its_time_grows():
    breaker, clock = make_breaker()
    fail(breaker, 3)
    for expected_s in (2, 4, 8, 8):
        clock.advance(breaker.open_s)
        assert breaker.state is CircuitState.HALF_OPEN and breaker.admits
        breaker.ask()
        assert not breaker.admits
        breaker.failed()
        assert breaker.open_s == expected_s
    clock.advance(8)
    breaker.ask()
    breaker.gave_up()
    assert breaker.admits
    breaker.ask()
    breaker.succeeded()
    assert breaker.state is CircuitState.CLOSED
    fail(breaker, 3)
    assert breaker.open_s == 8  # it had hardly come back
    clock.advance(8)
    breaker.succeeded()
    clock.advance(11)
    fail(breaker, 3)
    assert breaker.open_s == 1  # it had worked for a while
