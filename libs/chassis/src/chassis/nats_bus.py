"""The bus on NATS: JetStream for what is stored, core NATS for broadcasts."""

import asyncio
import contextlib
import logging
from collections.abc import Sequence
from typing import Any

import nats
import nats.errors
import nats.js.errors
from nats.aio.client import Client
from nats.js.api import (
    AckPolicy,
    ConsumerConfig,
    DeliverPolicy,
    DiscardPolicy,
    RetentionPolicy,
    StorageType,
    StreamConfig,
)

from chassis import context, telemetry
from chassis.bus import MESSAGE_ID, REQUEST_ID, Handler, Received, Stream, matches
from chassis.errors import Code, PlatformError
from chassis.nats_consumer import ANSWER_TIMEOUT_S, Consumer

log = logging.getLogger(__name__)

_FETCH_TIMEOUT_S = 5.0
_RETRY_S = 0.5
_BACKLOG_POLL_S = 2.0
# Counts messages that wait for their next attempt too: a small number would let a few bad ones hold up all others.
_MAX_PENDING = 10_000


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
        manager = self._client.jsm(timeout=ANSWER_TIMEOUT_S)
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
        consumer = Consumer(
            self._name, self._store, subject, durable, handler, max_deliver, ack_wait_s, tuple(backoff_s)
        )
        async with asyncio.TaskGroup() as group:
            for _ in range(concurrency):
                group.create_task(self._pull(stream, durable, config, consumer))
            group.create_task(self._watch_backlog(stream, durable))

    async def _pull(self, stream: str, durable: str, config: ConsumerConfig, consumer: Consumer) -> None:
        while True:
            _end_if_cancelled()
            subscription = None
            try:
                await self._ready.wait()
                await self._client.jsm(timeout=ANSWER_TIMEOUT_S).add_consumer(stream, config)
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
                info = await self._client.jsm(timeout=ANSWER_TIMEOUT_S).consumer_info(stream, durable)
                self._backlogs[durable] = (info.num_pending or 0) + (info.num_ack_pending or 0)
            await asyncio.sleep(_BACKLOG_POLL_S)

    def _stream_of(self, subject: str) -> str:
        for spec in self._streams:
            if any(matches(pattern, subject) for pattern in spec.subjects):
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
                async with asyncio.timeout(ANSWER_TIMEOUT_S):
                    await self._client.close()


def _end_if_cancelled() -> None:
    """Raises CancelledError in a task that was cancelled and does not know it.

    The client waits with asyncio.wait_for, which in Python 3.11 drops a cancellation that arrives with the answer.
    """
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError


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
