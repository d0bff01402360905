"""Metrics that only the gateway has."""

from prometheus_client import Counter

LOCAL_DECISIONS = Counter(
    "pressroom_limiter_local_decisions", "Requests that were limited by this process alone, Valkey being away."
)
