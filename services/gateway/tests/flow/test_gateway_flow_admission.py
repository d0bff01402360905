"""Admission: turns, bounds, refusals at arrival, and that no place is ever lost."""

import asyncio
import random
from contextlib import AsyncExitStack

import pytest
from pydantic import ValidationError

from chassis.errors import Code, PlatformError
from gateway.api.admin_policies import PolicyBody, policy_of
from gateway.core.account import Account
from gateway.core.admission import Admission, Cause, Lane, QueueBounds
from gateway.core.capacity import Capacity, CapacityBounds
from gateway.core.graph import Deadline, GraphRequest
from gateway.core.policy import Policy, policy_from_json
from gateway.core.ports import Principal
from gateway.core.services import Stopping, Usage
from gateway.core.serving import Ask
from testkit import FakeClock, eventually


class Meter:
    def __init__(self):
        self.waits, self.causes = [], []

    def admitted(self, wait_s):
        self.waits.append(wait_s)

    def shed(self, cause):
        self.causes.append(cause)


def ask(tenant="acme", *, prompt=10, most=10, n=1, num=1, priority=0, policy=Policy(), within_s=60.0):
    principal = Principal(tenant, tenant, tenant_policy=policy, policy=policy)
    request = GraphRequest(
        prompt=tuple(range(prompt)), tenant=tenant, stopping=Stopping(max_tokens=most), n=n, priority=priority
    )
    account = Account("r", "t", "", "/v1/completions", principal)
    return Ask(principal, account, Deadline.after(within_s), "m", requests=(request,) * num)


def make_lane(limit=2, *, max_waiting=16, max_wait_s=30.0, clock=None, most=None):
    capacity = Capacity(CapacityBounds(limit, 1, most or limit), clock or FakeClock())
    return Lane("generator", capacity, QueueBounds(max_waiting, max_wait_s), Meter(), clock or FakeClock())


class Sender:
    """Sends requests that run until they are told to end."""

    def __init__(self, lane):
        self.lane = lane
        self.began = []

    def send(self, name, **how):
        wanted = ask(**how) if not isinstance(how.get("ask"), Ask) else how["ask"]
        end = asyncio.Event()

        async def run():
            async with self.lane.hold(wanted):
                self.began.append(name)
                await end.wait()
                wanted.account.done(Usage(len(wanted.requests[0].prompt), 10))

        task = asyncio.create_task(run(), name=name)
        task.end = end.set
        return task


async def settle():
    for _ in range(5):
        await asyncio.sleep(0)


async def test_what_fits_goes_on_at_once_and_the_rest_in_turn():
    lane = make_lane(2)
    sender = Sender(lane)
    tasks = [sender.send(str(i)) for i in range(4)]
    await settle()
    assert sender.began == ["0", "1"] and (lane.num_running, lane.num_waiting) == (2, 2)
    tasks[1].end()
    await settle()
    assert sender.began == ["0", "1", "2"]
    for task in tasks:
        task.end()
    await asyncio.gather(*tasks)
    assert (lane.num_running, lane.num_waiting) == (0, 0)


async def test_a_tenant_with_long_prompts_does_not_starve_short_ones():
    lane = make_lane(1, max_waiting=100)
    sender = Sender(lane)
    tasks = {"x": sender.send("x", tenant="long", prompt=1000)}
    await settle()
    for i in range(5):
        tasks[f"long{i}"] = sender.send(f"long{i}", tenant="long", prompt=1000)
    for i in range(20):
        tasks[f"short{i}"] = sender.send(f"short{i}", tenant="short", prompt=10)
    await settle()
    while len(sender.began) < 26:
        tasks[sender.began[-1]].end()
        await settle()
    tasks[sender.began[-1]].end()
    await asyncio.gather(*tasks.values())
    assert all(name.startswith("short") for name in sender.began[2:20])


async def test_more_sequences_take_more_places_and_none_waits_until_it_is_alone():
    lane = make_lane(8)
    sender = Sender(lane)
    three = sender.send("three", n=3)
    await settle()
    wide, two = sender.send("wide", n=5, num=30), sender.send("two", n=2)
    await settle()
    assert sender.began == ["three", "wide"] and lane.num_running == 3 + 4
    three.end()
    await settle()
    assert sender.began == ["three", "wide", "two"] and lane.num_running == 4 + 2
    for task in (wide, two):
        task.end()
    await asyncio.gather(three, wide, two)
    assert lane.num_running == 0


async def test_who_waited_longer_than_expected_and_would_be_late_makes_way_for_who_is_not():
    lane, _ = await learned_lane(seconds=0.2)
    sender = Sender(lane)
    running, late, fine = sender.send("running"), sender.send("late", within_s=0.9), sender.send("fine")
    await settle()
    assert lane.num_waiting == 2
    await asyncio.sleep(0.75)  # the one that runs takes three times as long as those before it
    running.end()
    await eventually(lambda: sender.began == ["running", "fine"])
    assert late.exception().code is Code.OVERLOADED and lane._meter.causes == [Cause.DEADLINE]
    fine.end()
    await asyncio.gather(running, fine)


