"""The bus in memory, for unit tests: behaves as BusSuite says, which the real NatsBus is held to as well.

Knows nothing of NATS. Delays go through `sleep`, so a test may shorten them (FakeClock.sleep).
"""

import asyncio
import collections
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field

from opentelemetry import trace

from chassis import context, telemetry
from chassis.bus import DEAD_PREFIX, MESSAGE_ID, REQUEST_ID, Handler, Received, Stream, matches
from chassis.errors import Code, PlatformError
from contracts.subjects import STREAMS


@dataclass(frozen=True, slots=True)
class Stored:
    """One message as a stream keeps it."""

    subject: str
    payload: bytes
    headers: Mapping[str, str]

    @property
    def message_id(self) -> str:
        return self.headers.get(MESSAGE_ID, "")


@dataclass(slots=True)
class _Log:
    """One stream. A work queue forgets what was settled; positions stay."""

    spec: Stream
    messages: list[Stored | None] = field(default_factory=list)
    seen: set[str] = field(default_factory=set)


@dataclass(slots=True)
class _Durable:
    """What a durable consumer remembers. A position is ahead of cursor, ready, in flight or settled."""

    log: _Log
    subject: str
    cursor: int
    start: int
    num_settled: int = 0
    ready: collections.deque[int] = field(default_factory=collections.deque)
    num_delivered: collections.Counter[int] = field(default_factory=collections.Counter)

    def take(self) -> int | None:
        """The next position to deliver, those that come again first."""
        if self.ready:
            return self.ready.popleft()
        while self.cursor < len(self.log.messages):
            position, self.cursor = self.cursor, self.cursor + 1
            message = self.log.messages[position]
            if message is not None and matches(self.subject, message.subject):
                return position
        return None

    def settle(self, position: int) -> None:
        if self.log.spec.retention == "workqueue":
            self.log.messages[position] = None
        else:
            self.num_settled += 1

    @property
    def backlog(self) -> int:
        kept = (m for m in self.log.messages[self.start :] if m is not None)
        return sum(matches(self.subject, m.subject) for m in kept) - self.num_settled


