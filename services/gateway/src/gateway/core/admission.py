"""Admission: the last stage before a model works. Who waits, for how long, who goes next, and who is refused at once.

A backend is given as much at once as it begins with at once (core.capacity); the rest waits here, in a bounded queue
that is fair between tenants in tokens (core.fair_queue). What cannot be answered in time is refused when it arrives and
not after it has waited: a queue that only grows makes every answer late, and late answers are work for nothing.

Requests of jobs (priority below 0) go on when no person waits, and hold a part of the places at most.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

from chassis.errors import Code, PlatformError
from gateway.core.capacity import Capacity
from gateway.core.estimate import Guesses, Pace
from gateway.core.fair_queue import Entry, FairQueue
from gateway.core.graph import Deadline
from gateway.core.serving import Ask

_BACKGROUND_PART = 4  # of so many places one is for the background
_WIDEST_PART = 2  # of so many places a request has one at most, or it would wait until nothing else runs
_NEVER = Deadline(float("inf"))
_MARGIN = 1.25  # waits and work may take so much longer than the last requests' did
_LEAST_RETRY_S, _MOST_RETRY_S = 1.0, 60.0


class Cause(StrEnum):
    """Why a request was shed."""

    FULL = "full"  # the queue, and its tenant is not the one to be preferred
    WAIT = "wait"  # it would have waited longer than is allowed
    DEADLINE = "deadline"  # its answer would have come after its deadline


class AdmissionMeter(Protocol):
    """Is told what happens at one backend's queue."""

    def admitted(self, wait_s: float) -> None:
        """A request goes on after so long."""
        ...

    def shed(self, cause: Cause) -> None:
        """A request was refused."""
        ...


@dataclass(frozen=True, slots=True)
class QueueBounds:
    """Most requests that wait, and the longest that a person's may wait."""

    max_waiting: int
    max_wait_s: float


@dataclass(eq=False, slots=True)
class _Place(Entry):
    """A request's place: in the queue, then in the backend."""

    width: int = 1  # sequences that it runs at once
    deadline: Deadline = _NEVER
    held: int = 0  # of the backend's; 0 while it waits
    refusal: PlatformError | None = None  # it waited and had to make room
    turn: "asyncio.Future[None]" = field(default_factory=lambda: asyncio.get_running_loop().create_future())

    @property
    def is_background(self) -> bool:
        return self.priority < 0


