"""FakeBus behaves as the suite says; its own additions work."""

import asyncio
import contextlib

import pytest

import testkit
from chassis.bus import Received
from testkit.bus_suite import STREAMS, BusSuite, Recorder, consuming
from testkit.fake_bus import FakeBus


class TestFakeBus(BusSuite):
    @pytest.fixture
    def bus(self):
        return FakeBus(STREAMS)

    @pytest.fixture
    def outage(self, bus):
        @contextlib.asynccontextmanager
        async def away():
            bus.go_down()
            try:
                yield
            finally:
                bus.come_back()

        return away()

    async def test_a_done_job_leaves_the_queue_and_a_heard_fact_stays(self, bus):
        seen = Recorder()
        async with consuming(bus, "pressroom.tasks.x", seen), consuming(bus, "pressroom.facts.x", seen):
            await bus.publish("pressroom.tasks.x", b"job", message_id="1")
            await bus.publish("pressroom.facts.x", b"fact", message_id="2")
            await testkit.eventually(lambda: len(seen.received) == 2)
        assert bus.stored("pressroom.tasks.>") == []
        assert [m.payload for m in bus.stored("pressroom.facts.*")] == [b"fact"]

    async def test_a_second_name_on_a_work_queue_is_refused(self, bus):
        async with consuming(bus, "pressroom.tasks.x", Recorder(), durable="one"):
            await asyncio.sleep(0)
            with pytest.raises(ValueError, match="another name"):
                await bus.consume("pressroom.tasks.x", durable="two", handler=Recorder())

    async def test_back_off_follows_the_clock_that_it_was_given(self):
        clock = testkit.FakeClock()
        bus = FakeBus(STREAMS, sleep=clock.sleep)

        async def fail(received: Received):
            if received.num_delivered < 3:
                raise RuntimeError("again")

        seen = Recorder(fail)
        async with consuming(bus, "pressroom.tasks.x", seen, backoff_s=(1, 60)):
            await bus.publish("pressroom.tasks.x", b"job", message_id="1")
            await testkit.eventually(lambda: clock.num_sleepers == 1)
            clock.advance(1)
            await testkit.eventually(lambda: clock.num_sleepers == 1 and len(seen.received) == 2)
            clock.advance(59)
            await asyncio.sleep(0)
            assert len(seen.received) == 2
            clock.advance(1)
            await testkit.eventually(lambda: len(seen.received) == 3)
