"""The bus: facts and jobs over NATS JetStream, control messages over core NATS.

Delivery is at least once: a publisher waits for the server's ack and names each message for dedupe, a consumer acks
after its handler returned and is idempotent. What no handler can take goes to `pressroom.dead.<subject>`.
"""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import nats
import nats.errors
import nats.js.errors
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.js.api import (
    AckPolicy,
    ConsumerConfig,
    DeliverPolicy,
    DiscardPolicy,
    RetentionPolicy,
    StorageType,
    StreamConfig,
)
from opentelemetry import trace

from chassis import context, metrics, telemetry
from chassis.errors import Code, PlatformError

log = logging.getLogger(__name__)

DEAD_PREFIX = "pressroom.dead."
MESSAGE_ID = "Nats-Msg-Id"
REQUEST_ID = "Pressroom-Request-Id"
_FETCH_TIMEOUT_S = 5.0
_RETRY_S = 0.5
_BACKLOG_POLL_S = 2.0
_ANSWER_TIMEOUT_S = 5.0
# Counts messages that wait for their next attempt too: a small number would let a few bad ones hold up all others.
_MAX_PENDING = 10_000


class Stream(Protocol):
    """What is asked of a stream: "limits" keeps messages for `max_age_s`, "workqueue" until they are acked."""

    @property
    def name(self) -> str: ...
    @property
    def subjects(self) -> tuple[str, ...]: ...
    @property
    def retention(self) -> Literal["limits", "workqueue"]: ...
    @property
    def max_age_s(self) -> float: ...
    @property
    def max_bytes(self) -> int: ...


@dataclass(frozen=True, slots=True)
class StreamSpec:
    """A stream as plain data, for whoever has no table of their own."""

    name: str
    subjects: tuple[str, ...]
    retention: Literal["limits", "workqueue"]
    max_age_s: float
    max_bytes: int


@dataclass(frozen=True, slots=True)
class Received:
    """One delivered message; `num_delivered` counts from 1."""

    subject: str
    payload: bytes
    message_id: str
    num_delivered: int
    headers: Mapping[str, str]


Handler = Callable[[Received], Awaitable[None]]


class Bus(Protocol):
    """What services need of the bus."""

    @property
    def connected(self) -> bool:
        """A server is connected right now."""
        ...

    @property
    def backlog(self) -> int:
        """Messages that the consumers of this process have still to handle, those in hand included; seconds old."""
        ...

    async def publish(
        self, subject: str, payload: bytes, *, message_id: str, traceparent: str | None = None, timeout_s: float = 5.0
    ) -> None:
        """Stores a message; returns when the server has it. Raises PlatformError(UNAVAILABLE)."""
        ...

    async def consume(
        self,
        subject: str,
        *,
        durable: str,
        handler: Handler,
        max_deliver: int = 5,
        ack_wait_s: float = 30.0,
        concurrency: int = 1,
        backoff_s: Sequence[float] = (1.0, 5.0, 15.0),
        deliver_new_only: bool = False,
    ) -> None:
        """Hands messages to a handler until cancelled; outlives every absence of the server.

        The handler returns: ack. It raises PlatformError(retryable=False): dead letter. It raises anything else: again
        after the back-off, and a dead letter after `max_deliver` deliveries.
        """
        ...

    async def broadcast(self, subject: str, payload: bytes) -> None:
        """Tells whoever listens now; nothing is stored. Raises PlatformError(UNAVAILABLE)."""
        ...

    async def listen(self, subject: str, handler: Handler) -> None:
        """Hands broadcasts to a handler until cancelled."""
        ...

    async def close(self) -> None:
        """Leaves the bus."""
        ...


