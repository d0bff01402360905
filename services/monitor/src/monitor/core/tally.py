"""Counts finished requests, each one once, under labels that stay few. Knows nothing of where counts are kept."""

from collections import OrderedDict
from dataclasses import dataclass
from typing import Protocol

OTHER = "other"
_FINISH_REASONS = frozenset({"stop", "length", "cancelled", "error", "deadline"})


@dataclass(frozen=True, slots=True)
class FinishedRequest:
    """What is counted of one request."""

    model: str
    finish_reason: str
    succeeded: bool
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


class Counters(Protocol):
    """Where counts go."""

    def add(self, model: str, finish_reason: str, request: FinishedRequest) -> None:
        """Adds one request under labels that are bounded already."""
        ...


class Tally:
    """Adds each event to the counters once.

    Deliveries repeat (at least once), so the last `window` event ids are remembered; that is far more than can be
    on the way at a time. A model's name comes from the client: only one that has answered gets a label of its own,
    and at most `max_models` do.
    """

    def __init__(self, counters: Counters, *, window: int = 65_536, max_models: int = 64) -> None:
        self._counters = counters
        self._window = window
        self._max_models = max_models
        self._seen: OrderedDict[str, None] = OrderedDict()
        self._models: set[str] = set()

    def record(self, event_id: str, request: FinishedRequest) -> bool:
        """Counts a request; returns False for one that was counted before."""
        if event_id in self._seen:
            return False
        self._seen[event_id] = None
        if len(self._seen) > self._window:
            self._seen.popitem(last=False)
        reason = request.finish_reason if request.finish_reason in _FINISH_REASONS else OTHER
        self._counters.add(self.label(request), reason, request)
        return True

    def label(self, request: FinishedRequest) -> str:
        """Returns the model's name where it has a label of its own, else OTHER."""
        if request.model not in self._models:
            if not request.succeeded or not request.model or len(self._models) >= self._max_models:
                return OTHER
            self._models.add(request.model)
        return request.model
