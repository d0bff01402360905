"""How long a dead service waits for its next start."""

import time
from collections.abc import Callable


class Backoff:
    """Doubles from first_s up to longest_s; a life of settled_s or more starts over at first_s."""

    def __init__(
        self,
        first_s: float = 0.5,
        longest_s: float = 30.0,
        settled_s: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._first_s = first_s
        self._longest_s = longest_s
        self._settled_s = settled_s
        self._clock = clock
        self._next_s = first_s
        self._started_at = clock()

    def started(self) -> None:
        """Notes that a process has just been started."""
        self._started_at = self._clock()

    def after_death(self) -> float:
        """Returns the seconds to wait before the next start."""
        if self._clock() - self._started_at >= self._settled_s:
            self._next_s = self._first_s
        wait_s = self._next_s
        self._next_s = min(self._next_s * 2, self._longest_s)
        return wait_s
