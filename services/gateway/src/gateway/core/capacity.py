"""How much a backend is given at once: more while it begins at once, less when what it is given waits there.

Additive increase, multiplicative decrease, as TCP does it. Behind the backend's own queue nothing is fair any more, so
that the queue is kept here; a small one there keeps it busy. Between soon and late nothing changes: where many requests
come at once, each waits until the prompts before it are read, and fewer at once would not be faster.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

_SLOWER, _REFUSED = 0.9, 0.7  # what is left of the limit


@dataclass(frozen=True, slots=True)
class CapacityBounds:
    """Sequences at once: at the start, at least and at most; and what beginning soon and beginning late are."""

    start: int
    least: int
    most: int
    soon_s: float = 0.5
    late_s: float = 5.0


class Capacity:
    """The number of sequences that may run in a backend at once."""

    def __init__(self, bounds: CapacityBounds, clock: Callable[[], float] = time.monotonic) -> None:
        self._bounds = bounds
        self._clock = clock
        self._limit = float(bounds.start)
        self._shrunk_s = -bounds.late_s
        self._last_wait_s = 0.0
        self.is_short = False  # somebody waits for it: only then does more make a difference

    @property
    def limit(self) -> int:
        """Sequences that it may be given."""
        return int(self._limit)

    def began(self, wait_s: float) -> None:
        """The backend began with a request after so long."""
        self._last_wait_s = wait_s
        if wait_s > self._bounds.late_s:
            self._shrink(_SLOWER)

    def ended_well(self) -> None:
        """A request has ended by itself."""
        if self.is_short and self._last_wait_s <= self._bounds.soon_s:
            self._limit = min(float(self._bounds.most), self._limit + 1 / self._limit)

    def refused(self) -> None:
        """The backend said that it has too much to do."""
        self._shrink(_REFUSED)

    def _shrink(self, factor: float) -> None:
        """Shrinks once for what was given before the last time: its waits tell nothing of the limit since."""
        now_s = self._clock()
        if now_s - self._shrunk_s >= self._bounds.late_s:
            self._shrunk_s = now_s
            self._limit = max(float(self._bounds.least), self._limit * factor)
