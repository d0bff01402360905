"""A clock that moves only when a test moves it."""

import asyncio
import heapq
import itertools


class FakeClock:
    """Stands in for time.monotonic or time.time (call it) and for asyncio.sleep (its sleep method)."""

    def __init__(self, now_s: float = 0.0) -> None:
        self.now_s = now_s
        self._sleepers: list[tuple[float, int, asyncio.Future[None]]] = []
        self._order = itertools.count()

    def __call__(self) -> float:
        return self.now_s

    @property
    def num_sleepers(self) -> int:
        """Sleepers that still wait: lets a test see that the code under test has reached its sleep."""
        return sum(not future.done() for _, _, future in self._sleepers)

    def advance(self, seconds: float) -> None:
        """Moves the time on and wakes whoever is due, earliest first; they run at the caller's next await."""
        assert seconds >= 0
        self.now_s += seconds
        while self._sleepers and self._sleepers[0][0] <= self.now_s:
            future = heapq.heappop(self._sleepers)[2]
            if not future.done():
                future.set_result(None)

    async def sleep(self, seconds: float) -> None:
        """Returns once the time has been moved on by so much."""
        if seconds <= 0:
            await asyncio.sleep(0)
            return
        future = asyncio.get_running_loop().create_future()
        heapq.heappush(self._sleepers, (self.now_s + seconds, next(self._order), future))
        await future
