"""Batches texts across callers, for a runtime that computes one batch at a time.

While a batch is computed the next one gathers. Texts of like length go together, so that little is padded. The queue
is bounded, and a text whose caller has left is not computed.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

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


@dataclass(slots=True)
class _Waiting:
    ids: list[int]
    done: asyncio.Future[Floats] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


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

    async def embed(self, inputs: Sequence[list[int]]) -> list[Floats]:
        """Returns one vector [H] for each list of token ids, in order. Raises PlatformError(OVERLOADED)."""
        if len(self._queue) + len(inputs) > self._limits.max_queued:
            raise PlatformError(Code.OVERLOADED, f"{len(self._queue)} texts wait already", retry_after_s=1.0)
        waiting = [_Waiting(ids) for ids in inputs]
        self._queue.extend(waiting)
        self._arrived.set()
        try:
            return list(await asyncio.gather(*(w.done for w in waiting)))
        except asyncio.CancelledError:
            for one in waiting:
                one.done.cancel()
            raise

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
        self._queue = [w for w in self._queue if not w.done.done()]
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
        try:
            vectors = await self._compute([w.ids for w in batch])
        except asyncio.CancelledError:
            for one in batch:
                one.done.cancel()
            raise
        except PlatformError as error:
            self._fail(batch, error)
        except Exception as error:  # the runtime's own errors: theirs are many kinds, ours is one
            self._fail(batch, PlatformError(Code.INTERNAL, f"the encoder failed: {error}"))
        else:
            for one, vector in zip(batch, vectors, strict=True):
                if not one.done.done():
                    one.done.set_result(vector)

    @staticmethod
    def _fail(batch: list[_Waiting], error: PlatformError) -> None:
        for one in batch:
            if not one.done.done():
                one.done.set_exception(error)
