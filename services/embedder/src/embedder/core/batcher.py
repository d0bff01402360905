"""Batches texts across callers, for a runtime that computes one batch at a time.

While a batch is computed the next one gathers. Texts of like length go together, so that little is padded. The queue
is bounded, and a text whose caller has left is not computed.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from chassis.errors import Code, PlatformError
from embedder.core.pooling import Floats

Compute = Callable[[list[list[int]]], Awaitable[Floats]]


@dataclass(frozen=True, slots=True)
class BatchLimits:
    """How large a batch may grow and how long it may gather."""

    max_texts: int
    max_tokens: int  # padding included
    window_s: float
    max_queued: int


@dataclass(frozen=True, slots=True)
class BatchRun:
    """One run of the encoder: how many texts it took, of however many callers, and when (Unix time)."""

    num_texts: int
    started_ns: int
    ended_ns: int


@dataclass(frozen=True, slots=True)
class Computed:
    """A vector [H] and the run that gave it."""

    vector: Floats
    run: BatchRun


class _Request:
    """The texts of one caller. `done` ends them all: when every vector is there, one failed or the caller has left."""

    def __init__(self, num_texts: int) -> None:
        self.done: asyncio.Future[list[Computed]] = asyncio.get_running_loop().create_future()
        self._num_open = num_texts
        self._computed: dict[int, Computed] = {}

    def deliver(self, place: int, computed: Computed) -> None:
        self._computed[place] = computed
        self._num_open -= 1
        if self._num_open == 0 and not self.done.done():
            self.done.set_result([self._computed[i] for i in range(len(self._computed))])

    def fail(self, error: PlatformError) -> None:
        if not self.done.done():
            self.done.set_exception(error)


@dataclass(frozen=True, slots=True)
class _Waiting:
    ids: list[int]
    request: _Request
    place: int


class Batcher:
    """The queue in front of one encoder. `run` computes until it is cancelled."""

    def __init__(self, compute: Compute, limits: BatchLimits) -> None:
        self._compute = compute
        self._limits = limits
        self._queue: list[_Waiting] = []
        self._arrived = asyncio.Event()

    @property
    def depth(self) -> int:
        """Texts that wait."""
        return len(self._queue)

    async def embed(self, inputs: Sequence[list[int]]) -> list[Computed]:
        """Returns one vector for each list of token ids, in order. Raises PlatformError(OVERLOADED)."""
        if len(self._queue) + len(inputs) > self._limits.max_queued:
            raise PlatformError(Code.OVERLOADED, f"{len(self._queue)} texts wait already", retry_after_s=1.0)
        if not inputs:
            return []
        request = _Request(len(inputs))
        self._queue.extend(_Waiting(ids, request, place) for place, ids in enumerate(inputs))
        self._arrived.set()
        return await request.done  # cancelling the caller cancels this, and so drops what still waits

    async def run(self) -> None:
        """Computes batches for ever. A batch that fails fails its own callers only."""
        while True:
            await self._arrived.wait()
            if 1 < len(self._queue) < self._limits.max_texts:  # a lone text never waits for company
                await asyncio.sleep(self._limits.window_s)
            batch = self._take()
            if batch:
                await self._finish(batch)

    def _take(self) -> list[_Waiting]:
        """Takes the oldest text and those nearest to it in length, within the limits."""
        self._queue = [w for w in self._queue if not w.request.done.done()]
        if not self._queue:
            self._arrived.clear()
            return []
        oldest = self._queue[0]
        nearest = sorted(self._queue, key=lambda w: abs(len(w.ids) - len(oldest.ids)))
        batch: list[_Waiting] = []
        widest = 0
        for one in nearest[: self._limits.max_texts]:
            width = max(widest, len(one.ids))
            if batch and width * (len(batch) + 1) > self._limits.max_tokens:
                break
            batch.append(one)
            widest = width
        taken = set(map(id, batch))
        self._queue = [w for w in self._queue if id(w) not in taken]
        if not self._queue:
            self._arrived.clear()
        return batch

    async def _finish(self, batch: list[_Waiting]) -> None:
        started_ns = time.time_ns()
        try:
            vectors = await self._compute([w.ids for w in batch])
        except asyncio.CancelledError:
            for one in batch:
                one.request.done.cancel()
            raise
        except PlatformError as error:
            self._fail(batch, error)
        except Exception as error:  # the runtime's own errors: theirs are many kinds, ours is one
            self._fail(batch, PlatformError(Code.INTERNAL, f"the encoder failed: {error}"))
        else:
            run = BatchRun(len(batch), started_ns, time.time_ns())
            for one, vector in zip(batch, vectors, strict=True):
                one.request.deliver(one.place, Computed(vector, run))

    @staticmethod
    def _fail(batch: list[_Waiting], error: PlatformError) -> None:
        for one in batch:
            one.request.fail(error)
