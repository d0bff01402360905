"""Profiles the samples that wait, one batch after the other, and says how far behind it is.

Knows nothing of the bus, the disk or the profiler's process. A sample that the profiler dies over goes on alone, and
is skipped when it dies again: one bad text stops neither its neighbours nor the service.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Protocol

from chassis.errors import PlatformError
from monitor.core.profiles import (
    Added,
    Batch,
    Profiled,
    Profiler,
    ProfilerDied,
    ProfilerUnavailable,
    Profiles,
    Statistics,
    Waiting,
)
from monitor.core.samples import Sample

log = logging.getLogger(__name__)

MAX_DEATHS = 2
MAX_BATCH = 16
# Whoever sends requests to many models in many windows must not fill the disk: about 0.1 MB each, at most.
MAX_PROFILES = 4_000
_PRUNE_EVERY_S = 60.0
_FIRST_RETRY_S, _LAST_RETRY_S = 1.0, 60.0


class Gauges(Protocol):
    """Where the profiling tells how it goes."""

    def sampled(self, outcome: str, num: int = 1) -> None:
        """Counts samples: "profiled", "dropped" (too many waited), "skipped" (no profile could be made), "expired"."""
        ...

    def profiled(self, model: str, statistics: Statistics, duration_s: float) -> None:
        """Tells of a batch that was added to the newest profile of a model, and how long that took."""
        ...


class Profiling:
    """Takes samples in and profiles them. `run` runs for the life of the process."""

    def __init__(
        self,
        waiting: Waiting,
        profiles: Profiles,
        profiler: Profiler,
        gauges: Gauges,
        *,
        kept_s: int,
        idle_s: float,
        unix_time: Callable[[], float] = time.time,
    ) -> None:
        """kept_s: age at which a window is forgotten. idle_s: the profiler is stopped after so long without work."""
        self._waiting = waiting
        self._profiles = profiles
        self._profiler = profiler
        self._gauges = gauges
        self._kept_s = kept_s
        self._idle_s = idle_s
        self._unix_time = unix_time
        self._came = asyncio.Event()
        self._next_prune_s = 0.0
        self.num_dropped = 0

    @property
    def num_waiting(self) -> int:
        """Samples that wait."""
        return self._waiting.num_waiting

    @property
    def lag_s(self) -> float:
        """Seconds since the end of the request that waits longest; 0 where none waits."""
        oldest = self._waiting.oldest_ended_unix_s
        return 0.0 if oldest is None else max(0.0, self._unix_time() - oldest)

    async def admit(self, sample: Sample) -> None:
        """Returns once the sample is on disk, or is left out; raises PlatformError(UNAVAILABLE) for a sick disk."""
        if sample.window_start_unix_s < self._oldest_start_unix_s():
            self._gauges.sampled("expired")
            return
        added = await self._waiting.add(sample)
        if added is Added.DROPPED:
            self.num_dropped += 1
            self._gauges.sampled("dropped")
        elif added is Added.WAITING:
            self._came.set()

    async def run(self) -> None:
        """Profiles whatever waits until cancelled. Failures of the disk or the profiler delay it and end nothing."""
        retry_s = _FIRST_RETRY_S
        try:
            while True:
                try:
                    await self._step()
                    retry_s = _FIRST_RETRY_S
                except (PlatformError, ProfilerUnavailable) as error:
                    log.error("profiling is held up", extra={"error": str(error), "retry_s": retry_s})
                    await asyncio.sleep(retry_s)
                    retry_s = min(2 * retry_s, _LAST_RETRY_S)
        finally:
            await self._profiler.stop()

    async def _step(self) -> None:
        self._came.clear()
        await self._prune()
        batch = await self._waiting.next_batch(MAX_BATCH)
        if batch is None:
            await self._rest()
        else:
            await self._profile(batch)

    async def _profile(self, batch: Batch) -> None:
        started_at = time.perf_counter()
        try:
            profiled = await self._profiler.profile(batch.binary, batch.texts)
        except ProfilerDied as error:
            num_skipped = await self._waiting.charge(batch, MAX_DEATHS)
            log.warning(
                "profiler died", extra={"error": str(error), "num_samples": len(batch.keys), "num_skipped": num_skipped}
            )
            self._gauges.sampled("skipped", num_skipped)
            return
        await self._waiting.finish(batch, profiled)
        self._tell(batch, profiled, time.perf_counter() - started_at)

    def _tell(self, batch: Batch, profiled: Profiled, duration_s: float) -> None:
        self._gauges.sampled("skipped", len(profiled.failed))
        self._gauges.sampled("profiled", len(batch.keys) - len(profiled.failed))
        is_newest = batch.window_start_unix_s + batch.window_s > self._unix_time() - batch.window_s
        self._gauges.profiled(batch.model, profiled.statistics if is_newest else {}, duration_s)

    async def _rest(self) -> None:
        """Waits for a sample; stops the profiler meanwhile, for it holds a few hundred MB."""
        idle_until = time.monotonic() + self._idle_s
        while not self._came.is_set():
            left_s = idle_until - time.monotonic()
            if left_s <= 0:
                await self._profiler.stop()
                left_s = _PRUNE_EVERY_S
            try:
                async with asyncio.timeout(min(left_s, _PRUNE_EVERY_S)):
                    await self._came.wait()
            except TimeoutError:
                await self._prune()

    async def _prune(self) -> None:
        if time.monotonic() >= self._next_prune_s:
            self._next_prune_s = time.monotonic() + _PRUNE_EVERY_S
            await self._profiles.prune(self._oldest_start_unix_s(), MAX_PROFILES)

    def _oldest_start_unix_s(self) -> int:
        return int(self._unix_time()) - self._kept_s
