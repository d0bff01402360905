"""Profiles of text quality, as the monitor makes them. Knows nothing of gRPC or HTTP."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Profile:
    """The profile of one window of time. `statistics`: by column, "prompt.*" and "response.*"."""

    model: str
    window_start_unix_s: int
    window_s: int
    num_records: int
    statistics: Mapping[str, object]


@dataclass(frozen=True, slots=True)
class ProfileReport:
    """Profiles, newest first, and how much of the traffic they cover.

    sample_rate: share of the records that are profiled. num_waiting, lag_s: how far behind they are. num_dropped:
    sampled records that were left out since the monitor's start.
    """

    profiles: Sequence[Profile]
    sample_rate: float
    num_waiting: int
    lag_s: float
    num_dropped: int


class Profiles(Protocol):
    """Tells of profiles."""

    async def newest(self, model: str | None, limit: int) -> ProfileReport:
        """Returns the newest profiles, of one model or of all; raises PlatformError(UNAVAILABLE)."""
        ...
