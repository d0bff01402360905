"""How each algorithm counts. The same rules run in Valkey (backends.valkey_scripts): a test holds them together.

Every number is an integer and every time in milliseconds, so that both give the same decisions. Beside what was used
there is what is held: tokens that running requests may still use, or the running requests themselves. What is held
counts in full until it is given back, and only what was used is added then: no count ever passes its limit.

With N the amount and W the window:
- fixed window: at most N in a window that opens with its first use; up to 2N over the seam of two windows;
- sliding log: at most N in any W, at the price of one entry for each request;
- token bucket: N at once, then N over W (GCRA's rule, kept as a level in place of a time);
- leaky bucket: one after the other, N over W; who comes sooner waits, LEAKY_WAIT_MS at most, or is refused;
- concurrency: N held at a time.
"""

from abc import ABC, abstractmethod
from collections import deque
from dataclasses import dataclass

LEAKY_WAIT_MS = 5_000
HELD_RETRY_MS = 1_000  # where others' ends make room nobody knows when


@dataclass(frozen=True, slots=True)
class Rule:
    """The numbers of a limit."""

    amount: int
    window_ms: int


class Count(ABC):
    """What was used of one limit. advance() comes before every other call."""

    @abstractmethod
    def advance(self, rule: Rule, now_ms: int) -> None:
        """Lets time pass."""

    @abstractmethod
    def room(self, rule: Rule, held: int) -> int:
        """The most that one request can take now."""

    def remaining(self, rule: Rule, held: int) -> int:
        """How many units can be taken now, by requests of one unit each."""
        return self.room(rule, held)

    @abstractmethod
    def retry_ms(self, rule: Rule, now_ms: int, held: int, cost: int) -> int:
        """After how long what has no room now will have it, while held stays as it is."""

    @abstractmethod
    def reset_ms(self, rule: Rule, now_ms: int) -> int:
        """After how long it will be as if nothing had been used."""

    @abstractmethod
    def add(self, rule: Rule, now_ms: int, amount: int) -> None:
        """So much was used."""


class FixedWindow(Count):
    """Counts in a window that opens with its first use."""

    def __init__(self) -> None:
        self._used = 0
        self._end_ms = 0

    def advance(self, rule: Rule, now_ms: int) -> None:
        if not now_ms < self._end_ms <= now_ms + rule.window_ms:
            self._used, self._end_ms = 0, 0

    def room(self, rule: Rule, held: int) -> int:
        return rule.amount - self._used - held

    def retry_ms(self, rule: Rule, now_ms: int, held: int, cost: int) -> int:
        return self.reset_ms(rule, now_ms)

    def reset_ms(self, rule: Rule, now_ms: int) -> int:
        return self._end_ms - now_ms if self._end_ms else 0

    def add(self, rule: Rule, now_ms: int, amount: int) -> None:
        self._end_ms = self._end_ms or now_ms + rule.window_ms
        self._used += amount


class SlidingLog(Count):
    """Remembers when how much was used."""

    def __init__(self) -> None:
        self._used = 0
        self._entries: deque[tuple[int, int]] = deque()  # when, how much

    def advance(self, rule: Rule, now_ms: int) -> None:
        while self._entries and self._entries[0][0] <= now_ms - rule.window_ms:
            self._used -= self._entries.popleft()[1]

    def room(self, rule: Rule, held: int) -> int:
        return rule.amount - self._used - held

    def retry_ms(self, rule: Rule, now_ms: int, held: int, cost: int) -> int:
        missing = cost - self.room(rule, held)
        for at_ms, amount in self._entries:
            missing -= amount
            if missing <= 0:
                return at_ms + rule.window_ms - now_ms
        return HELD_RETRY_MS

    def reset_ms(self, rule: Rule, now_ms: int) -> int:
        return self._entries[-1][0] + rule.window_ms - now_ms if self._entries else 0

    def add(self, rule: Rule, now_ms: int, amount: int) -> None:
        if amount:
            self._entries.append((now_ms, amount))
            self._used += amount


class TokenBucket(Count):
    """Keeps what is missing from the bucket, times the window: what flows in a millisecond, N, is an integer then."""

    def __init__(self) -> None:
        self._level = 0
        self._at_ms = 0

    def advance(self, rule: Rule, now_ms: int) -> None:
        self._level = max(0, self._level - max(0, now_ms - self._at_ms) * rule.amount)
        self._at_ms = now_ms

    def room(self, rule: Rule, held: int) -> int:
        return (rule.amount * rule.window_ms - self._level) // rule.window_ms - held

    def retry_ms(self, rule: Rule, now_ms: int, held: int, cost: int) -> int:
        return _ceil_div(self._level + (held + cost - rule.amount) * rule.window_ms, rule.amount)

    def reset_ms(self, rule: Rule, now_ms: int) -> int:
        return _ceil_div(self._level, rule.amount)

    def add(self, rule: Rule, now_ms: int, amount: int) -> None:
        self._level += amount * rule.window_ms


class LeakyBucket(TokenBucket):
    """The level is what stands in the queue; a newcomer waits until it has flowed out."""

    def wait_ms(self, rule: Rule, held: int) -> int:
        """How long a newcomer waits for its turn."""
        return _ceil_div(self._level + held * rule.window_ms, rule.amount)

    def room(self, rule: Rule, held: int) -> int:
        return rule.amount if self.wait_ms(rule, held) <= _most_wait_ms(rule) else 0

    def remaining(self, rule: Rule, held: int) -> int:
        free = _most_wait_ms(rule) * rule.amount - self._level - held * rule.window_ms
        return min(rule.amount, free // rule.window_ms + 1)

    def retry_ms(self, rule: Rule, now_ms: int, held: int, cost: int) -> int:
        return self.wait_ms(rule, held) - _most_wait_ms(rule)


class Concurrency(Count):
    """Nothing is used up: only what is held counts."""

    def advance(self, rule: Rule, now_ms: int) -> None:
        pass

    def room(self, rule: Rule, held: int) -> int:
        return rule.amount - held

    def retry_ms(self, rule: Rule, now_ms: int, held: int, cost: int) -> int:
        return HELD_RETRY_MS

    def reset_ms(self, rule: Rule, now_ms: int) -> int:
        return 0

    def add(self, rule: Rule, now_ms: int, amount: int) -> None:
        pass


def _most_wait_ms(rule: Rule) -> int:
    return min(LEAKY_WAIT_MS, rule.window_ms)


def _ceil_div(dividend: int, divisor: int) -> int:
    return -(-dividend // divisor)
