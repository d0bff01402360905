"""eventually, free_port and FakeClock."""

import asyncio

import pytest

import testkit


async def test_eventually_returns_the_first_true_answer_of_plain_and_async_functions():
    answers = iter([0, None, 7])
    assert await testkit.eventually(lambda: next(answers), interval_s=0) == 7

    async def async_answer():
        return "x"

    assert await testkit.eventually(async_answer) == "x"


async def test_eventually_names_the_last_failed_assertion():
    def fails():
        assert 1 == 2, "one is not two"

    with pytest.raises(AssertionError, match="one is not two"):
        await testkit.eventually(fails, timeout_s=0.05, interval_s=0.01)


def test_eventually_without_a_loop_is_an_error_and_not_a_silent_pass():
    with pytest.raises(RuntimeError, match="no running event loop"):
        testkit.eventually(lambda: False)


def test_eventually_sync_stops_at_its_bound():
    with pytest.raises(AssertionError, match="last answer False"):
        testkit.eventually_sync(lambda: False, timeout_s=0.05, interval_s=0.01)


def test_free_port_never_gives_the_same_port_twice():
    ports = [testkit.free_port() for _ in range(50)]
    assert len(set(ports)) == 50


async def test_fake_clock_wakes_sleepers_in_the_order_of_their_time():
    clock = testkit.FakeClock(100)
    woken: list[str] = []

    async def sleeper(name: str, seconds: float):
        await clock.sleep(seconds)
        woken.append(name)

    async with asyncio.TaskGroup() as group:
        group.create_task(sleeper("late", 5))
        group.create_task(sleeper("early", 1))
        await testkit.eventually(lambda: clock.num_sleepers == 2)
        clock.advance(0.5)
        await asyncio.sleep(0)
        assert woken == []
        clock.advance(10)
    assert woken == ["early", "late"]
    assert clock() == 110.5
