"""The platform's metrics. Names are fixed by CONTRACTS.md; labels are bounded, never an id of a user or a request."""

from prometheus_client import Counter, Gauge, Histogram

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_TOKEN_SECONDS = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5)

REQUESTS = Counter("pressroom_requests", "Requests by method or route and outcome.", ["service", "method", "code"])
REQUEST_SECONDS = Histogram(
    "pressroom_request_seconds", "Duration of requests.", ["service", "method"], buckets=_SECONDS
)
TTFT_SECONDS = Histogram("pressroom_ttft_seconds", "Time to first token.", ["service", "model"], buckets=_SECONDS)
TPOT_SECONDS = Histogram(
    "pressroom_tpot_seconds", "Time per output token after the first.", ["service", "model"], buckets=_TOKEN_SECONDS
)
TOKENS = Counter("pressroom_tokens", "Tokens, by kind: prompt, completion or cached.", ["service", "model", "kind"])
RUNNING_SEQUENCES = Gauge("pressroom_running_sequences", "Sequences in the running batch.", ["service"])
WAITING_SEQUENCES = Gauge("pressroom_waiting_sequences", "Sequences that wait for admission.", ["service"])
ADAPTER_LOADS = Counter(
    "pressroom_adapter_loads", "Loads of adapters, by outcome: loaded, present or failed.", ["service", "outcome"]
)
LOADED_ADAPTERS = Gauge("pressroom_loaded_adapters", "Adapters that answer.", ["service"])
QUEUE_DEPTH = Gauge("pressroom_queue_depth", "Work that waits in the service.", ["service"])
BUS_MESSAGES = Counter(
    "pressroom_bus_messages", "Messages handled, by consumer and outcome.", ["service", "consumer", "outcome"]
)