class NatsBus:
    """The bus on a NATS server. Made by `connect`; reconnects for ever."""

    def __init__(self, client: Client, name: str, streams: Sequence[Stream]) -> None:
        self._client = client
        self._name = name
        self._streams = tuple(streams)
        self._ready = asyncio.Event()  # connected, and the streams stand
        self._tasks: set[asyncio.Task[None]] = set()
        self._closing = False
        self._backlogs: dict[str, int] = {}  # by durable

    @classmethod
    def connect(cls, url: str, name: str, streams: Sequence[Stream]) -> "NatsBus":
        """Starts to connect and returns at once, whether a server is there or not. Needs a running loop."""
        bus = cls(Client(), name, streams)
        bus._start(bus._connect(url))
        return bus

    @property
    def connected(self) -> bool:
        return self._ready.is_set() and self._client.is_connected

    @property
    def backlog(self) -> int:
        return sum(self._backlogs.values())

    def _start(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _connect(self, url: str) -> None:
        async def on_disconnect() -> None:
            self._ready.clear()
            log.warning("bus disconnected")

        async def on_reconnect() -> None:
            log.info("bus reconnected")
            self._start(self._ensure_streams())

        async def on_closed() -> None:
            # The client gives up for good on errors that a server sends ("maximum connections exceeded", an expired
            # user), whatever it was told of reconnecting.
            if not self._closing:
                log.error("bus closed by the server")
                self._client = Client()
                self._start(self._connect_again(url))

        async def on_error(error: Exception) -> None:
            log.debug("bus error", extra={"error": repr(error)})

        await self._client.connect(
            url,
            name=self._name,
            max_reconnect_attempts=-1,
            reconnect_time_wait=_RETRY_S,  # type: ignore[arg-type]
            connect_timeout=2,
            ping_interval=5,
            max_outstanding_pings=2,
            disconnected_cb=on_disconnect,
            reconnected_cb=on_reconnect,
            closed_cb=on_closed,
            error_cb=on_error,
        )
        await self._ensure_streams()

    async def _connect_again(self, url: str) -> None:
        await asyncio.sleep(_RETRY_S)
        await self._connect(url)

    async def _ensure_streams(self) -> None:
        """Creates what is missing and brings the limits of what is there up to date; tries until it succeeds."""
        while True:
            try:
                for spec in self._streams:
                    await self._ensure(_stream_config(spec))
                self._ready.set()
                return
            except (OSError, nats.errors.Error) as error:  # TimeoutError is an OSError
                log.warning("streams are not ready", extra={"error": str(error)})
                await asyncio.sleep(_RETRY_S)

    async def _ensure(self, config: StreamConfig) -> None:
        assert config.name is not None
        manager = self._client.jsm(timeout=_ANSWER_TIMEOUT_S)
        try:
            found = (await manager.stream_info(config.name)).config
        except nats.js.errors.NotFoundError:
            await manager.add_stream(config)
            return
        # Not by adding it again: the server counts the space of a stream that stands twice and may then refuse.
        limits = ("subjects", "max_age", "max_bytes", "discard", "duplicate_window")
        if any(getattr(found, name) != getattr(config, name) for name in limits):
            await manager.update_stream(config)

    async def publish(
        self, subject: str, payload: bytes, *, message_id: str, traceparent: str | None = None, timeout_s: float = 5.0
    ) -> None:
        headers = {MESSAGE_ID: message_id}
        parent = traceparent if traceparent is not None else telemetry.traceparent()
        if parent:
            headers["traceparent"] = parent
        if request_id := context.current().request_id:
            headers[REQUEST_ID] = request_id
        await self._store(subject, payload, headers, timeout_s)

    async def _store(self, subject: str, payload: bytes, headers: dict[str, str], timeout_s: float) -> None:
        if not self.connected:
            raise PlatformError(Code.UNAVAILABLE, "the bus is not connected", retry_after_s=1.0)
        try:
            await self._client.jetstream(timeout=timeout_s).publish(
                subject, payload, timeout=timeout_s, headers=headers
            )
        except nats.errors.MaxPayloadError as error:
            raise PlatformError(Code.PAYLOAD_TOO_LARGE, f"the bus takes no message of {len(payload)} bytes") from error
        except (TimeoutError, nats.errors.Error, OSError) as error:
            raise PlatformError(
                Code.UNAVAILABLE, f"the bus did not take a message: {error!r}", retry_after_s=1.0
            ) from error

    async def consume(
        self,
        subject: str,
        *,
        durable: str,
        handler: Handler,
        max_deliver: int = 5,
        ack_wait_s: float = 30.0,
        concurrency: int = 1,
        backoff_s: Sequence[float] = (1.0, 5.0, 15.0),
        deliver_new_only: bool = False,
    ) -> None:
        stream = self._stream_of(subject)
        config = ConsumerConfig(
            durable_name=durable,
            filter_subject=subject,
            ack_policy=AckPolicy.EXPLICIT,
            ack_wait=ack_wait_s,
            max_deliver=-1,  # counted here, so that the last failure leaves a dead letter and not silence
            max_ack_pending=_MAX_PENDING,
            deliver_policy=DeliverPolicy.NEW if deliver_new_only else DeliverPolicy.ALL,
        )
        consumer = _Consumer(self, subject, durable, handler, max_deliver, ack_wait_s, tuple(backoff_s))
        async with asyncio.TaskGroup() as group:
            for _ in range(concurrency):
                group.create_task(self._pull(stream, durable, config, consumer))
            group.create_task(self._watch_backlog(stream, durable))

    async def _pull(self, stream: str, durable: str, config: ConsumerConfig, consumer: "_Consumer") -> None:
        while True:
            _end_if_cancelled()
            subscription = None
            try:
                await self._ready.wait()
                await self._client.jsm(timeout=_ANSWER_TIMEOUT_S).add_consumer(stream, config)
                subscription = await self._client.jetstream().pull_subscribe_bind(consumer=durable, stream=stream)
                while self.connected:
                    with contextlib.suppress(nats.errors.TimeoutError, asyncio.TimeoutError):
                        for message in await subscription.fetch(1, timeout=_FETCH_TIMEOUT_S):
                            _end_if_cancelled()  # untouched: it comes to the next worker
                            await consumer.take(message)
                    _end_if_cancelled()
            except (nats.errors.Error, OSError) as error:
                log.warning("consumer lost its subscription", extra={"consumer": durable, "error": repr(error)})
                await asyncio.sleep(_RETRY_S)
            finally:
                if subscription is not None:
                    with contextlib.suppress(nats.errors.Error, OSError):
                        await subscription.unsubscribe()

    async def _watch_backlog(self, stream: str, durable: str) -> None:
        while True:
            await self._ready.wait()
            # The consumer may not stand yet, or the server be away: the last count is the best there is.
            with contextlib.suppress(TimeoutError, nats.errors.Error, OSError):
                info = await self._client.jsm(timeout=_ANSWER_TIMEOUT_S).consumer_info(stream, durable)
                self._backlogs[durable] = (info.num_pending or 0) + (info.num_ack_pending or 0)
            await asyncio.sleep(_BACKLOG_POLL_S)

    def _stream_of(self, subject: str) -> str:
        for spec in self._streams:
            if any(_matches(pattern, subject) for pattern in spec.subjects):
                return spec.name
        raise ValueError(f"no stream carries {subject}")

    async def broadcast(self, subject: str, payload: bytes) -> None:
        if not self._client.is_connected:
            raise PlatformError(Code.UNAVAILABLE, "the bus is not connected", retry_after_s=1.0)
        await self._client.publish(subject, payload)

    async def listen(self, subject: str, handler: Handler) -> None:
        while True:
            await self._ready.wait()
            try:
                await self._listen(subject, handler)
            except nats.errors.Error as error:
                log.warning("listener lost its subscription", extra={"subject": subject, "error": repr(error)})
            await asyncio.sleep(_RETRY_S)

    async def _listen(self, subject: str, handler: Handler) -> None:
        """Returns when the client was closed and another takes its place; a reconnect does not end it."""
        subscription = await self._client.subscribe(subject, pending_msgs_limit=1024)
        try:
            async for message in subscription.messages:
                try:
                    await handler(Received(subject, message.data, "", 1, message.headers or {}))
                except Exception:
                    log.exception("broadcast was not handled", extra={"subject": subject})
        finally:
            with contextlib.suppress(nats.errors.Error, OSError):
                await subscription.unsubscribe()

    async def close(self) -> None:
        self._closing = True
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._client.is_connected:
            with contextlib.suppress(nats.errors.Error, asyncio.TimeoutError, OSError):
                async with asyncio.timeout(_ANSWER_TIMEOUT_S):
                    await self._client.close()


@dataclass(frozen=True, slots=True)
class _Consumer:
    """One durable consumer: runs the handler and answers the server for it."""

    bus: NatsBus
    subject: str
    durable: str
    handler: Handler
    max_deliver: int
    ack_wait_s: float
    backoff_s: tuple[float, ...]

    async def take(self, message: Msg) -> None:
        headers = dict(message.headers or {})
        received = Received(
            message.subject, message.data, headers.get(MESSAGE_ID, ""), message.metadata.num_delivered, headers
        )
        if received.num_delivered > self.max_deliver:  # it took the process down with it each time
            await self._bury(message, received, "delivered too often")
            return
        heartbeat = asyncio.create_task(self._keep_alive(message))
        try:
            error = await self._handle(received)
        except asyncio.CancelledError:  # this process stops: another may have it at once, not after ack_wait
            with contextlib.suppress(nats.errors.Error, OSError):
                await message.nak()
            raise
        finally:
            heartbeat.cancel()
        if error is None:
            await self._ack(message)
        elif self._hopeless(error) or received.num_delivered >= self.max_deliver:
            await self._bury(message, received, repr(error))
        else:
            delay_s = self.backoff_s[min(received.num_delivered, len(self.backoff_s)) - 1] if self.backoff_s else 0.0
            await message.nak(delay=delay_s)
            self._count("retry")

    async def _ack(self, message: Msg) -> None:
        try:
            await message.ack_sync(timeout=_ANSWER_TIMEOUT_S)
        except (TimeoutError, nats.errors.Error, OSError) as error:  # done, but it may come again
            log.warning("ack was not confirmed", extra={"consumer": self.durable, "error": repr(error)})
            self._count("unconfirmed")
            return
        self._count("ack")

    async def _handle(self, received: Received) -> Exception | None:
        """Runs the handler in the publisher's trace and request; returns what it raised."""
        span = telemetry.tracer().start_span(
            f"{self.durable} {received.subject}",
            context=telemetry.parent_from(received.headers),
            kind=trace.SpanKind.CONSUMER,
        )
        span.set_attribute("messaging.message.id", received.message_id)
        span.set_attribute("messaging.delivery", received.num_delivered)
        request = context.RequestContext(request_id=received.headers.get(REQUEST_ID, ""))
        with trace.use_span(span, end_on_exit=True, record_exception=False), context.use(request):
            try:
                await self.handler(received)
            except Exception as error:
                expected = isinstance(error, PlatformError)
                log.log(
                    logging.WARNING if expected else logging.ERROR,
                    "message was not handled",
                    exc_info=None if expected else error,
                    extra={"consumer": self.durable, "error": repr(error), "delivery": received.num_delivered},
                )
                span.set_status(trace.StatusCode.ERROR, repr(error)[:200])
                return error
        return None

    async def _keep_alive(self, message: Msg) -> None:
        while True:
            await asyncio.sleep(self.ack_wait_s / 3)
            try:
                await message.in_progress()
            except (nats.errors.Error, OSError) as error:  # the handler goes on; the message may come again
                log.debug("heartbeat failed", extra={"consumer": self.durable, "error": repr(error)})

    async def _bury(self, message: Msg, received: Received, error: str) -> None:
        headers = {
            MESSAGE_ID: f"dead-{self.durable}-{received.message_id or message.metadata.sequence.stream}",
            "Pressroom-Consumer": self.durable,
            "Pressroom-Error": " ".join(error.split())[:500],
            "Pressroom-Delivered": str(received.num_delivered),
        }
        if "traceparent" in received.headers:
            headers["traceparent"] = received.headers["traceparent"]
        try:
            await self.bus._store(DEAD_PREFIX + received.subject, received.payload, headers, _ANSWER_TIMEOUT_S)
        except PlatformError as lost:  # not buried, so not finished either: it comes again
            log.warning("dead letter could not be stored", extra={"consumer": self.durable, "error": repr(lost)})
            await message.nak(delay=_RETRY_S)
            return
        log.error("message became a dead letter", extra={"consumer": self.durable, "error": error})
        await message.term()
        self._count("dead")

    @staticmethod
    def _hopeless(error: Exception) -> bool:
        return isinstance(error, PlatformError) and not error.retryable

    def _count(self, outcome: str) -> None:
        metrics.BUS_MESSAGES.labels(self.bus._name, self.durable, outcome).inc()


def _end_if_cancelled() -> None:
    """Raises CancelledError in a task that was cancelled and does not know it.

    The client waits with asyncio.wait_for, which in Python 3.11 drops a cancellation that arrives with the answer.
    """
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError


def _matches(pattern: str, subject: str) -> bool:
    """Tells whether a stream's subject pattern covers a subject or a narrower pattern."""
    wanted, given = pattern.split("."), subject.split(".")
    for i, token in enumerate(wanted):
        if token == ">":
            return len(given) > i
        if i >= len(given) or (token not in ("*", given[i])):
            return False
    return len(wanted) == len(given)


def _stream_config(spec: Stream) -> StreamConfig:
    return StreamConfig(
        name=spec.name,
        subjects=list(spec.subjects),
        retention=RetentionPolicy.WORK_QUEUE if spec.retention == "workqueue" else RetentionPolicy.LIMITS,
        # A work queue refuses new jobs when full (the outbox keeps them); a log lets the oldest facts go.
        discard=DiscardPolicy.NEW if spec.retention == "workqueue" else DiscardPolicy.OLD,
        max_age=spec.max_age_s,
        max_bytes=spec.max_bytes,
        storage=StorageType.FILE,
        duplicate_window=min(120.0, spec.max_age_s) if spec.max_age_s else 120.0,
    )
