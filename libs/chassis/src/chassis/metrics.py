"""The platform's metrics. Names are fixed by CONTRACTS.md; labels are bounded, never an id of a user or a request."""

from prometheus_client import Counter, Gauge, Histogram

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_STEP_SECONDS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
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
USAGE_RECORDS = Counter(
    "pressroom_usage_records",
    "Requests accounted for, by outcome: exact, received (the generator could not be asked what it used) or lost.",
    ["service", "outcome"],
)
RUNNING_SEQUENCES = Gauge("pressroom_running_sequences", "Sequences in the running batch.", ["service"])
WAITING_SEQUENCES = Gauge("pressroom_waiting_sequences", "Sequences that wait for admission.", ["service"])
PREEMPTIONS = Counter("pressroom_preemptions", "Sequences set back to free KV blocks for others.", ["service"])
KV_BLOCKS_USED = Gauge("pressroom_kv_blocks_used", "Blocks of key and value memory in use.", ["service"])
KV_BLOCKS_CAPACITY = Gauge("pressroom_kv_blocks_capacity", "Blocks of key and value memory in all.", ["service"])
PREFIX_QUERY_TOKENS = Counter(
    "pressroom_prefix_query_tokens", "Prompt tokens looked up in the prefix cache.", ["service"]
)
PREFIX_HIT_TOKENS = Counter("pressroom_prefix_hit_tokens", "Prompt tokens found in the prefix cache.", ["service"])
ENGINE_TOKENS = Counter(
    "pressroom_engine_tokens",
    "Tokens at the step that computed them: prompt (what was computed, again after a preemption) or completion.",
    ["service", "kind"],
)
STEP_SECONDS = Histogram(
    "pressroom_step_seconds",
    "Time of one step, by part: schedule, forward or sample.",
    ["service", "part"],
    buckets=_STEP_SECONDS,
)
BATCH_SEQUENCES = Histogram("pressroom_batch_sequences", "Sequences in one step.", ["service"], buckets=_SIZES)
DRAFT_TOKENS = Counter(
    "pressroom_draft_tokens", "Tokens guessed by speculation, by outcome: accepted or rejected.", ["service", "outcome"]
)
GRAMMAR_COMPILE_SECONDS = Histogram(
    "pressroom_grammar_compile_seconds",
    "Time to compile a grammar, by outcome: compiled or refused.",
    ["service", "outcome"],
    buckets=_SECONDS,
)
ADAPTER_LOADS = Counter(
    "pressroom_adapter_loads",
    "Loads of adapters, by outcome: loaded, present, full, busy or failed.",
    ["service", "outcome"],
)
ADAPTER_EVICTIONS = Counter("pressroom_adapter_evictions", "Adapters that made room for others.", ["service"])
ADAPTER_BYTES = Gauge("pressroom_adapter_bytes", "Memory of adapters.", ["service"])
LOADED_ADAPTERS = Gauge("pressroom_loaded_adapters", "Adapters that are loaded.", ["service"])
KNOWN_ADAPTERS = Gauge("pressroom_known_adapters", "Adapters that may be asked for, loaded or not.", ["service"])
REPEATS = Counter(
    "pressroom_repeats",
    "Requests to a model by what the cache or another's run did for them: hit, miss or shared.",
    ["service", "outcome"],
)
QUEUE_DEPTH = Gauge("pressroom_queue_depth", "Work that waits in the service.", ["service"])
BUS_MESSAGES = Counter(
    "pressroom_bus_messages", "Messages handled, by consumer and outcome.", ["service", "consumer", "outcome"]
)
