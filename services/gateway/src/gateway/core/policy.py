"""What a key or a tenant may do, and how much: its policy, as it is stored and judged.

A key's policy and its tenant's both hold: the narrower one decides. Knows nothing of who judges it or where.
"""

import json
from dataclasses import asdict, dataclass, fields
from enum import StrEnum
from fnmatch import fnmatchcase
from typing import Any


class Counted(StrEnum):
    """What a limit counts."""

    REQUESTS = "requests"
    TOKENS = "tokens"  # prompt and completion
    CONCURRENCY = "concurrency"  # requests at the same time


class Algorithm(StrEnum):
    """How a limit counts over time; see core.counts."""

    FIXED_WINDOW = "fixed_window"
    SLIDING_LOG = "sliding_log"
    TOKEN_BUCKET = "token_bucket"
    LEAKY_BUCKET = "leaky_bucket"


@dataclass(frozen=True, slots=True)
class Limit:
    """So much of something in so many seconds; for one model, or over all of them."""

    counted: Counted
    amount: int
    window_s: float = 60.0  # without meaning for CONCURRENCY
    algorithm: Algorithm = Algorithm.FIXED_WINDOW
    model: str | None = None


@dataclass(frozen=True, slots=True)
class Budget:
    """So much money in a period, in millionths of the currency that prices are in."""

    amount_micros: int
    period: str = "total"  # "day", "month" (both of UTC) or "total"


@dataclass(frozen=True, slots=True)
class Policy:
    """None and () restrict nothing."""

    scopes: frozenset[str] | None = None  # groups of routes, see api
    models: frozenset[str] | None = None  # names, or patterns with *
    limits: tuple[Limit, ...] = ()
    budget: Budget | None = None
    priority: int = 0  # class of admission: higher goes first; -100 to 100, below 0 is the background
    weight: float = 1.0  # of a tenant: its share of a busy model beside the others'; above 0
    caches: bool = False  # repeated requests may be answered from the exact cache

    def allows_model(self, model: str) -> bool:
        """Says whether a model may be asked: by its name, or by a pattern such as `smollm2-135m-instruct:*`."""
        return self.models is None or any(fnmatchcase(model, pattern) for pattern in self.models)

    def allows_scope(self, scope: str) -> bool:
        """Says whether a group of routes may be used."""
        return self.scopes is None or scope in self.scopes

    def to_json(self) -> str:
        """Writes it down; what restricts nothing is left out."""
        said: dict[str, Any] = {}
        for one in fields(self):
            value = getattr(self, one.name)
            if value != one.default:
                said[one.name] = sorted(value) if isinstance(value, frozenset) else value
        return json.dumps(said, default=asdict)


UNRESTRICTED = Policy()


def policy_from_json(text: str) -> Policy:
    """Reads what to_json wrote; raises ValueError for what it did not."""
    said = json.loads(text)
    try:
        for name in ("scopes", "models"):
            if said.get(name) is not None:
                said[name] = frozenset(said[name])
        said["limits"] = tuple(
            Limit(**one | {"counted": Counted(one["counted"]), "algorithm": Algorithm(one["algorithm"])})
            for one in said.get("limits", ())
        )
        if said.get("budget") is not None:
            said["budget"] = Budget(**said["budget"])
        return Policy(**said)
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"not a policy: {error}") from error
