"""What can be asked of the ledger: sums by key, tenant, model and day, and the rows themselves."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

MAX_GROUPS = 100_000  # more of them are to be had as CSV or with filters
Cell = str | int | float


class Group(StrEnum):
    """What sums are taken by."""

    TENANT = "tenant"
    KEY = "key"
    MODEL = "model"
    DAY = "day"

    @property
    def column(self) -> str:
        """What it is called in the sums."""
        return "key_id" if self is Group.KEY else self.value


TOTALS = (Group.TENANT, Group.KEY, Group.MODEL)
FIGURES = ("num_requests", "num_errors", "prompt_tokens", "completion_tokens", "cached_tokens", "cost_micros")

ROW = (
    "id",
    "started_unix_ms",
    "request_id",
    "trace_id",
    "tenant",
    "key_id",
    "model",
    "route",
    "prompt_tokens",
    "completion_tokens",
    "cached_tokens",
    "cost_micros",
    "finish_reason",
    "http_status",
    "stream",
    "duration_s",
    "ttft_s",
    "error_code",
    "is_exact",
)


@dataclass(frozen=True, slots=True)
class Selection:
    """Of which requests; None is of all. Days are counted from 1970 in UTC and both belong to the selection."""

    tenant: str | None = None
    key_id: str | None = None
    model: str | None = None
    first_day: int | None = None
    last_day: int | None = None


class UsageReports(Protocol):
    """Reads what was used."""

    async def sums(
        self, groups: Sequence[Group], selection: Selection, limit: int = MAX_GROUPS
    ) -> list[Mapping[str, Cell]]:
        """FIGURES for each combination of the groups (their columns), in their order."""
        ...

    async def rows(
        self, selection: Selection, after: tuple[int, int], limit: int
    ) -> tuple[list[Mapping[str, Cell]], tuple[int, int]]:
        """Single requests by the time they came, from behind a place on; and the place behind the last of them.

        The first place is (0, 0).
        """
        ...
