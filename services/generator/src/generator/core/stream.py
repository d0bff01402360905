"""The way back from the engine's thread to the one task that reads a request's events."""

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Iterable

from generator.core.events import Delta, Done, Event, Summary

OnSettled = Callable[[Summary], None]


class TokenStream:
    """Events of one request, in order; one task on the engine's loop iterates it, once.

    It is bounded by the request itself: deltas of a reader that lags are merged, so that it never holds more than one
    completion's text for each of the n completions. The engine never waits for a reader.
    """

    def __init__(self, cancel: Callable[[], None]) -> None:
        self._cancel = cancel
        self._lock = threading.Lock()
        self._events: deque[Event] = deque()
        self._error: Exception | None = None
        self._is_closed = False
        self._wakeup = asyncio.Event()

    def cancel(self) -> None:
        """Ends the request at the next step; its blocks are free then. Harmless after the end."""
        self._cancel()

    def __aiter__(self) -> "TokenStream":
        return self

    async def __anext__(self) -> Event:
        """Returns the next event; raises what ended the request early."""
        while True:
            self._wakeup.clear()
            with self._lock:
                if self._events:
                    return self._events.popleft()
                if self._error is not None:
                    raise self._error
                if self._is_closed:
                    raise StopAsyncIteration
            await self._wakeup.wait()

    # The engine's side: called from its thread.

    def push(self, events: Iterable[Event]) -> None:
        """Adds events; the reader is not woken before `wake`."""
        with self._lock:
            for event in events:
                last = self._events[-1] if self._events else None
                if isinstance(event, Delta) and isinstance(last, Delta) and last.index == event.index:
                    self._events[-1] = Delta(
                        event.index,
                        last.text + event.text,
                        last.token_ids + event.token_ids,
                        last.logprobs + event.logprobs,
                    )
                else:
                    self._events.append(event)
                self._is_closed = self._is_closed or isinstance(event, Done)

    def fail(self, error: Exception) -> None:
        """Ends the stream with an error, after what was pushed before."""
        with self._lock:
            self._error = error

    def wake(self) -> None:
        """Wakes the reader; called on the loop."""
        self._wakeup.set()
