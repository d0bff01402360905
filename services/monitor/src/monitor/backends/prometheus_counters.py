"""Counts as Prometheus metrics of the monitor. Implements core.tally.Counters.

They are not pressroom_tokens_total: the service that did the work counts there, and a sum would count twice.
"""

from prometheus_client import CollectorRegistry, Counter
from prometheus_client.registry import REGISTRY

from monitor.core.tally import FinishedRequest


class PrometheusCounters:
    """Registers the metrics; make one for each registry."""

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        self._records = Counter(
            "pressroom_monitor_records",
            "Finished requests that were heard of on the bus.",
            ["model", "finish_reason"],
            registry=registry,
        )
        self._tokens = Counter(
            "pressroom_monitor_tokens",
            "Tokens of finished requests, by kind: prompt, completion or cached.",
            ["model", "kind"],
            registry=registry,
        )

    def add(self, model: str, finish_reason: str, request: FinishedRequest) -> None:
        """Adds one request."""
        self._records.labels(model, finish_reason).inc()
        self._tokens.labels(model, "prompt").inc(request.prompt_tokens)
        self._tokens.labels(model, "completion").inc(request.completion_tokens)
        self._tokens.labels(model, "cached").inc(request.cached_tokens)
