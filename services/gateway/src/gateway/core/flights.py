"""One run of a model that several requests read: each from its beginning, then as it goes on.

The run is a task of its own, so that it belongs to no reader: it goes on while somebody reads, and is stopped when
nobody does. Knows nothing of models, caches or clients.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing

from chassis.errors import Code, PlatformError
from gateway.core.graph import Deadline, GraphEvent

_MAX_AHEAD = 256  # events that the run may be before its fastest reader: then it waits, as it would without us
_MAX_KEPT = 8192  # events that are kept for readers who come later or read slowly
_LATE_S = 0.01
_NUM_DROPPED_AT_ONCE = _MAX_KEPT // 4

Source = Callable[["Flight"], AsyncGenerator[GraphEvent]]


class Private(Exception):
    """The run has turned out to be for its first reader alone."""


class Flight:
    """A run and what it has said so far. Whoever makes it, in a running loop, must read() it at once.

    on_closed is called when it can no longer be joined: it has ended, or does not remember its beginning any more.
    """

    def __init__(self, source: Source, on_closed: Callable[["Flight"], None]) -> None:
        self.is_admitted = False  # the source says so: what fails before is the affair of the request that leads
        self._on_closed = on_closed
        self._events: list[GraphEvent] = []
        self._num_dropped = 0
        self._positions: dict[object, int] = {}  # the next event of each reader
        self._leader: object | None = None  # who read first
        self._is_private = False
        self._error: Exception | None = None
        self._has_ended = False
        self._waiting: list[asyncio.Future[None]] = []  # readers who have read everything so far
        self._room = asyncio.Event()
        self._task = asyncio.create_task(self._run(source), name="flight")

    @property
    def events(self) -> Sequence[GraphEvent]:
        """All that it has said; nothing where it has forgotten its beginning."""
        return () if self._num_dropped else self._events

    async def read(self, deadline: Deadline) -> AsyncGenerator[GraphEvent]:
        """Streams the run from its beginning; the caller closes it.

        Raises what the run raises, DEADLINE_EXCEEDED at the reader's own deadline, and OVERLOADED where the reader is
        so much slower than another that what it needs is no longer there. Raises Private before the first event.
        """
        reader = object()
        self._leader = self._leader or reader
        self._positions[reader] = 0
        # One timer for all that is waited for: one for each event would cost more than the event. A little late, so
        # that the deadline has passed by the clock that judges it.
        late_s = max(0.0, deadline.at_s - time.monotonic()) + _LATE_S
        late = asyncio.get_running_loop().call_later(late_s, self._wake)
        try:
            while True:
                if self._is_private and reader is not self._leader:
                    raise Private
                place = self._positions[reader] - self._num_dropped
                if place < 0:
                    raise PlatformError(Code.OVERLOADED, "the answer was read too slowly", reason="slow_reader")
                if place < len(self._events):
                    self._positions[reader] += 1
                    self._room.set()
                    yield self._events[place]
                elif self._has_ended:
                    if self._error is not None:
                        raise _again(self._error)
                    return
                else:
                    await self._news()
                    deadline.remaining_s()
        finally:
            late.cancel()
            del self._positions[reader]
            self._room.set()
            if not self._positions:
                self._on_closed(self)
                self._task.cancel()  # does nothing where the run has ended

    def make_private(self) -> None:
        """From now on it is its first reader's alone; to be called before the first event."""
        self._is_private = True
        self._on_closed(self)
        self._wake()

    async def ended(self) -> None:
        """Returns when the run has ended and let go of everything that it held."""
        await asyncio.wait({self._task})

    async def _run(self, source: Source) -> None:
        try:
            async with aclosing(source(self)) as events:
                async for event in events:
                    self._keep(event)
                    while self._is_far_ahead():
                        self._room.clear()
                        await self._room.wait()
        except Exception as error:  # handed to the readers, who raise it
            self._error = error
        finally:
            self._has_ended = True
            self._on_closed(self)
            self._wake()

    async def _news(self) -> None:
        waiting = asyncio.get_running_loop().create_future()
        self._waiting.append(waiting)
        await waiting

    def _wake(self) -> None:
        for waiting in self._waiting:
            if not waiting.done():  # the reader may have been cancelled
                waiting.set_result(None)
        self._waiting.clear()

    def _keep(self, event: GraphEvent) -> None:
        self._events.append(event)
        if len(self._events) > _MAX_KEPT:
            del self._events[:_NUM_DROPPED_AT_ONCE]
            self._num_dropped += _NUM_DROPPED_AT_ONCE
            self._on_closed(self)
        self._wake()

    def _is_far_ahead(self) -> bool:
        return self._num_dropped + len(self._events) - max(self._positions.values(), default=0) >= _MAX_AHEAD


def _again(error: Exception) -> Exception:
    """An error of the reader's own: each tells it in the words of its API."""
    if not isinstance(error, PlatformError):
        return error
    return PlatformError(
        error.code,
        error.message,
        retryable=error.retryable,
        param=error.param,
        reason=error.reason,
        retry_after_s=error.retry_after_s,
    )
