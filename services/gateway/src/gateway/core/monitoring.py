"""Profiles of text quality, as the monitor makes them. Knows nothing of gRPC or HTTP."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Profile:
    """The profile of one window of time."""

    model: str
    window_start_unix_s: int
    window_s: int
    num_records: int
    statistics: Mapping[str, object]


class Profiles(Protocol):
    """Tells of profiles."""

    async def newest(self, model: str | None, limit: int) -> Sequence[Profile]:
        """Returns profiles, newest first; raises PlatformError, UNIMPLEMENTED while the monitor makes none."""
        ...