async def test_jobs_never_go_before_people_and_hold_a_part_of_the_places():
    lane = make_lane(8)
    sender = Sender(lane)
    jobs = [sender.send(f"job{i}", tenant="jobs", priority=-1) for i in range(8)]
    await settle()
    assert sender.began == ["job0", "job1"]
    people = [sender.send(f"person{i}") for i in range(9)]
    await settle()
    assert sender.began[2:] == [f"person{i}" for i in range(8)]
    jobs[0].end()
    await settle()
    assert sender.began[-1] == "person7"  # a job that ends makes way for no job while a person waits
    people[0].end()
    await settle()
    assert sender.began[-1] == "person8"
    for task in (*people, *jobs):
        task.end()
    await asyncio.gather(*people, *jobs)
    assert lane.num_running == 0


async def test_a_key_of_a_higher_class_goes_first_and_the_narrower_policy_decides():
    both = ask(policy=Policy(priority=7))
    assert both.priority == 7
    narrowed = Ask(
        Principal("k", "t", policy=Policy(priority=7), tenant_policy=Policy(priority=2)),
        both.account,
        both.deadline,
        "m",
        both.requests,
    )
    assert narrowed.priority == 2 and ask(priority=-3, policy=Policy(priority=7)).priority == -3
    lane = make_lane(1)
    sender = Sender(lane)
    tasks = [sender.send("first"), sender.send("usual"), sender.send("vip", policy=Policy(priority=7))]
    await settle()
    tasks[0].end()
    await settle()
    assert sender.began == ["first", "vip"]
    for task in tasks:
        task.end()
    await asyncio.gather(*tasks)


async def test_a_full_queue_refuses_with_a_time_to_come_back():
    lane = make_lane(1, max_waiting=2)
    sender = Sender(lane)
    tasks = [sender.send(str(i)) for i in range(3)]
    await settle()
    with pytest.raises(PlatformError) as caught:
        async with lane.hold(ask()):
            pass
    assert caught.value.code is Code.OVERLOADED and caught.value.retry_after_s >= 1
    assert lane._meter.causes == [Cause.FULL] and lane.num_waiting == 2
    for task in tasks:
        task.end()
    await asyncio.gather(*tasks)


async def test_who_fills_the_queue_makes_room_for_others():
    lane = make_lane(1, max_waiting=3)
    sender = Sender(lane)
    flood = [sender.send(str(i), tenant="flood") for i in range(4)]
    await settle()
    other = sender.send("other", tenant="other")
    await settle()
    assert lane.num_waiting == 3
    with pytest.raises(PlatformError) as caught:
        await flood[3]
    assert caught.value.code is Code.OVERLOADED
    flood[0].end()
    await settle()
    assert sender.began == ["0", "other"]
    for task in (*flood, other):
        task.end()
    await asyncio.gather(*flood[:3], other)


async def test_a_job_is_refused_where_people_fill_the_queue_and_gives_up_its_place_to_them():
    lane = make_lane(1, max_waiting=1)
    sender = Sender(lane)
    tasks = [sender.send("running"), sender.send("job", priority=-1)]
    await settle()
    tasks.append(sender.send("person"))
    await settle()
    with pytest.raises(PlatformError):
        await tasks[1]
    with pytest.raises(PlatformError):
        async with lane.hold(ask(tenant="other", priority=-1)):
            pass
    for task in tasks:
        task.end()
    await asyncio.gather(tasks[0], tasks[2])


async def learned_lane(*, seconds, **how):
    """A lane of one place that has seen requests of 20 tokens that took so long."""
    clock = FakeClock()
    lane = make_lane(1, clock=clock, **how)
    for _ in range(50):
        wanted = ask()
        async with lane.hold(wanted):
            clock.advance(seconds)
            wanted.account.done(Usage(10, 10))
    return lane, clock


async def test_who_would_wait_too_long_is_refused_when_it_comes():
    lane, _ = await learned_lane(seconds=10, max_wait_s=20)
    sender = Sender(lane)
    tasks = [sender.send(str(i)) for i in range(2)]
    await settle()
    refused = sender.send("refused")
    with pytest.raises(PlatformError) as caught:
        await refused
    assert lane._meter.causes == [Cause.WAIT] and 20 < caught.value.retry_after_s <= 30
    job = sender.send("job", priority=-1)  # nobody looks at a clock for it
    await settle()
    assert lane.num_waiting == 2
    for task in (*tasks, job):
        task.end()
    await asyncio.gather(*tasks, job)


