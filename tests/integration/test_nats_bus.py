"""The real bus on a real nats-server: what BusSuite says, and what only a real server can show."""

import asyncio
import contextlib
import time

import pytest

import testkit
from chassis.errors import Code, PlatformError
from chassis.nats_bus import NatsBus
from testkit.bus_suite import STREAMS, BusSuite, Recorder, consuming
from testkit.servers import NatsServer

pytestmark = pytest.mark.integration


@pytest.fixture
async def bus(nats):
    if not nats.running:
        nats.start()
    bus = NatsBus.connect(nats.url, "suite", STREAMS)
    await testkit.eventually(lambda: bus.connected)
    yield bus
    await bus.close()


class TestNatsBus(BusSuite):
    @pytest.fixture
    def bus(self, bus):
        return bus

    @pytest.fixture
    def outage(self, nats):
        @contextlib.asynccontextmanager
        async def killed():
            nats.kill9()
            try:
                yield
            finally:
                await asyncio.to_thread(nats.start)

        return killed()

    async def test_what_was_acknowledged_survives_kill9_of_the_server(self, bus, nats):
        subject, seen = "pressroom.tasks.kept", Recorder()
        for i in range(20):
            await bus.publish(subject, b"%d" % i, message_id=f"kept{i}")
        nats.kill9()
        await asyncio.to_thread(nats.start)
        async with consuming(bus, subject, seen):
            await testkit.eventually(lambda: len(set(seen.payloads)) >= 20, timeout_s=30)
        assert {int(payload) for payload in seen.payloads} == set(range(20))

    async def test_a_connection_that_the_server_ends_for_good_is_made_anew(self, bus):
        subject, broadcast = "pressroom.tasks.anew", "pressroom.control.anew"
        worked, heard = Recorder(), Recorder()
        listening = asyncio.create_task(bus.listen(broadcast, heard))

        async def hears() -> bool:
            with contextlib.suppress(PlatformError):
                await bus.broadcast(broadcast, b"x")
            return bool(heard.received)

        async with consuming(bus, subject, worked):
            await testkit.eventually(hears)
            client = bus._client
            await client._process_err("'maximum connections exceeded'")  # what the server's -ERR line brings about
            await testkit.eventually(lambda: client.is_closed and bus.connected)
            heard.received.clear()
            await bus.publish(subject, b"job", message_id="anew")
            await testkit.eventually(lambda: worked.payloads == [b"job"])
            await testkit.eventually(hears)
        listening.cancel()
        await asyncio.wait({listening})

    async def test_a_frozen_server_costs_a_publisher_no_more_than_its_timeout(self, bus, nats):
        nats.pause()
        try:
            began = time.monotonic()
            with pytest.raises(PlatformError) as caught:
                await bus.publish("pressroom.facts.frozen", b"x", message_id="frozen", timeout_s=1.0)
            assert caught.value.code is Code.UNAVAILABLE
            assert time.monotonic() - began < 2.0
        finally:
            nats.resume()

    async def test_a_repeated_publish_after_a_lost_answer_is_one_message(self, bus, nats):
        """The publisher cannot know whether a frozen server took the first one; the message id settles it."""
        subject, seen = "pressroom.facts.repeated", Recorder()
        nats.pause()
        try:
            with pytest.raises(PlatformError):
                await bus.publish(subject, b"x", message_id="repeated", timeout_s=0.3)
        finally:
            nats.resume()

        async def publish_again():
            with contextlib.suppress(PlatformError):
                await bus.publish(subject, b"x", message_id="repeated")
                return True

        await testkit.eventually(publish_again, timeout_s=30)
        async with consuming(bus, subject, seen):
            await testkit.eventually(lambda: seen.received, timeout_s=30)
            await bus.publish(subject, b"end", message_id="repeated-end")
            await testkit.eventually(lambda: b"end" in seen.payloads, timeout_s=30)
        # Not counting what a slow ack may have had delivered again: that is the same message.
        assert [r.payload for r in seen.received if r.num_delivered == 1] == [b"x", b"end"]


async def test_a_bus_made_while_no_server_is_there_connects_when_one_comes():
    server = NatsServer()
    bus = NatsBus.connect(server.url, "early", STREAMS)
    seen = Recorder()
    try:
        assert not bus.connected
        with pytest.raises(PlatformError) as caught:
            await bus.publish("pressroom.facts.early", b"x", message_id="e0", timeout_s=1.0)
        assert caught.value.code is Code.UNAVAILABLE
        async with consuming(bus, "pressroom.facts.early", seen):
            await asyncio.sleep(0.6)  # at least one attempt to connect has failed by now
            await asyncio.to_thread(server.start)
            await testkit.eventually(lambda: bus.connected, timeout_s=30)
            await bus.publish("pressroom.facts.early", b"x", message_id="e1")
            await testkit.eventually(lambda: seen.payloads == [b"x"])
    finally:
        await bus.close()
        server.close()


async def test_closing_a_bus_that_never_connected_returns_soon():
    bus = NatsBus.connect(f"nats://127.0.0.1:{testkit.free_port()}", "never", STREAMS)
    await asyncio.sleep(0)
    await asyncio.wait_for(bus.close(), 5)
