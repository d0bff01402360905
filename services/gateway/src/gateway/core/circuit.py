"""Says whether a backend may be asked: it is left alone for a while when it fails too often, then tried.

Closed: it is asked. Open: it is not. Half-open, when its time is over: one request tries it, and its outcome decides.
The time grows with every try that fails. Pure, for one event loop.
"""

import random
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum


class CircuitState(IntEnum):
    """As the metric tells it."""

    CLOSED = 0
    HALF_OPEN = 1
    OPEN = 2


@dataclass(frozen=True, slots=True)
class CircuitRules:
    """When a breaker opens, and for how long."""

    consecutive: int = 5  # failures in a row ...
    row_s: float = 0.0  # ... over so long at least
    ratio: float = 0.5  # or this part of the outcomes of the last window_s ...
    least_outcomes: int = 20  # ... where there were so many
    window_s: float = 10.0
    first_open_s: float = 0.5  # doubled at every try that fails
    longest_open_s: float = 30.0


class Circuit:
    """The breaker of one backend. Every ask() is followed by one of succeeded(), failed() and gave_up()."""

    def __init__(
        self,
        rules: CircuitRules = CircuitRules(),
        clock: Callable[[], float] = time.monotonic,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self._rules = rules
        self._clock = clock
        self._jitter = jitter
        self._outcomes: deque[tuple[float, bool]] = deque(maxlen=1024)
        self._in_a_row = 0
        self._row_began_s = 0.0
        self._num_opened = 0  # since it last worked for a whole window
        self._open_until_s: float | None = None
        self._closed_s = clock()
        self._is_tried = False

    @property
    def state(self) -> CircuitState:
        """Its state now."""
        if self._open_until_s is None:
            return CircuitState.CLOSED
        return CircuitState.OPEN if self._clock() < self._open_until_s else CircuitState.HALF_OPEN

    @property
    def admits(self) -> bool:
        """The backend may be asked."""
        state = self.state
        return state is CircuitState.CLOSED or (state is CircuitState.HALF_OPEN and not self._is_tried)

    @property
    def open_s(self) -> float:
        """Seconds until it may be tried."""
        return 0.0 if self._open_until_s is None else max(0.0, self._open_until_s - self._clock())

    def ask(self) -> None:
        """A request goes to the backend, whatever `admits` said."""
        if self.state is CircuitState.HALF_OPEN:
            self._is_tried = True

    def succeeded(self) -> None:
        """It answered."""
        self._in_a_row = 0
        self._note(True)
        if self._open_until_s is not None:
            self._open_until_s, self._is_tried = None, False
            self._closed_s = self._clock()
            self._outcomes.clear()

    def failed(self) -> None:
        """It did not answer, or broke off."""
        if not self._in_a_row:
            self._row_began_s = self._clock()
        self._in_a_row += 1
        self._note(False)
        state = self.state
        if state is CircuitState.HALF_OPEN or (state is CircuitState.CLOSED and self._is_too_bad()):
            self._open()

    def gave_up(self) -> None:
        """Nobody waited for the outcome."""
        self._is_tried = False

    def _note(self, is_good: bool) -> None:
        now_s = self._clock()
        self._outcomes.append((now_s, is_good))
        while self._outcomes[0][0] < now_s - self._rules.window_s:
            self._outcomes.popleft()

    def _is_too_bad(self) -> bool:
        if self._in_a_row >= self._rules.consecutive and self._clock() - self._row_began_s >= self._rules.row_s:
            return True
        num_bad = sum(not is_good for _, is_good in self._outcomes)
        return len(self._outcomes) >= self._rules.least_outcomes and num_bad >= self._rules.ratio * len(self._outcomes)

    def _open(self) -> None:
        now_s = self._clock()
        if self._open_until_s is None and now_s - self._closed_s > self._rules.window_s:
            self._num_opened = 0
        open_s = min(self._rules.first_open_s * 2**self._num_opened, self._rules.longest_open_s)
        self._num_opened = min(self._num_opened + 1, 30)
        self._open_until_s = now_s + open_s * (0.8 + 0.2 * self._jitter())  # several gateways do not try it at once
        self._is_tried = False
