"""Stands before the backends of a service: chooses one, tries another where one fails, leaves alone what fails often.

A request is tried again only before the first token, only where the backend is away, only within the deadline, and only
while the budget lasts. Nothing is ever tried again after an event was passed on. What a backend is, the guard does not
know: it is given how to open a stream or make a call.
"""

import asyncio
import random
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from chassis.errors import Code, PlatformError
from gateway.core.capacity import Capacity
from gateway.core.circuit import Circuit, CircuitState
from gateway.core.graph import until_first_token
from gateway.core.retry_budget import RetryBudget
from gateway.core.services import Abandoned, GenerationEvent

_MOST_TRIES = 3
_FIRST_PAUSE_S = 0.025  # doubled at every try; the pause is a random part of it

B = TypeVar("B")
T = TypeVar("T")


class GuardMeter(Protocol):
    """Is told what becomes of retries: "succeeded", "failed", or "denied" by the budget."""

    def retried(self, outcome: str) -> None:
        """A retry came to this end."""
        ...


@dataclass(eq=False, slots=True)
class Backend(Generic[B]):
    """One of the backends: what to call, and how it does."""

    name: str
    target: B
    breaker: Circuit = field(default_factory=Circuit)
    num_running: int = 0


def is_backends_fault(error: PlatformError) -> bool:
    """Says whether the backend is to blame; what has a `reason` is about the request."""
    return error.code in (Code.UNAVAILABLE, Code.INTERNAL) and error.reason is None


class Guard(Generic[B]):
    """The backends of one service as one."""

    def __init__(
        self,
        service: str,
        backends: Sequence[Backend[B]],
        meter: GuardMeter,
        capacity: Capacity | None = None,
        budget: RetryBudget | None = None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        """`capacity` is told how long they take to begin, and when they have too much to do."""
        assert backends
        self._service = service
        self._backends = tuple(backends)
        self._meter = meter
        self._capacity = capacity
        self._budget = budget or RetryBudget()
        self._sleep = sleep
        self._turn = 0

    async def stream(
        self, open_stream: Callable[[B, float], AsyncGenerator[GenerationEvent]], timeout_s: float
    ) -> AsyncGenerator[GenerationEvent]:
        """Streams what a backend sends; the caller closes it. open_stream: of a target, with the seconds left."""
        tries = self._tries(timeout_s)
        while True:
            backend, is_begun = tries.choose(), False
            try:
                with _asked(backend):
                    async with aclosing(open_stream(backend.target, tries.left_s)) as events:
                        first = await until_first_token(events, self._stopwatch())
                        tries.succeeded(backend)
                        is_begun = True
                        if tries.is_retry:
                            yield Abandoned()
                        for event in first:
                            yield event
                        async for event in events:
                            yield event
                return
            except PlatformError as error:
                if is_begun:
                    raise
                await tries.pause_after(error)

    async def call(self, make_call: Callable[[B, float], Awaitable[T]], timeout_s: float) -> T:
        """Returns what a backend answers. make_call: of a target, with the seconds left."""
        tries = self._tries(timeout_s)
        while True:
            backend = tries.choose()
            try:
                with _asked(backend):
                    answer = await make_call(backend.target, tries.left_s)
            except PlatformError as error:
                await tries.pause_after(error)
            else:
                tries.succeeded(backend)
                return answer

    def choose(self, tried: Sequence[Backend[B]]) -> Backend[B]:
        """The backend for the next try; raises UNAVAILABLE where all are left alone."""
        admitting = self._admitting()
        if not admitting:
            open_s = min(backend.breaker.open_s for backend in self._backends)
            message = f"{self._service} is not available: it failed too often"
            raise PlatformError(Code.UNAVAILABLE, message, retry_after_s=max(1.0, open_s))
        fresh = [backend for backend in admitting if backend not in tried] or admitting
        doubtful = [one for one in fresh if one.breaker.state is CircuitState.HALF_OPEN and one.breaker.admits]
        # A request that could be tried again finds out whether a backend has come back.
        if doubtful and (self._budget.allows or len(doubtful) == len(fresh)):
            return doubtful[0]
        self._turn += 1
        num = len(self._backends)
        return min(
            (backend for backend in fresh if backend not in doubtful),
            key=lambda one: (one.num_running, (self._backends.index(one) + self._turn) % num),
        )

    def _admitting(self) -> list[Backend[B]]:
        """Those that may be asked. Of several at most half are left alone, however they fail."""
        shut = [backend for backend in self._backends if not backend.breaker.admits]
        num_left_alone = max(1, len(self._backends) // 2)
        forced = sorted(shut, key=lambda one: one.breaker.open_s)[: max(0, len(shut) - num_left_alone)]
        return [backend for backend in self._backends if backend not in shut or backend in forced]

    def _tries(self, timeout_s: float) -> "_Tries[B]":
        self._budget.earn()
        return _Tries(self, time.monotonic() + timeout_s)

    def _stopwatch(self) -> Callable[[], None]:
        asked_s = time.monotonic()

        def begun() -> None:
            if self._capacity is not None:
                self._capacity.began(time.monotonic() - asked_s)

        return begun

    async def pause_after(self, error: PlatformError, num_tries: int, left_s: float) -> None:
        """Waits before the next try; raises the error where there is to be none."""
        if error.code is Code.OVERLOADED and error.reason is None and self._capacity is not None:
            self._capacity.refused()
        is_away = error.code is Code.UNAVAILABLE and error.retryable and is_backends_fault(error)
        pause_s = random.uniform(0, _FIRST_PAUSE_S * 2**num_tries)
        if num_tries > 1:
            self._meter.retried("failed")
        if not is_away or num_tries >= _MOST_TRIES or pause_s >= left_s or not self._admitting():
            raise error
        if not self._budget.allows:
            self._meter.retried("denied")
            raise error
        self._budget.spend()
        await self._sleep(pause_s)

    def succeeded(self, backend: Backend[B], num_tries: int) -> None:
        """A backend answered at this try."""
        backend.breaker.succeeded()
        if num_tries > 1:
            self._meter.retried("succeeded")


class _Tries(Generic[B]):
    """The tries of one request."""

    def __init__(self, guard: Guard[B], until_s: float) -> None:
        self._guard = guard
        self._until_s = until_s
        self._tried: list[Backend[B]] = []

    @property
    def is_retry(self) -> bool:
        return len(self._tried) > 1

    @property
    def left_s(self) -> float:
        return self._until_s - time.monotonic()

    def choose(self) -> Backend[B]:
        self._tried.append(self._guard.choose(self._tried))
        return self._tried[-1]

    def succeeded(self, backend: Backend[B]) -> None:
        self._guard.succeeded(backend, len(self._tried))

    async def pause_after(self, error: PlatformError) -> None:
        await self._guard.pause_after(error, len(self._tried), self.left_s)


@contextmanager
def _asked(backend: Backend[B]) -> Iterator[None]:
    """Tells the breaker how it ended, unless it ended well: that is known earlier."""
    backend.num_running += 1
    backend.breaker.ask()
    try:
        yield
    except PlatformError as error:
        if is_backends_fault(error):
            backend.breaker.failed()
        elif error.code is Code.DEADLINE_EXCEEDED:
            backend.breaker.gave_up()  # the client may have given it no time
        else:
            backend.breaker.succeeded()  # it answered that it would not
        raise
    except BaseException:
        backend.breaker.gave_up()
        raise
    finally:
        backend.num_running -= 1
