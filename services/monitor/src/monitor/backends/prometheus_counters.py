"""Counts as Prometheus metrics of the monitor. Implements core.tally.Counters and core.profiling.Gauges.

They are not pressroom_tokens_total: the service that did the work counts there, and a sum would count twice.
"""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.registry import REGISTRY

from monitor.core.profiles import Statistics
from monitor.core.tally import FinishedRequest

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


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
        self._samples = Counter(
            "pressroom_monitor_samples",
            "Sampled records by outcome: profiled, dropped (too many waited), skipped (no profile could be made), "
            "expired (its window is no longer kept).",
            ["outcome"],
            registry=registry,
        )
        self._waiting = Gauge(
            "pressroom_monitor_waiting_samples", "Sampled records that wait to be profiled.", registry=registry
        )
        self._lag = Gauge(
            "pressroom_monitor_lag_seconds",
            "Seconds since the end of the request that waits longest for its profile; 0 where none waits.",
            registry=registry,
        )
        self._rate = Gauge(
            "pressroom_monitor_sample_rate", "Share of the records whose text is profiled.", registry=registry
        )
        self._batch_seconds = Histogram(
            "pressroom_monitor_profile_seconds",
            "Wall time of profiling one batch of records, at low priority.",
            buckets=_SECONDS,
            registry=registry,
        )
        self._means = Gauge(
            "pressroom_monitor_column_mean",
            "Mean of a profile's column in the newest window of a model.",
            ["model", "column"],
            registry=registry,
        )

    def add(self, model: str, finish_reason: str, request: FinishedRequest) -> None:
        """Adds one request."""
        self._records.labels(model, finish_reason).inc()
        self._tokens.labels(model, "prompt").inc(request.prompt_tokens)
        self._tokens.labels(model, "completion").inc(request.completion_tokens)
        self._tokens.labels(model, "cached").inc(request.cached_tokens)

    def sampled(self, outcome: str, num: int = 1) -> None:
        """Counts samples."""
        self._samples.labels(outcome).inc(num)

    def profiled(self, model: str, statistics: Statistics, duration_s: float) -> None:
        """Tells of a batch."""
        self._batch_seconds.observe(duration_s)
        for column, summary in statistics.items():
            if (mean := summary.get("mean")) is not None:
                self._means.labels(model, column).set(mean)

    def watch(self, sample_rate: float, num_waiting: Callable[[], int], lag_s: Callable[[], float]) -> None:
        """Tells where the gauges of the backlog are read from, at each scrape."""
        self._rate.set(sample_rate)
        self._waiting.set_function(num_waiting)
        self._lag.set_function(lag_s)