class FakeBus:
    """An in-memory Bus. `go_down` and `come_back` play an absent server."""

    def __init__(
        self, streams: Sequence[Stream] = STREAMS, *, sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
    ) -> None:
        self._logs = [_Log(spec) for spec in streams]
        self._durables: dict[str, _Durable] = {}
        self._listeners: list[tuple[str, asyncio.Queue[Received]]] = []
        self._sleep = sleep
        self._up = True
        self._changed = asyncio.Event()
        self.broadcasts: list[Received] = []
        self.listen_errors: list[Exception] = []  # what listeners raised; they go on, as on the real bus

    # What a test asks and does.

    def stored(self, pattern: str) -> list[Stored]:
        """What streams hold under a subject or pattern, oldest first; settled jobs are gone."""
        return [m for log in self._logs for m in log.messages if m is not None and matches(pattern, m.subject)]

    def go_down(self) -> None:
        """From now on nothing is taken and nothing new is delivered."""
        self._up = False

    def come_back(self) -> None:
        """Ends go_down; nothing was lost."""
        self._up = True
        self._notify()

    # chassis.bus.Bus

    @property
    def connected(self) -> bool:
        return self._up

    @property
    def backlog(self) -> int:
        return sum(durable.backlog for durable in self._durables.values())

    async def publish(
        self, subject: str, payload: bytes, *, message_id: str, traceparent: str | None = None, timeout_s: float = 5.0
    ) -> None:
        self._require_up()
        headers = {MESSAGE_ID: message_id}
        if parent := traceparent if traceparent is not None else telemetry.traceparent():
            headers["traceparent"] = parent
        if request_id := context.current().request_id:
            headers[REQUEST_ID] = request_id
        self._store(Stored(subject, payload, headers))

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
        state = self._durable(subject, durable, deliver_new_only)
        async with asyncio.TaskGroup() as group:

            async def work() -> None:
                while True:
                    position = await self._next(state)
                    delay_s: float | None = 0.0  # None once it is settled; a cancelled handler leaves it at 0
                    try:
                        delay_s = await self._deliver(state, position, durable, handler, max_deliver, backoff_s)
                    finally:
                        if delay_s == 0.0:
                            self._again(state, position)
                    if delay_s:
                        group.create_task(self._again_after(state, position, delay_s))

            for _ in range(concurrency):
                group.create_task(work())

    async def broadcast(self, subject: str, payload: bytes) -> None:
        self._require_up()
        received = Received(subject, payload, "", 1, {})
        self.broadcasts.append(received)
        for pattern, queue in self._listeners:
            if matches(pattern, subject):
                queue.put_nowait(received)

    async def listen(self, subject: str, handler: Handler) -> None:
        queue: asyncio.Queue[Received] = asyncio.Queue(maxsize=1024)
        entry = (subject, queue)
        self._listeners.append(entry)
        try:
            while True:
                received = await queue.get()
                try:
                    await handler(received)
                except Exception as error:
                    self.listen_errors.append(error)
        finally:
            self._listeners.remove(entry)

    async def close(self) -> None:
        self.go_down()

    # Inside.

    def _require_up(self) -> None:
        if not self._up:
            raise PlatformError(Code.UNAVAILABLE, "the bus is not connected", retry_after_s=1.0)

    def _notify(self) -> None:
        woken, self._changed = self._changed, asyncio.Event()
        woken.set()

    def _log_of(self, subject: str) -> _Log | None:
        return next((log for log in self._logs if any(matches(p, subject) for p in log.spec.subjects)), None)

    def _store(self, message: Stored) -> None:
        log = self._log_of(message.subject)
        if log is None:
            raise PlatformError(Code.UNAVAILABLE, f"no stream takes {message.subject}", retry_after_s=1.0)
        if message.message_id not in log.seen:
            log.seen.add(message.message_id)
            log.messages.append(message)
            self._notify()

    def _durable(self, subject: str, name: str, new_only: bool) -> _Durable:
        log = self._log_of(subject)
        if log is None:
            raise ValueError(f"no stream carries {subject}")
        if name not in self._durables:
            if log.spec.retention == "workqueue" and any(d.subject == subject for d in self._durables.values()):
                raise ValueError(f"the work queue {subject} has a consumer of another name")
            start = len(log.messages) if new_only else 0
            self._durables[name] = _Durable(log, subject, start, start)
        return self._durables[name]

    async def _next(self, state: _Durable) -> int:
        while True:
            if self._up and (position := state.take()) is not None:
                return position
            await self._changed.wait()

    def _again(self, state: _Durable, position: int) -> None:
        state.ready.append(position)
        self._notify()

    async def _again_after(self, state: _Durable, position: int, delay_s: float) -> None:
        try:
            await self._sleep(delay_s)
        finally:
            self._again(state, position)

    async def _deliver(
        self,
        state: _Durable,
        position: int,
        durable: str,
        handler: Handler,
        max_deliver: int,
        backoff_s: Sequence[float],
    ) -> float | None:
        """Runs the handler; returns None when the message is settled, else the seconds until it comes again."""
        message = state.log.messages[position]
        assert message is not None
        state.num_delivered[position] += 1
        count = state.num_delivered[position]
        received = Received(message.subject, message.payload, message.message_id, count, message.headers)
        error: Exception | None = None
        if count > max_deliver:
            error = RuntimeError("delivered too often")
        else:
            error = await self._handle(durable, handler, received)
        hopeless = isinstance(error, PlatformError) and not error.retryable
        if error is not None and not hopeless and count < max_deliver:
            return max(backoff_s[min(count, len(backoff_s)) - 1], 1e-3) if backoff_s else 1e-3
        if error is not None:
            self._bury(received, durable, error)
        state.settle(position)
        return None

    @staticmethod
    async def _handle(durable: str, handler: Handler, received: Received) -> Exception | None:
        parent = telemetry.parent_from(received.headers)
        span = telemetry.tracer().start_span(f"{durable} {received.subject}", context=parent)
        request = context.RequestContext(request_id=received.headers.get(REQUEST_ID, ""))
        with trace.use_span(span, end_on_exit=True), context.use(request):
            try:
                await handler(received)
            except Exception as error:
                return error
        return None

    def _bury(self, received: Received, durable: str, error: Exception) -> None:
        headers = {
            MESSAGE_ID: f"dead-{durable}-{received.message_id}",
            "Pressroom-Consumer": durable,
            "Pressroom-Error": repr(error),
            "Pressroom-Delivered": str(received.num_delivered),
        }
        if "traceparent" in received.headers:
            headers["traceparent"] = received.headers["traceparent"]
        self._store(Stored(DEAD_PREFIX + received.subject, received.payload, headers))
