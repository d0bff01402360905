"""Counting requests per key: the window's rule, a limiter in memory, and a breaker for the shared one.

The rule is a fixed window that opens with a key's first request and lasts a minute: at most N requests in each
window, never one more, and `remaining` and `reset` in the headers are exact. GCRA would smooth the flow but lets
2N - 1 requests through in the first minute (N at once, the rest as they drip back), which reads as a broken limit to
whoever set N. The price of the window is a burst of up to 2N over the seam of two windows.
"""

import time
from collections import OrderedDict
from collections.abc import Callable

from gateway.core.ports import LimitState, Principal

WINDOW_S = 60.0
UNLIMITED = LimitState(allowed=True, limit=None, remaining=0, reset_s=0.0)


class LocalLimiter:
    """Counts in this process's memory, for at most max_keys keys. Implements ports.RequestLimiter.

    When it is full the key that was seen least recently is forgotten.
    """

    def __init__(
        self, *, window_s: float = WINDOW_S, max_keys: int = 10_000, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._window_s = window_s
        self._max_keys = max_keys
        self._clock = clock
        self._windows: OrderedDict[str, tuple[float, int]] = OrderedDict()  # key id: end of the window, count

    async def hit(self, principal: Principal) -> LimitState:
        """Counts one request; a refused one is not counted."""
        return self.count(principal)

    def count(self, principal: Principal) -> LimitState:
        """The same without waiting."""
        limit = principal.requests_per_minute
        if limit is None:
            return UNLIMITED
        now = self._clock()
        end, count = self._windows.get(principal.key_id, (0.0, 0))
        if end <= now:
            end, count = now + self._window_s, 0
        allowed = count < limit
        if allowed:
            count += 1
        self._keep(principal.key_id, end, count)
        return LimitState(allowed, limit, max(0, limit - count), end - now)

    def observe(self, key_id: str, state: LimitState) -> None:
        """Takes over what the shared limiter counted, so that falling back does not start from nothing."""
        if state.limit is not None:
            end, count = self._clock() + state.reset_s, state.limit - state.remaining
            kept_end, kept_count = self._windows.get(key_id, (0.0, 0))
            # Answers of one window may arrive out of order: its count only grows.
            same_window = abs(kept_end - end) < self._window_s / 2
            self._keep(key_id, end, max(count, kept_count) if same_window else count)

    def _keep(self, key_id: str, end: float, count: int) -> None:
        self._windows[key_id] = (end, count)
        self._windows.move_to_end(key_id)
        while len(self._windows) > self._max_keys:
            self._windows.popitem(last=False)


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