class Lane:
    """The way to one backend: its queue and what runs there."""

    def __init__(
        self,
        backend: str,
        capacity: Capacity,
        bounds: QueueBounds,
        meter: AdmissionMeter,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.backend = backend
        self.capacity = capacity
        self._bounds = bounds
        self._meter = meter
        self._clock = clock
        self._queue = FairQueue[_Place]()
        self._guesses = Guesses()
        self._pace = Pace()
        self._running = {False: 0, True: 0}  # sequences, by whether they are of the background

    @property
    def num_waiting(self) -> int:
        """Requests that wait."""
        return len(self._queue)

    @property
    def num_running(self) -> int:
        """Sequences that the backend was given."""
        return sum(self._running.values())

    @asynccontextmanager
    async def hold(self, ask: Ask) -> AsyncIterator[None]:
        """Waits for the request's turn and holds its place; raises OVERLOADED or DEADLINE_EXCEEDED."""
        size = self._guesses.guess(ask)
        weight = ask.principal.tenant_policy.weight
        place = _Place(ask.principal.tenant, ask.priority, size.tokens, weight, size.width, ask.deadline)
        arrived_s = self._clock()
        await self._enter(place)
        admitted_s = self._clock()
        self._meter.admitted(admitted_s - arrived_s)
        is_whole = False
        try:
            yield
            is_whole = True
        finally:
            usage = ask.account.usage
            used = usage.prompt_tokens + usage.completion_tokens
            if is_whole and used:  # what was cut off tells little of how long a request takes
                self._guesses.learn(ask, usage)
                self._pace.learn(used, (self._clock() - admitted_s) * place.held)
                self.capacity.ended_well()
            self._leave(place, used)

    async def _enter(self, place: _Place) -> None:
        left_s = place.deadline.remaining_s()
        self._refuse_what_comes_too_late(place, left_s)
        self._make_room(place)
        self._queue.add(place)
        try:
            self._let_on()
            if place.held:
                return
            async with asyncio.timeout(min(left_s, self._longest_wait_s(place))):
                await place.turn
            if place.refusal is not None:
                raise place.refusal
        except TimeoutError:
            self._withdraw(place)
            place.deadline.remaining_s()  # raises where it is the request's own time that is up
            raise self._shed(Cause.WAIT, place) from None
        except BaseException:
            self._withdraw(place)
            raise

    def _longest_wait_s(self, place: _Place) -> float:
        return float("inf") if place.is_background else self._bounds.max_wait_s

    def _refuse_what_comes_too_late(self, place: _Place, left_s: float) -> None:
        if not self._queue and self._has_room(place):
            return
        wait_s = self._expected_wait_s(place)
        if wait_s > self._longest_wait_s(place):
            raise self._shed(Cause.WAIT, place)
        # With a margin for the wait too: who is refused should hear it now, and not when its turn comes too late.
        if _MARGIN * wait_s + self._work_s(place) > left_s:
            raise self._shed(Cause.DEADLINE, place)

    def _work_s(self, place: _Place) -> float:
        return _MARGIN * self._pace.work_s(place.cost) / place.width

    def _expected_wait_s(self, place: _Place) -> float:
        """Until those before it have gone on, and one of those who run has ended."""
        return self._pace.work_s(self._queue.ahead(place) + self._guesses.mean_tokens) / self.capacity.limit

    def _make_room(self, place: _Place) -> None:
        """Sheds one where the queue is full: who has most there makes room for the others."""
        if len(self._queue) < self._bounds.max_waiting:
            return
        last = self._queue.last()
        assert last is not None
        if place.priority < last.priority or (place.priority, place.tenant) == (last.priority, last.tenant):
            raise self._shed(Cause.FULL, place)
        self._push_out(last, Cause.FULL)

    def _push_out(self, place: _Place, cause: Cause) -> None:
        place.refusal = self._shed(cause, place)
        self._queue.drop(place)
        _wake(place)

    def _shed(self, cause: Cause, place: _Place) -> PlatformError:
        self._meter.shed(cause)
        return PlatformError(
            Code.OVERLOADED,
            f"more is asked than can be answered in time: {len(self._queue)} requests wait",
            reason="overloaded",
            retry_after_s=min(max(self._expected_wait_s(place), _LEAST_RETRY_S), _MOST_RETRY_S),
        )

    def _let_on(self) -> None:
        """Gives the free places to those whose turn it is."""
        while (place := self._queue.first()) is not None and self._has_room(place):
            if len(self._queue) > 1 and time.monotonic() + self._work_s(place) > place.deadline.at_s:
                self._push_out(place, Cause.DEADLINE)  # it waited longer than was expected: the next may be in time
                continue
            self._queue.take(place)
            place.held = self._width(place)
            self._running[place.is_background] += place.held
            _wake(place)
        self.capacity.is_short = bool(self._queue)

    def _has_room(self, place: _Place) -> bool:
        limit, width = self.capacity.limit, self._width(place)
        if not place.is_background:
            # The backend sets the background back for people, so that they need not wait for its places.
            return self._running[False] + width <= limit
        background = self._running[True] + width
        return self.num_running + width <= limit and background <= max(width, limit // _BACKGROUND_PART)

    def _width(self, place: _Place) -> int:
        return min(place.width, max(1, self.capacity.limit // _WIDEST_PART))

    def _withdraw(self, place: _Place) -> None:
        """Gives up a place, whether it waits or has just been let on; one that made room has none."""
        if place.held:
            self._leave(place, 0)
        elif place.refusal is None:
            self._queue.drop(place)
            self._let_on()  # it may have been too wide for the room that those behind it fit into

    def _leave(self, place: _Place, used: float) -> None:
        self._running[place.is_background] -= place.held
        self._queue.settle(place, used)
        self._let_on()


def _wake(place: _Place) -> None:
    if not place.turn.done():  # else it was cancelled, and withdraws when its task runs
        place.turn.set_result(None)


class Admission:
    """The stage: leads a request through the lane of the backend that its model runs in."""

    def __init__(self, lanes: Mapping[str, Lane], backend_of: Callable[[Ask], str]) -> None:
        self._lanes = lanes
        self._backend_of = backend_of

    def hold(self, ask: Ask) -> AbstractAsyncContextManager[None]:
        """Waits for the request's turn and holds its place; raises OVERLOADED or DEADLINE_EXCEEDED."""
        lane = self._lanes.get(self._backend_of(ask))
        return nullcontext() if lane is None else lane.hold(ask)
