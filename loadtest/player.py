"""Plays arrivals in open loop: each is started when it is due, however long those before it take.

A loop that waited for an answer before it sent the next request would send less as the system slows down, and would
not see the waiting that it avoided (coordinated omission). What cannot be started, since max_in_flight are under way,
is told to the caller as an overflow and never sent late.
"""

from collections.abc import Callable, Iterable
from typing import Protocol

from loadtest.arrivals import Arrival

_LONGEST_SLEEP_S = 0.25  # so long it may take until a stop is noticed


class Workers(Protocol):
    """Runs requests beside each other."""

    def num_running(self) -> int:
        """How many run now."""
        ...

    def start(self, work: Callable[[], None]) -> None:
        """Starts one and returns at once."""
        ...


class Player:
    """request(arrival, due_s) sends one and blocks; overflow(arrival, due_s) writes down one that was not sent."""

    def __init__(
        self,
        workers: Workers,
        *,
        request: Callable[[Arrival, float], None],
        overflow: Callable[[Arrival, float], None],
        clock: Callable[[], float],
        sleep: Callable[[float], object],
        max_in_flight: int,
    ) -> None:
        self._workers = workers
        self._request = request
        self._overflow = overflow
        self._clock = clock
        self._sleep = sleep
        self._max_in_flight = max_in_flight
        self.is_stopped = False

    def stop(self) -> None:
        """Sends no more; what is under way goes on."""
        self.is_stopped = True

    def play(self, arrivals: Iterable[Arrival], start_s: float, end_s: float) -> None:
        """Starts each arrival at start_s + at_s and returns at end_s, or when stopped. Does not wait for answers."""
        for arrival in arrivals:
            due_s = start_s + arrival.at_s
            if not self._wait_until(due_s):
                return
            if self._workers.num_running() >= self._max_in_flight:
                self._overflow(arrival, due_s)
            else:
                self._workers.start(lambda a=arrival, at_s=due_s: self._request(a, at_s))  # type: ignore[misc]
        self._wait_until(end_s)

    def drain(self, timeout_s: float) -> bool:
        """Waits until nothing is under way; False where that took too long."""
        deadline_s = self._clock() + timeout_s
        while self._workers.num_running():
            if self._clock() >= deadline_s:
                return False
            self._sleep(0.05)
        return True

    def _wait_until(self, due_s: float) -> bool:
        while not self.is_stopped and (left_s := due_s - self._clock()) > 0:
            self._sleep(min(left_s, _LONGEST_SLEEP_S))
        return not self.is_stopped
