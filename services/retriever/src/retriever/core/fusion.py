"""Joins ranked lists into one by reciprocal rank fusion (Cormack, Clarke, Buettcher 2009): sum of 1 / (k + rank)."""

from collections.abc import Sequence

RRF_K = 60


def fuse(rankings: Sequence[Sequence[str]], k: int = RRF_K) -> list[tuple[str, float]]:
    """Returns keys with fused scores, best first; among equals the one that an earlier list named first."""
    scores: dict[str, float] = {}
    for ranking in rankings:
        for rank, key in enumerate(ranking, start=1):
            scores[key] = scores.get(key, 0.0) + 1.0 / (k + rank)
    return sorted(scores.items(), key=lambda item: -item[1])
