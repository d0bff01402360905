"""Whether the services answer that models need, asked at most once in a while however many want to know."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence

from chassis.errors import PlatformError

Probe = Callable[[], Awaitable[object]]


class Readiness:
    """Remembers the last answer for ttl_s, so that open health routes cost nobody anything."""

    def __init__(
        self, probes: Sequence[Probe], *, ttl_s: float = 1.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._probes = tuple(probes)
        self._ttl_s = ttl_s
        self._clock = clock
        self._lock = asyncio.Lock()
        self._good_until_s = float("-inf")
        self._is_ready = False

    async def check(self) -> bool:
        """Says whether all services answered."""
        async with self._lock:
            if self._clock() >= self._good_until_s:
                self._is_ready = await self._probe()
                self._good_until_s = self._clock() + self._ttl_s
            return self._is_ready

    async def _probe(self) -> bool:
        try:
            await asyncio.gather(*(probe() for probe in self._probes))
        except PlatformError:
            return False
        return True
