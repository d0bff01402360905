"""How a bus behaves: one suite, inherited by the tests of FakeBus and of the real NatsBus.

A subclass gives the fixture `bus` (over STREAMS of this module) and `outage` (a context manager in which the
server is away). Subjects and durables are new in every test, since the real server is shared.
"""

import asyncio
import contextlib
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider

from chassis import context, telemetry
from chassis.bus import DEAD_PREFIX, Bus, Received, StreamSpec
from chassis.errors import Code, PlatformError
from testkit.waiting import eventually

STREAMS = (
    StreamSpec("SUITE_FACTS", ("pressroom.facts.>",), "limits", 3600.0, 1 << 24),
    StreamSpec("SUITE_TASKS", ("pressroom.tasks.>",), "workqueue", 0.0, 1 << 24),
    StreamSpec("SUITE_DEAD", ("pressroom.dead.>",), "limits", 3600.0, 1 << 24),
)
_SHORT = (0.05, 0.05)


class Recorder:
    """A handler that remembers what it was given; `act` runs before it returns."""

    def __init__(self, act: Callable[[Received], Awaitable[None]] | None = None) -> None:
        self.received: list[Received] = []
        self._act = act

    async def __call__(self, received: Received) -> None:
        self.received.append(received)
        if self._act is not None:
            await self._act(received)

    @property
    def payloads(self) -> list[bytes]:
        return [r.payload for r in self.received]


@contextlib.asynccontextmanager
async def consuming(bus: Bus, subject: str, handler: Any, **options: Any) -> AsyncIterator[asyncio.Task[None]]:
    """A consumer for a block, cancelled at its end; fails the test if the consumer ended by itself."""
    options.setdefault("durable", f"d-{uuid.uuid4().hex}")
    task = asyncio.create_task(bus.consume(subject, handler=handler, **options))
    try:
        yield task
        assert not task.done(), task
    finally:
        task.cancel()
        await asyncio.wait({task}, timeout=10)


def _fact() -> str:
    return f"pressroom.facts.{uuid.uuid4().hex}"


def _task() -> str:
    return f"pressroom.tasks.{uuid.uuid4().hex}"


async def _fail_first(received: Received) -> None:
    if received.payload == b"bad" and received.num_delivered == 1:
        raise RuntimeError("not yet")


async def _hopeless(_: Received) -> None:
    raise PlatformError(Code.INVALID_ARGUMENT, "no such thing")


async def _broken(_: Received) -> None:
    raise PlatformError(Code.UNAVAILABLE, "try again")