async def test_an_answer_that_would_come_after_its_deadline_is_not_begun():
    lane, _ = await learned_lane(seconds=10)
    running = Sender(lane).send("running")
    await settle()
    for within_s, is_refused in ((15.0, True), (40.0, False)):
        task = Sender(lane).send("next", within_s=within_s)
        await settle()
        assert task.done() is is_refused
        if is_refused:
            assert task.exception().code is Code.OVERLOADED
    assert lane._meter.causes == [Cause.DEADLINE]
    running.end(), task.end()
    await asyncio.gather(running, task)


async def test_a_wait_that_was_expected_shorter_ends_at_its_bound():
    lane = make_lane(1, max_wait_s=0.05)
    running = Sender(lane).send("running")
    await settle()
    with pytest.raises(PlatformError) as caught:
        async with lane.hold(ask()):
            pass
    assert caught.value.code is Code.OVERLOADED and lane._meter.causes == [Cause.WAIT]
    with pytest.raises(PlatformError) as caught:
        async with lane.hold(ask(within_s=0.02)):
            pass
    assert caught.value.code is Code.DEADLINE_EXCEEDED and lane.num_waiting == 0
    running.end()
    await running


async def test_a_backend_without_a_lane_is_not_bounded():
    admission = Admission({}, lambda _: "elsewhere")
    async with AsyncExitStack() as held:
        for _ in range(1000):
            await held.enter_async_context(admission.hold(ask()))


@pytest.mark.parametrize("seed", range(8))
async def test_no_place_is_lost_under_random_cancels_and_the_bounds_hold(seed):
    chance = random.Random(seed)
    clock = FakeClock()
    capacity = Capacity(CapacityBounds(5, 1, 9), clock)
    lane = Lane("generator", capacity, QueueBounds(12, 0.02), Meter(), clock)

    async def request():
        wanted = ask(
            chance.choice("abc"),
            prompt=chance.randint(1, 500),
            n=chance.choice((1, 1, 1, 3)),
            priority=chance.choice((0, 0, -1)),
            within_s=chance.choice((0.01, 5.0)),
        )
        async with lane.hold(wanted):
            people = lane._running[False]
            assert people <= 9 + 3 and lane.num_waiting <= 12
            await asyncio.sleep(chance.random() / 500)
            clock.advance(chance.random() / 100)
            if chance.random() < 0.2:
                raise PlatformError(Code.UNAVAILABLE, "gone")
            wanted.account.done(Usage(10, chance.randint(0, 500)))
            chance.choice((capacity.refused, lambda: capacity.began(0.1), lambda: capacity.began(9)))()

    tasks = []
    for _ in range(300):
        tasks.append(asyncio.create_task(request()))
        if chance.random() < 0.3:
            chance.choice(tasks).cancel()
        if chance.random() < 0.3:
            await asyncio.sleep(chance.random() / 500)
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    assert {type(o) for o in outcomes} <= {type(None), PlatformError, asyncio.CancelledError}
    assert sum(o is None for o in outcomes) > 20
    assert (lane.num_waiting, lane.num_running) == (0, 0) and not lane._queue._present


async def test_a_request_that_is_cancelled_just_when_its_turn_comes_gives_it_on():
    lane = make_lane(1)
    sender = Sender(lane)
    tasks = [sender.send(str(i)) for i in range(3)]
    await settle()
    tasks[0].end()
    tasks[1].cancel()
    await eventually(lambda: sender.began == ["0", "2"])
    tasks[2].end()
    await tasks[2]
    assert lane.num_running == 0


def test_capacity_grows_where_it_is_short_and_shrinks_where_the_backend_lets_wait():
    clock = FakeClock()
    capacity = Capacity(CapacityBounds(10, 4, 12), clock)
    capacity.ended_well()
    assert capacity.limit == 10
    capacity.is_short = True
    for _ in range(100):
        capacity.ended_well()
    assert capacity.limit == 12
    capacity.began(6.0)
    capacity.began(6.0)  # of the same time: shrinks once
    assert capacity.limit == 10
    capacity.began(2.0)  # neither soon nor late
    for _ in range(100):
        capacity.ended_well()
    assert capacity.limit == 10
    capacity.began(0.1)
    for _ in range(100):
        capacity.ended_well()
    assert capacity.limit == 12
    for _ in range(20):
        clock.advance(10)
        capacity.refused()
    assert capacity.limit == 4


def test_an_administrator_sets_a_tenants_weight():
    body = PolicyBody.model_validate({"weight": 2.5, "priority": -1})
    policy = policy_of(body)
    assert (policy.weight, policy.priority) == (2.5, -1) and policy_from_json(policy.to_json()) == policy
    assert policy_of(PolicyBody()).weight == 1.0
    for weight in (0.0, -1.0, float("nan"), float("inf"), "2", 1001.0):
        with pytest.raises(ValidationError):
            PolicyBody.model_validate({"weight": weight})
