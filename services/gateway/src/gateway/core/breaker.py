"""Says when a dependency that failed may be tried again."""

import time
from collections.abc import Callable


class Breaker:
    """Says whether a broken dependency may be tried: after a failure one try per cool-down, which doubles."""

    def __init__(
        self, *, cooldown_s: float = 0.5, max_cooldown_s: float = 5.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._first_s = cooldown_s
        self._max_s = max_cooldown_s
        self._clock = clock
        self._cooldown_s = cooldown_s
        self._retry_at: float | None = None

    @property
    def is_open(self) -> bool:
        """The dependency failed and has not answered since."""
        return self._retry_at is not None

    def permits(self) -> bool:
        """Whether to try now; an open breaker permits one caller and moves its next time on."""
        if self._retry_at is None:
            return True
        if self._clock() < self._retry_at:
            return False
        self._retry_at = self._clock() + self._cooldown_s
        return True

    def succeeded(self) -> bool:
        """Closes it; True when it was open."""
        was_open, self._retry_at, self._cooldown_s = self.is_open, None, self._first_s
        return was_open

    def failed(self) -> bool:
        """Opens it; True when it was closed."""
        was_open = self.is_open
        if was_open:
            self._cooldown_s = min(self._cooldown_s * 2, self._max_s)
        self._retry_at = self._clock() + self._cooldown_s
        return not was_open