class BusSuite:
    """The behaviour; see the module."""

    @pytest.fixture
    def bus(self) -> Bus:
        raise NotImplementedError

    @pytest.fixture
    def outage(self) -> contextlib.AbstractAsyncContextManager[None]:
        raise NotImplementedError

    async def test_a_message_arrives_with_its_payload_and_id(self, bus: Bus) -> None:
        subject, seen = _fact(), Recorder()
        async with consuming(bus, subject, seen):
            await bus.publish(subject, b"hello", message_id="m1")
            await eventually(lambda: seen.received)
        only = seen.received[0]
        assert (only.subject, only.payload, only.message_id, only.num_delivered) == (subject, b"hello", "m1", 1)

    async def test_a_consumer_that_comes_late_or_again_catches_up_and_hears_nothing_twice(self, bus: Bus) -> None:
        subject, seen = _fact(), Recorder()
        await bus.publish(subject, b"1", message_id=f"{subject}1")
        for num_expected in (1, 2):
            async with consuming(bus, subject, seen, durable=f"late-{subject[-8:]}"):
                await _heard(seen, num_expected)
            await bus.publish(subject, b"2", message_id=f"{subject}2")
        assert seen.payloads == [b"1", b"2"]

    async def test_one_message_id_is_one_message(self, bus: Bus) -> None:
        subject, seen = _fact(), Recorder()
        async with consuming(bus, subject, seen):
            for _ in range(3):
                await bus.publish(subject, b"once", message_id=f"{subject}a")
            await bus.publish(subject, b"end", message_id=f"{subject}b")
            await eventually(lambda: b"end" in seen.payloads)
        assert seen.payloads == [b"once", b"end"]

    async def test_every_durable_consumer_hears_every_fact(self, bus: Bus) -> None:
        subject, one, two = _fact(), Recorder(), Recorder()
        async with consuming(bus, subject, one), consuming(bus, subject, two):
            await bus.publish(subject, b"fact", message_id=subject)
            await eventually(lambda: one.payloads == two.payloads == [b"fact"])

    async def test_a_new_only_consumer_skips_what_was_there_before(self, bus: Bus) -> None:
        subject, seen = _fact(), Recorder()
        await bus.publish(subject, b"old", message_id=f"{subject}0")
        async with consuming(bus, subject, seen, deliver_new_only=True):
            counter = iter(range(1000))

            async def hears_new() -> bool:
                # The subscription stands some time after the task began, so new ones are sent until one is heard.
                await bus.publish(subject, b"new", message_id=f"{subject}n{next(counter)}")
                return bool(seen.received)

            await eventually(hears_new)
        assert set(seen.payloads) == {b"new"}

    async def test_workers_of_one_queue_share_the_jobs_and_each_is_done_once(self, bus: Bus) -> None:
        subject, one, two = _task(), Recorder(), Recorder()
        durable = f"w-{subject[-8:]}"
        jobs = [f"{i}".encode() for i in range(20)]
        async with consuming(bus, subject, one, durable=durable), consuming(bus, subject, two, durable=durable):
            for job in jobs:
                await bus.publish(subject, job, message_id=f"{subject}{job!r}")
            await eventually(lambda: len(one.received) + len(two.received) >= len(jobs))
        assert sorted(one.payloads + two.payloads) == sorted(jobs)

    async def test_concurrency_is_how_many_handlers_run_at_once(self, bus: Bus) -> None:
        subject, gate, inside = _task(), asyncio.Event(), Recorder()

        async def hold(_: Received) -> None:
            await gate.wait()

        inside = Recorder(hold)
        async with consuming(bus, subject, inside, concurrency=3):
            for i in range(5):
                await bus.publish(subject, b"x", message_id=f"{subject}{i}")
            await eventually(lambda: len(inside.received) == 3)
            gate.set()
            await eventually(lambda: len(inside.received) == 5)

    async def test_a_failed_message_comes_again_and_does_not_hold_up_the_next(self, bus: Bus) -> None:
        subject, seen = _task(), Recorder(_fail_first)
        async with consuming(bus, subject, seen, backoff_s=(0.5,)):
            await bus.publish(subject, b"bad", message_id=f"{subject}1")
            await bus.publish(subject, b"good", message_id=f"{subject}2")
            await eventually(lambda: len(seen.received) == 3)
        assert [(r.payload, r.num_delivered) for r in seen.received] == [(b"bad", 1), (b"good", 1), (b"bad", 2)]
        assert {r.message_id for r in seen.received if r.payload == b"bad"} == {f"{subject}1"}

    async def test_many_failed_messages_do_not_hold_up_the_next(self, bus: Bus) -> None:
        subject, good = _task(), asyncio.Event()

        async def fail_bad(received: Received) -> None:
            if received.payload == b"bad":
                raise RuntimeError("not yet")
            good.set()

        async with consuming(bus, subject, Recorder(fail_bad), backoff_s=(60.0,)):
            for i in range(40):
                await bus.publish(subject, b"bad", message_id=f"{subject}{i}")
            await bus.publish(subject, b"good", message_id=f"{subject}good")
            async with asyncio.timeout(20):
                await good.wait()

    async def test_a_hopeless_message_is_a_dead_letter_at_once(self, bus: Bus) -> None:
        subject, seen, dead = _task(), Recorder(_hopeless), Recorder()
        durable = f"w-{subject[-8:]}"
        async with (
            consuming(bus, subject, seen, durable=durable),
            consuming(bus, DEAD_PREFIX + subject, dead),
        ):
            await bus.publish(subject, b"\x00as it was", message_id=subject)
            await eventually(lambda: dead.received)
        assert len(seen.received) == 1
        letter = dead.received[0]
        assert letter.payload == b"\x00as it was"
        assert letter.headers["Pressroom-Consumer"] == durable
        assert "no such thing" in letter.headers["Pressroom-Error"]
        assert letter.headers["Pressroom-Delivered"] == "1"

    async def test_a_message_that_always_fails_is_a_dead_letter_after_max_deliver(self, bus: Bus) -> None:
        subject, seen, dead = _fact(), Recorder(_broken), Recorder()
        async with (
            consuming(bus, subject, seen, max_deliver=3, backoff_s=_SHORT),
            consuming(bus, DEAD_PREFIX + subject, dead),
        ):
            await bus.publish(subject, b"x", message_id=subject)
            await eventually(lambda: dead.received)
        assert [r.num_delivered for r in seen.received] == [1, 2, 3]
        assert dead.received[0].headers["Pressroom-Delivered"] == "3"

    async def test_a_message_whose_worker_left_comes_to_the_next_worker(self, bus: Bus) -> None:
        subject, second = _task(), Recorder()

        async def never(_: Received) -> None:
            await asyncio.Event().wait()

        first = Recorder(never)
        durable = f"w-{subject[-8:]}"
        await bus.publish(subject, b"job", message_id=subject)
        async with consuming(bus, subject, first, durable=durable, ack_wait_s=1.0):
            await eventually(lambda: first.received)
        async with consuming(bus, subject, second, durable=durable, ack_wait_s=1.0):
            await eventually(lambda: second.received)
        assert second.received[0].num_delivered == 2

    async def test_a_handler_slower_than_the_ack_wait_is_not_run_twice(self, bus: Bus) -> None:
        subject, finished = _task(), asyncio.Event()

        async def slow(_: Received) -> None:
            await asyncio.sleep(1.6)
            finished.set()

        seen = Recorder(slow)
        async with consuming(bus, subject, seen, ack_wait_s=1.0, concurrency=2):
            await bus.publish(subject, b"long", message_id=subject)
            await asyncio.wait_for(finished.wait(), 10)
        assert len(seen.received) == 1

    async def test_trace_and_request_id_of_the_publisher_reach_the_handler(self, bus: Bus) -> None:
        if not isinstance(trace.get_tracer_provider(), TracerProvider):
            trace.set_tracer_provider(TracerProvider())
        subject, seen = _fact(), []

        async def look(_: Received) -> None:
            seen.append((telemetry.trace_id(), context.current().request_id))

        async with consuming(bus, subject, look):
            with telemetry.tracer().start_as_current_span("publisher"), context.use(context.RequestContext("req_1")):
                sent = telemetry.trace_id()
                await bus.publish(subject, b"x", message_id=subject)
            await eventually(lambda: seen)
        assert len(sent) == 32
        assert seen == [(sent, "req_1")]

    async def test_a_stored_traceparent_wins_over_the_current_span(self, bus: Bus) -> None:
        subject, seen = _fact(), Recorder()
        parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
        async with consuming(bus, subject, seen):
            await bus.publish(subject, b"x", message_id=subject, traceparent=parent)
            await eventually(lambda: seen.received)
        assert seen.received[0].headers["traceparent"] == parent

    @pytest.mark.parametrize("subject", [_fact, _task], ids=["event", "job"])
    async def test_the_backlog_counts_what_waits_and_what_is_in_hand(
        self, bus: Bus, subject: Callable[[], str]
    ) -> None:
        topic, go_on = subject(), asyncio.Event()

        async def wait(_: Received) -> None:
            await go_on.wait()

        for i in range(3):
            await bus.publish(topic, b"x", message_id=f"{topic}-{i}")
        async with consuming(bus, topic, wait):
            await eventually(lambda: bus.backlog == 3)
            go_on.set()
            await eventually(lambda: bus.backlog == 0)

    async def test_a_message_in_hand_at_the_end_goes_to_the_next_consumer_at_once(self, bus: Bus) -> None:
        topic, name, begun, seen = _task(), f"d-{uuid.uuid4().hex}", asyncio.Event(), Recorder()

        async def hang(_: Received) -> None:
            begun.set()
            await asyncio.Event().wait()

        await bus.publish(topic, b"x", message_id=topic)
        async with consuming(bus, topic, hang, durable=name):
            await asyncio.wait_for(begun.wait(), 10)
        async with consuming(bus, topic, seen, durable=name):
            await eventually(lambda: seen.received, timeout_s=8)  # ack_wait is 30 s
        assert seen.received[0].num_delivered == 2

    async def test_a_subject_without_a_stream_is_refused_and_not_lost_silently(self, bus: Bus) -> None:
        with pytest.raises(PlatformError) as caught:
            await bus.publish("pressroom.nowhere.x", b"x", message_id="n", timeout_s=1.0)
        assert caught.value.code is Code.UNAVAILABLE
        with pytest.raises(ValueError, match="no stream carries"):
            async with asyncio.timeout(5):
                await bus.consume("pressroom.nowhere.x", durable="n", handler=Recorder())

    async def test_broadcasts_reach_who_listens_and_a_failing_listener_goes_on(self, bus: Bus) -> None:
        subject = f"pressroom.control.{uuid.uuid4().hex}"

        async def fail(_: Received) -> None:
            raise RuntimeError("listener failed")

        failing, hearing = Recorder(fail), Recorder()
        tasks = [asyncio.create_task(bus.listen(subject, handler)) for handler in (failing, hearing)]
        try:

            async def both_hear() -> bool:
                await bus.broadcast(subject, b"now")
                return len(failing.received) > 1 and len(hearing.received) > 1

            await eventually(both_hear)
            assert not any(task.done() for task in tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def test_an_absent_server_costs_a_publisher_no_more_than_its_timeout_and_consumers_catch_up(
        self, bus: Bus, outage: contextlib.AbstractAsyncContextManager[None]
    ) -> None:
        subject, seen = _task(), Recorder()
        await eventually(lambda: bus.connected)
        async with consuming(bus, subject, seen):
            await bus.publish(subject, b"before", message_id=f"{subject}1")
            await eventually(lambda: seen.payloads == [b"before"])
            async with outage:
                began = time.monotonic()
                with pytest.raises(PlatformError) as caught:
                    await bus.publish(subject, b"refused", message_id=f"{subject}2", timeout_s=1.0)
                assert caught.value.code is Code.UNAVAILABLE
                assert caught.value.retryable
                assert time.monotonic() - began < 1.5
                with pytest.raises(PlatformError):
                    await eventually(lambda: _broadcast_fails(bus), timeout_s=5)
            await eventually(lambda: bus.connected, timeout_s=30)
            await bus.publish(subject, b"after", message_id=f"{subject}3")
            await eventually(lambda: b"after" in seen.payloads, timeout_s=30)
        # "before" may come once more where its ack was on the way when the server went.
        assert [r.payload for r in seen.received if r.num_delivered == 1] == [b"before", b"after"]


async def _heard(recorder: Recorder, count: int) -> None:
    await eventually(lambda: len(recorder.received) >= count)


async def _broadcast_fails(bus: Bus) -> bool:
    """Raises once the bus knows that the server is away; until then a broadcast may still go out into nothing."""
    await bus.broadcast("pressroom.control.suite", b"x")
    return False
