"""Metrics that only the gateway has."""

from prometheus_client import Counter, Gauge, Histogram

from gateway.core.admission import Cause, Lane
from gateway.core.circuit import Circuit
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
ADMISSION_WAIT_SECONDS = Histogram(
    "pressroom_admission_wait_seconds",
    "Time from arrival at a backend's queue to the turn.",
    ["backend"],
    buckets=(0.001, 0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0),
)
ADMISSION_WAITING = Gauge("pressroom_admission_waiting", "Requests that wait for their turn.", ["backend"])
ADMISSION_RUNNING = Gauge("pressroom_admission_running", "Sequences that a backend was given.", ["backend"])
ADMISSION_LIMIT = Gauge("pressroom_admission_limit", "Sequences that a backend may be given at once.", ["backend"])
ADMISSION_SHED = Counter(
    "pressroom_admission_shed", "Requests that were refused, by cause: full, wait or deadline.", ["backend", "cause"]
)
BACKEND_RETRIES = Counter(
    "pressroom_backend_retries", "Retries, by outcome: succeeded, failed or denied.", ["backend", "outcome"]
)
BREAKER_STATE = Gauge(
    "pressroom_breaker_state", "Whether a backend is asked: 0 closed, 1 half-open, 2 open.", ["backend", "address"]
)
FALLBACKS = Counter(
    "pressroom_fallbacks", "Answers by another model than the one that was asked.", ["model", "answered_by"]
)


class LaneMeter:
    """Counts what happens at one backend's queue, and what becomes of its retries."""

    def __init__(self, backend: str) -> None:
        self._backend = backend
        self._wait = ADMISSION_WAIT_SECONDS.labels(backend)
        for cause in Cause:  # so that a rate sees the first one
            ADMISSION_SHED.labels(backend, cause)
        for outcome in ("succeeded", "failed", "denied"):
            BACKEND_RETRIES.labels(backend, outcome)

    def admitted(self, wait_s: float) -> None:
        """A request goes on after so long."""
        self._wait.observe(wait_s)

    def shed(self, cause: Cause) -> None:
        """A request was refused."""
        ADMISSION_SHED.labels(self._backend, cause).inc()

    def retried(self, outcome: str) -> None:
        """A retry came to this end."""
        BACKEND_RETRIES.labels(self._backend, outcome).inc()

    def watch(self, lane: Lane) -> None:
        """Shows its queue from now on."""
        ADMISSION_WAITING.labels(self._backend).set_function(lambda: lane.num_waiting)
        ADMISSION_RUNNING.labels(self._backend).set_function(lambda: lane.num_running)
        ADMISSION_LIMIT.labels(self._backend).set_function(lambda: lane.capacity.limit)

    def watch_breaker(self, address: str, breaker: Circuit) -> None:
        """Shows whether the backend at this address is asked."""
        BREAKER_STATE.labels(self._backend, address).set_function(lambda: breaker.state)


def count_fallback(asked: str, answers: str) -> None:
    """Another model answers than the one that was asked."""
    FALLBACKS.labels(asked, answers).inc()


def count_refusal(meter: Meter) -> None:
    """A limit had no room for a request."""
    LIMIT_REFUSALS.labels(meter.scope.value, meter.limit.counted.value).inc()
