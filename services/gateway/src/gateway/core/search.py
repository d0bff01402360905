"""What a client may ask of the document search, as plain types. Knows nothing of gRPC or HTTP."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

Scalar = str | int | float | bool


class Mode(StrEnum):
    """How to search: by vectors, by words, or by both, fused."""

    DENSE = "dense"
    KEYWORD = "keyword"
    HYBRID = "hybrid"


class Operator(StrEnum):
    """A comparison, under its name in a filter."""

    EQ = "$eq"
    NE = "$ne"
    LT = "$lt"
    LE = "$lte"
    GT = "$gt"
    GE = "$gte"
    IN = "$in"


@dataclass(frozen=True, slots=True)
class Condition:
    """One condition on a metadata key; several values for IN alone."""

    key: str
    operator: Operator
    values: Sequence[Scalar]


@dataclass(frozen=True, slots=True)
class Question:
    """A search, confined to a tenant."""

    tenant: str
    query: str
    collection: str
    mode: Mode
    top_k: int
    conditions: Sequence[Condition] = ()
    group_by_document: bool = False


@dataclass(frozen=True, slots=True)
class Hit:
    """One chunk that was found."""

    document_id: str
    external_id: str
    chunk_id: str
    title: str
    text: str
    score: float


class Searcher(Protocol):
    """Finds chunks."""

    async def search(self, question: Question) -> Sequence[Hit]:
        """Returns hits, best first; raises PlatformError, UNAVAILABLE when the index is away."""
        ...
