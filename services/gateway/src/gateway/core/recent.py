"""A small cache of what was read a moment ago, for what is asked with every request and may change at any time.

Knows nothing of what it keeps.
"""

import asyncio
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

V = TypeVar("V")

_NUM_LOCKS = 64


class Recent(Generic[V]):
    """Reads through: what was read is good for ttl_s, counted from before it was read, or until it is forgotten."""

    def __init__(
        self,
        read: Callable[[str], Awaitable[V]],
        *,
        ttl_s: float,
        max_kept: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._read = read
        self._ttl_s = ttl_s
        self._max_kept = max_kept
        self._clock = clock
        self._kept: OrderedDict[str, tuple[float, V]] = OrderedDict()
        self._epoch = 0
        # Striped: many requests that miss one name together read it once.
        self._locks = tuple(asyncio.Lock() for _ in range(_NUM_LOCKS))

    def __len__(self) -> int:
        return len(self._kept)

    async def get(self, name: str) -> V:
        """Returns what stands under the name; raises what reading it raises."""
        if (kept := self._fresh(name)) is not None:
            return kept[1]
        async with self._locks[hash(name) % _NUM_LOCKS]:
            if (kept := self._fresh(name)) is not None:
                return kept[1]
            epoch, read_at = self._epoch, self._clock()
            value = await self._read(name)
            if epoch == self._epoch:
                self._kept[name] = (read_at + self._ttl_s, value)
                while len(self._kept) > self._max_kept:
                    self._kept.popitem(last=False)
            return value

    def forget(self, is_meant: Callable[[str, V], bool]) -> None:
        """Drops what is meant; what is being read at this moment is not kept either."""
        self._epoch += 1
        for name in [name for name, (_, value) in self._kept.items() if is_meant(name, value)]:
            del self._kept[name]

    def _fresh(self, name: str) -> tuple[float, V] | None:
        entry = self._kept.get(name)
        if entry is not None and entry[0] <= self._clock():
            del self._kept[name]
            return None
        return entry
