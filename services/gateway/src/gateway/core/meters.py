"""Limits as they meet a request: whose each is, how it stands, and the one judgement over all of them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Protocol

from gateway.core.policy import Counted, Limit


class Scope(StrEnum):
    """Whose limit it is."""

    KEY = "key"
    TENANT = "tenant"
    MODEL = "model"
    GLOBAL = "global"


@dataclass(frozen=True, slots=True)
class Meter:
    """A limit and where it is counted: one name, one count, however large the limit is just now."""

    name: str
    scope: Scope
    limit: Limit

    @property
    def algorithm(self) -> str:
        """How it counts over time; "concurrency" where time does not matter."""
        counted = self.limit.counted
        return counted.value if counted is Counted.CONCURRENCY else self.limit.algorithm.value

    @property
    def window_ms(self) -> int:
        """The limit's window."""
        return max(1, round(self.limit.window_s * 1000))

    @property
    def is_held(self) -> bool:
        """What a request takes of it is given back, or found to be used, at the request's end."""
        return self.limit.counted is not Counted.REQUESTS

    def cost(self, num_tokens: int) -> int:
        """What a request takes of it that may use so many tokens."""
        return num_tokens if self.limit.counted is Counted.TOKENS else 1


@dataclass(frozen=True, slots=True)
class Standing:
    """How a meter stands after the judgement. retry_s: after how long it would have had room; 0 where it had."""

    meter: Meter
    fits: bool
    remaining: int
    reset_s: float
    retry_s: float


@dataclass(frozen=True, slots=True)
class Verdict:
    """One judgement over all meters of a request; a refused request takes nothing of any of them.

    tokens: how many it may use; where it was refused, how many it needs at least. wait_s: how long it waits before it
    begins. is_shared: counted for all gateways, not for this process alone.
    """

    id: str
    allowed: bool
    tokens: int
    wait_s: float
    standings: tuple[Standing, ...]
    is_shared: bool

    @property
    def held(self) -> tuple[Meter, ...]:
        """Of which meters something is to be given back."""
        return tuple(one.meter for one in self.standings if one.meter.is_held) if self.allowed else ()

    def of(self, counted: Counted) -> "Verdict":
        """The part of it that speaks of such limits."""
        return replace(self, standings=tuple(one for one in self.standings if one.meter.limit.counted is counted))


class Limiter(Protocol):
    """Judges requests by their meters."""

    async def reserve(self, meters: Sequence[Meter], least: int, most: int) -> Verdict:
        """Takes 1 of each meter, and of those that count tokens what they have: between least and most tokens.

        Never raises, and never takes longer than its own time-out when its store is away.
        """
        ...

    def settle(self, verdict: Verdict, num_tokens: int) -> None:
        """The request has ended and used so many tokens; what it held is free again. Never waits."""
        ...
