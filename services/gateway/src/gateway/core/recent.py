"""A small cache of what was read a moment ago, for what is asked with every request and may change at any time.

Knows nothing of what it keeps.
"""

import asyncio
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

V = TypeVar("V")

_NUM_LOCKS = 64


@dataclass(frozen=True, slots=True)
class Entry(Generic[V]):
    """What was read, and until when it is good."""

    good_until_s: float
    value: V


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
        self._kept: OrderedDict[str, Entry[V]] = OrderedDict()
        self._epoch = 0
        # Striped: many requests that miss one name together read it once.
        self._locks = tuple(asyncio.Lock() for _ in range(_NUM_LOCKS))

    def __len__(self) -> int:
        return len(self._kept)

    async def get(self, name: str) -> V:
        """Returns what stands under the name; raises what reading it raises."""
        entry = self.kept(name)
        return entry.value if entry else await self.read(name, None)

    def kept(self, name: str) -> Entry[V] | None:
        """Returns what is remembered and still good."""
        entry = self._kept.get(name)
        if entry is not None and entry.good_until_s <= self._clock():
            del self._kept[name]
            return None
        return entry

    async def read(self, name: str, seen: Entry[V] | None) -> V:
        """Reads anew, or takes what somebody else has read since the caller saw `seen`; raises what reading raises."""
        async with self._locks[hash(name) % _NUM_LOCKS]:
            entry = self.kept(name)
            if entry is not None and entry is not seen:
                return entry.value
            epoch, read_at_s = self._epoch, self._clock()
            value = await self._read(name)
            if epoch == self._epoch:
                self._kept[name] = Entry(read_at_s + self._ttl_s, value)
                while len(self._kept) > self._max_kept:
                    self._kept.popitem(last=False)
            return value

    def forget(self, is_meant: Callable[[str, V], bool]) -> None:
        """Drops what is meant; what is being read at this moment is not kept either."""
        self._epoch += 1
        for name in [name for name, entry in self._kept.items() if is_meant(name, entry.value)]:
            del self._kept[name]
