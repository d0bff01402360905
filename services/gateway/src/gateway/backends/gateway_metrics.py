"""Metrics that only the gateway has."""

from prometheus_client import Counter

from gateway.core.meters import Meter

LOCAL_DECISIONS = Counter(
    "pressroom_limiter_local_decisions", "Requests that were limited by this process alone, Valkey being away."
)
LIMIT_REFUSALS = Counter(
    "pressroom_limit_refusals",
    "Limits that had no room for a request, by whose they are and what they count.",
    ["scope", "counted"],
)
UNSETTLED = Counter(
    "pressroom_limiter_unsettled", "Reservations that could not be given back in time and count in full."
)


def count_refusal(meter: Meter) -> None:
    """A limit had no room for a request."""
    LIMIT_REFUSALS.labels(meter.scope.value, meter.limit.counted.value).inc()
