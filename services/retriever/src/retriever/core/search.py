"""Searches: checks what is asked, asks the index, fuses, filters and cuts to what was wanted."""

import asyncio
import json
import math
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

import numpy as np

from chassis.errors import Code, PlatformError
from retriever.core.documents import check_collection, check_tenant, has_surrogate
from retriever.core.filters import MAX_CONDITIONS, Condition
from retriever.core.fusion import fuse
from retriever.core.ports import MAX_CANDIDATES, Candidate, ChunkSearch, Encoder, Scope, Vector

DEFAULT_TOP_K = 5
MAX_TOP_K = 100
MAX_QUERY_CHARS = 32_768
_FUSION_DEPTH = 50
_WIDENING = 4


class Mode(StrEnum):
    """How to search."""

    DENSE = "dense"
    KEYWORD = "keyword"
    HYBRID = "hybrid"


@dataclass(frozen=True, slots=True)
class Query:
    """A search that is known to be sound."""

    scope: Scope
    text: str
    mode: Mode
    top_k: int
    conditions: tuple[Condition, ...]
    group_by_document: bool
    vector: Vector | None
    min_score: float | None


def make_query(
    *,
    tenant: str,
    collection: str = "",
    text: str,
    mode: Mode = Mode.DENSE,
    top_k: int = 0,
    conditions: Sequence[Condition] = (),
    group_by_document: bool = False,
    vector: Sequence[float] = (),
    min_score: float | None = None,
) -> Query:
    """Checks a search; raises INVALID_ARGUMENT naming the field."""
    scope = Scope(check_tenant(tenant), check_collection(collection))
    if not text.strip():
        raise _invalid("query", "the query is empty")
    if len(text) > MAX_QUERY_CHARS:
        raise _invalid("query", f"the query has {len(text)} characters, the limit is {MAX_QUERY_CHARS}")
    if has_surrogate(text):
        raise _invalid("query", "the query contains an unpaired surrogate")
    top_k = top_k or DEFAULT_TOP_K
    if not 1 <= top_k <= MAX_TOP_K:
        raise _invalid("top_k", f"top_k is {top_k}, it must be 1 to {MAX_TOP_K}")
    if len(conditions) > MAX_CONDITIONS:
        raise _invalid("filter", f"the filter has {len(conditions)} conditions, the limit is {MAX_CONDITIONS}")
    if min_score is not None and not math.isfinite(min_score):
        raise _invalid("min_score", "min_score is not finite")
    return Query(scope, text, mode, top_k, tuple(conditions), group_by_document, _vector(vector), min_score)


def _vector(values: Sequence[float]) -> Vector | None:
    if not values:
        return None
    vector = np.asarray(values, dtype=np.float32)
    norm = float(np.linalg.norm(vector))
    if not math.isfinite(norm) or norm == 0.0:
        raise _invalid("query_vector", "query_vector is not finite, or all zeros")
    return vector / np.float32(norm)


class Searcher:
    """Answers queries."""

    def __init__(self, encoder: Encoder, index: ChunkSearch) -> None:
        self._encoder = encoder
        self._index = index

    async def search(self, query: Query) -> list[Candidate]:
        """Returns the best hits, best first."""
        ranked = await self._ranker(query)
        limit = query.top_k * (_WIDENING if query.conditions or query.group_by_document else 1)
        while True:
            candidates, exhausted = await ranked(limit)
            # In a thread where it takes more than a moment: a filter may look at thousands.
            few = len(candidates) <= 500
            hits = _chosen(query, candidates) if few else await asyncio.to_thread(_chosen, query, candidates)
            if len(hits) >= query.top_k or exhausted or limit >= MAX_CANDIDATES:
                return hits[: query.top_k]
            # The filter left too few: look further down. Exact up to MAX_CANDIDATES chunks of a collection.
            limit = min(limit * _WIDENING, MAX_CANDIDATES)

    async def _ranker(self, query: Query) -> Callable[[int], Awaitable[tuple[list[Candidate], bool]]]:
        """Returns a function from a limit to candidates, and whether there are no more."""
        scope, text = query.scope, query.text
        if query.mode is Mode.KEYWORD:
            return lambda limit: _counted(self._index.keyword(scope, text, limit), limit)
        vector = query.vector if query.vector is not None else (await self._encoder.encode_query(text)).vectors[0]
        if query.mode is Mode.DENSE:
            return lambda limit: _counted(self._index.dense(scope, vector, limit), limit)

        async def hybrid(limit: int) -> tuple[list[Candidate], bool]:
            depth = min(max(limit, _FUSION_DEPTH), MAX_CANDIDATES)
            dense, no_more_dense = await _counted(self._index.dense(scope, vector, depth), depth)
            keyword, no_more_keyword = await _counted(self._index.keyword(scope, text, depth), depth)
            fused = fuse([[c.key for c in dense], [c.key for c in keyword]])
            by_key = {candidate.key: candidate for candidate in (*keyword, *dense)}
            return [replace(by_key[key], score=score) for key, score in fused], no_more_dense and no_more_keyword

        return hybrid


async def _counted(search: Awaitable[list[Candidate]], limit: int) -> tuple[list[Candidate], bool]:
    candidates = await search
    return candidates, len(candidates) < limit


def _chosen(query: Query, candidates: Sequence[Candidate]) -> list[Candidate]:
    """Drops what the query does not want."""
    hits: list[Candidate] = []
    documents: set[str] = set()
    for candidate in candidates:
        if query.min_score is not None and candidate.score < query.min_score:
            continue
        if query.conditions and not _meets(query.conditions, candidate):
            continue
        if query.group_by_document and candidate.document_id in documents:
            continue
        documents.add(candidate.document_id)
        hits.append(candidate)
    return hits


def _meets(conditions: Sequence[Condition], candidate: Candidate) -> bool:
    metadata = json.loads(candidate.metadata_json)
    return all(condition.holds(metadata) for condition in conditions)


def _invalid(param: str, message: str) -> PlatformError:
    return PlatformError(Code.INVALID_ARGUMENT, message, param=param)
