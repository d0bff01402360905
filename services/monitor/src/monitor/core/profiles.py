"""Profiles of windows of time, and the ports that make and keep them. Knows nothing of whylogs or SQLite."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol

from monitor.core.samples import Sample

Statistics = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Profile:
    """The profile of one model in one window. `statistics_json`: by column, "prompt.*" and "response.*"."""

    model: str
    window_start_unix_s: int
    window_s: int
    num_records: int
    statistics_json: str


@dataclass(frozen=True, slots=True)
class Batch:
    """Samples of one model and window that are profiled together. `binary`: the window's profile so far, if any.

    keys: by which the store knows the samples, in their order.
    """

    model: str
    window_start_unix_s: int
    window_s: int
    binary: bytes | None = field(repr=False)
    keys: tuple[int, ...]
    texts: tuple[tuple[str, str], ...] = field(repr=False)  # prompt, response


@dataclass(frozen=True, slots=True)
class Profiled:
    """A window's profile with a batch added. `failed`: positions in the batch of what could not be profiled."""

    binary: bytes = field(repr=False)
    statistics: Statistics = field(repr=False)
    failed: tuple[int, ...] = ()


class Added(StrEnum):
    """What became of a sample that was handed in."""

    WAITING = "waiting"
    DUPLICATE = "duplicate"
    DROPPED = "dropped"  # too many wait


class ProfilerDied(Exception):
    """The profiler died, or did not answer, while it had a batch in hand."""


class ProfilerUnavailable(Exception):
    """The profiler could not be started; no batch is to blame."""


class Profiler(Protocol):
    """Makes profiles, slowly."""

    async def profile(self, binary: bytes | None, texts: Sequence[tuple[str, str]]) -> Profiled:
        """Adds prompts and responses to a profile; starts what it needs. Raises ProfilerDied, ProfilerUnavailable."""
        ...

    async def stop(self) -> None:
        """Gives back memory and processes until the next call. Harmless when there are none."""
        ...


class Waiting(Protocol):
    """The samples that wait, on disk: what add() returned for survives a kill -9, and is profiled exactly once."""

    @property
    def num_waiting(self) -> int: ...

    @property
    def oldest_ended_unix_s(self) -> float | None:
        """When the request ended that waits longest; None where none waits."""
        ...

    async def add(self, sample: Sample) -> Added:
        """Keeps a sample, once for each message id."""
        ...

    async def next_batch(self, max_samples: int) -> Batch | None:
        """The oldest samples of one model and window; one that had the profiler die comes alone."""
        ...

    async def finish(self, batch: Batch, profiled: Profiled) -> None:
        """Stores the profile and forgets the samples, both or neither."""
        ...

    async def charge(self, batch: Batch, max_deaths: int) -> int:
        """Notes that the profiler died over a batch; forgets samples with max_deaths and returns how many."""
        ...


class Profiles(Protocol):
    """The profiles that were made."""

    async def newest(self, model: str | None, limit: int) -> Sequence[Profile]:
        """Returns profiles, newest window first."""
        ...

    async def prune(self, oldest_start_unix_s: int, max_profiles: int) -> int:
        """Forgets windows that began before a time, and the oldest beyond a number; returns how many."""
        ...
