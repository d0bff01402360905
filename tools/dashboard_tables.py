"""What the dashboards show: panels with their queries, units and notes. gen_dashboards.py renders it."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Panel:
    """One picture. queries: (PromQL, legend). unit: Grafana's word. lowest: of the y axis; None lets Grafana choose."""

    title: str
    unit: str
    queries: Sequence[tuple[str, str]]
    note: str
    width: int = 8
    kind: str = "timeseries"
    lowest: float | None = 0


@dataclass(frozen=True)
class Dashboard:
    """rows: (title, panels). variables: (name, label_values query); each offers all."""

    uid: str
    title: str
    description: str
    rows: Sequence[tuple[str, Sequence[Panel]]]
    variables: Sequence[tuple[str, str]] = ()


def quantiles(metric: str, matchers: str, by: str, *quantile: float) -> list[tuple[str, str]]:
    """Queries for quantiles of a histogram, by a label."""
    rate = f"sum by (le, {by}) (rate({metric}_bucket{{{matchers}}}[$__rate_interval]))"
    return [(f"histogram_quantile({q}, {rate})", f"p{q * 100:g} {{{{{by}}}}}") for q in quantile]


GATEWAY = 'service="gateway", method=~"/v1/.*"'

SIGNALS = Dashboard(
    uid="pressroom-signals",
    title="Pressroom: golden signals",
    description="Latency, traffic, errors and saturation of the platform. Start here when an alert has fired.",
    rows=[
        (
            "Traffic and errors",
            [
                Panel(
                    "Requests by route",
                    "reqps",
                    [
                        (
                            f"sum by (method) (rate(pressroom_requests_total{{{GATEWAY}}}[$__rate_interval]))",
                            "{{method}}",
                        )
                    ],
                    "Every request that the gateway answered, refusals included.",
                ),
                Panel(
                    "Requests by status",
                    "reqps",
                    [(f"sum by (code) (rate(pressroom_requests_total{{{GATEWAY}}}[$__rate_interval]))", "{{code}}")],
                    "499: the client left. A stream that breaks off has had its 200 already; see the next panel.",
                ),
                Panel(
                    "Errors",
                    "percentunit",
                    [
                        ("pressroom:http_errors:ratio_rate5m", "5xx, 5 min"),
                        ("pressroom:http_errors:ratio_rate1h", "5xx, 1 h"),
                        (
                            '(sum(rate(pressroom_monitor_records_total{finish_reason="error"}[$__rate_interval])) '
                            "or vector(0)) / sum(rate(pressroom_monitor_records_total[$__rate_interval]))",
                            "requests that ended with an error",
                        ),
                    ],
                    "The budget is 1% of the requests. The last curve counts broken streams too.",
                ),
            ],
        ),
        (
            "Latency",
            [
                Panel(
                    "Time to the first token",
                    "s",
                    quantiles("pressroom_ttft_seconds", 'service="gateway"', "model", 0.5, 0.95),
                    "From the arrival at the gateway to the first text.",
                ),
                Panel(
                    "Duration by route, p95",
                    "s",
                    quantiles("pressroom_request_seconds", GATEWAY, "method", 0.95),
                    "The whole request; a stream lasts as long as its answer is.",
                ),
                Panel(
                    "Duration of calls between services, p95",
                    "s",
                    [
                        (
                            "histogram_quantile(0.95, sum by (le, service, method) (rate("
                            'pressroom_request_seconds_bucket{service!="gateway", service=~"$service"}'
                            "[$__rate_interval])))",
                            "{{service}} {{method}}",
                        )
                    ],
                    "gRPC calls, by the service that answered.",
                ),
            ],
        ),
        (
            "Saturation",
            [
                Panel(
                    "Sequences",
                    "short",
                    [
                        ("sum by (service) (pressroom_running_sequences)", "running"),
                        ("sum by (service) (pressroom_waiting_sequences)", "waiting"),
                    ],
                    "Waiting sequences have been accepted and wait for room in the batch.",
                    6,
                ),
                Panel(
                    "Queues",
                    "short",
                    [('sum by (service) (pressroom_queue_depth{service=~"$service"})', "{{service}}")],
                    "Jobs and events that wait, texts before the embedder, sequences before the generator.",
                    6,
                ),
                Panel(
                    "Processor",
                    "short",
                    [
                        (
                            'sum by (service) (rate(process_cpu_seconds_total{job="pressroom", service=~"$service"}'
                            "[$__rate_interval]))",
                            "{{service}}",
                        )
                    ],
                    "Cores in use, child processes not counted.",
                    6,
                ),
                Panel(
                    "Memory",
                    "bytes",
                    [
                        (
                            'sum by (service) (process_resident_memory_bytes{job="pressroom", service=~"$service"})',
                            "{{service}}",
                        )
                    ],
                    "Resident, child processes not counted.",
                    6,
                ),
            ],
        ),
        (
            "Flow control",
            [
                Panel(
                    "Places at the backends",
                    "short",
                    [
                        ("sum by (backend) (pressroom_admission_waiting)", "{{backend}} requests waiting"),
                        ("sum by (backend) (pressroom_admission_running)", "{{backend}} sequences running"),
                        ("sum by (backend) (pressroom_admission_limit)", "{{backend}} limit"),
                    ],
                    "What the gateway holds back, has let through, and lets through at most (found out by itself).",
                ),
                Panel(
                    "Wait for a turn",
                    "s",
                    quantiles("pressroom_admission_wait_seconds", "", "backend", 0.5, 0.95),
                    "Of the requests that went on. A part of the time to the first token.",
                ),
                Panel(
                    "Shed requests",
                    "reqps",
                    [
                        (
                            "sum by (backend, cause) (rate(pressroom_admission_shed_total[$__rate_interval]))",
                            "{{backend}} {{cause}}",
                        )
                    ],
                    "503 at arrival. wait and deadline: it would have come too late; full: no place in the queue.",
                ),
                Panel(
                    "Retries",
                    "reqps",
                    [
                        (
                            "sum by (backend, outcome) (rate(pressroom_backend_retries_total[$__rate_interval]))",
                            "{{backend}} {{outcome}}",
                        )
                    ],
                    "Before the first token. denied: the budget of a tenth of the requests was spent.",
                ),
                Panel(
                    "Breakers",
                    "short",
                    [("max by (backend, address) (pressroom_breaker_state)", "{{backend}} {{address}}")],
                    "0: it is asked. 2: it failed and is left alone. 1: the next request tries it.",
                ),
                Panel(
                    "Answers by a fallback",
                    "reqps",
                    [
                        (
                            "sum by (model, answered_by) (rate(pressroom_fallbacks_total[$__rate_interval]))",
                            "{{model}} by {{answered_by}}",
                        )
                    ],
                    "Another model answered than the one that was asked.",
                ),
            ],
        ),
        (
            "Services",
            [
                Panel(
                    "Up",
                    "short",
                    [('min by (service) (up{job="pressroom"})', "{{service}}")],
                    "1: the service answers Prometheus.",
                    8,
                    "stat",
                ),
                Panel(
                    "Failed calls between services",
                    "reqps",
                    [
                        (
                            'sum by (service, method, code) (rate(pressroom_requests_total{service!="gateway", '
                            'service=~"$service", code!~"OK|CANCELLED"}[$__rate_interval]))',
                            "{{service}} {{method}} {{code}}",
                        )
                    ],
                    "By gRPC method and code. INTERNAL and DATA_LOSS are faults of ours.",
                    16,
                ),
            ],
        ),
    ],
    variables=[("service", "label_values(pressroom_queue_depth, service)")],
)

MODELS = Dashboard(
    uid="pressroom-models",
    title="Pressroom: models and tokens",
    description="What the models do: first token, time per token, tokens, prefix cache, adapters.",
    rows=[
        (
            "As clients see it",
            [
                Panel(
                    "Time to the first token",
                    "s",
                    quantiles("pressroom_ttft_seconds", 'service="gateway", model=~"$model"', "model", 0.5, 0.95, 0.99),
                    "At the gateway: retrieval and waiting are in it.",
                    12,
                ),
                Panel(
                    "Time per output token",
                    "s",
                    quantiles("pressroom_tpot_seconds", 'service="gateway", model=~"$model"', "model", 0.5, 0.95, 0.99),
                    "Of each token after the first. Its inverse is the speed of one stream.",
                    12,
                ),
            ],
        ),
        (
            "Tokens",
            [
                Panel(
                    "Output tokens",
                    "short",
                    [
                        (
                            'sum by (model) (rate(pressroom_tokens_total{service="gateway", kind="completion", '
                            'model=~"$model"}[$__rate_interval]))',
                            "{{model}}",
                        )
                    ],
                    "Tokens per second, counted when a request ends.",
                ),
                Panel(
                    "Prompt tokens",
                    "short",
                    [
                        (
                            'sum by (model) (rate(pressroom_tokens_total{service="gateway", kind="prompt", '
                            'model=~"$model"}[$__rate_interval]))',
                            "{{model}}",
                        )
                    ],
                    "Tokens per second, counted when a request ends.",
                ),
                Panel(
                    "Share of the prompt out of the prefix cache",
                    "percentunit",
                    [
                        (
                            'sum by (model) (rate(pressroom_tokens_total{service="generator", kind="cached"}'
                            "[$__rate_interval])) / sum by (model) (rate(pressroom_tokens_total"
                            '{service="generator", kind="prompt"}[$__rate_interval]))',
                            "{{model}}",
                        )
                    ],
                    "Prompt tokens whose keys and values were there already.",
                ),
                Panel(
                    "Records of usage",
                    "reqps",
                    [
                        (
                            "sum by (outcome) (rate(pressroom_usage_records_total[$__rate_interval]))",
                            "{{outcome}}",
                        )
                    ],
                    "received: the generator could not be asked what a broken stream used. lost: not in the ledger.",
                ),
            ],
        ),
        (
            "The engine",
            [
                Panel(
                    "First token inside the generator",
                    "s",
                    quantiles("pressroom_ttft_seconds", 'service="generator"', "model", 0.5, 0.95),
                    "The difference to the gateway's figure is retrieval and transport.",
                ),
                Panel(
                    "Running and waiting sequences",
                    "short",
                    [
                        ("sum by (service) (pressroom_running_sequences)", "running"),
                        ("sum by (service) (pressroom_waiting_sequences)", "waiting"),
                    ],
                    "More waiting than running for long means that the load is beyond the knee.",
                ),
                Panel(
                    "Computed tokens",
                    "short",
                    [
                        (
                            "sum by (kind) (rate(pressroom_engine_tokens_total[$__rate_interval]))",
                            "{{kind}}",
                        )
                    ],
                    "Tokens per second at the step that computed them; what was set back counts twice.",
                ),
            ],
        ),
        (
            "The engine's steps",
            [
                Panel(
                    "Where the time of a step goes",
                    "s",
                    [
                        (
                            "sum by (part) (rate(pressroom_step_seconds_sum[$__rate_interval])) / ignoring (part) "
                            "group_left () sum(rate(pressroom_batch_sequences_count[$__rate_interval]))",
                            "{{part}}, mean",
                        ),
                        *quantiles("pressroom_step_seconds", 'part="forward"', "part", 0.95),
                    ],
                    "Schedule: what runs next. Forward: the model. Sample: picking tokens, log probabilities included.",
                ),
                Panel(
                    "Batch",
                    "short",
                    [
                        (
                            "sum(rate(pressroom_batch_sequences_sum[$__rate_interval])) "
                            "/ sum(rate(pressroom_batch_sequences_count[$__rate_interval]))",
                            "mean",
                        ),
                        (
                            "histogram_quantile(0.95, sum by (le) "
                            "(rate(pressroom_batch_sequences_bucket[$__rate_interval])))",
                            "p95",
                        ),
                    ],
                    "Sequences in one step.",
                ),
                Panel(
                    "Guessed tokens",
                    "short",
                    [("sum by (outcome) (rate(pressroom_draft_tokens_total[$__rate_interval]))", "{{outcome}}")],
                    "Speculation by prompt lookup, tokens per second: each accepted one spares a step.",
                ),
            ],
        ),
        (
            "The engine's memory",
            [
                Panel(
                    "Blocks of keys and values",
                    "short",
                    [
                        ("sum by (service) (pressroom_kv_blocks_used)", "used"),
                        ("sum by (service) (pressroom_kv_blocks_capacity)", "all"),
                    ],
                    "When they run out, the youngest sequence is set back.",
                    6,
                ),
                Panel(
                    "Preemptions",
                    "cps",
                    [("sum by (service) (rate(pressroom_preemptions_total[$__rate_interval]))", "set back")],
                    "Sequences that gave their blocks to others and are computed anew.",
                    6,
                ),
                Panel(
                    "Prefix cache",
                    "percentunit",
                    [
                        (
                            "sum(rate(pressroom_prefix_hit_tokens_total[$__rate_interval])) "
                            "/ sum(rate(pressroom_prefix_query_tokens_total[$__rate_interval]))",
                            "found",
                        )
                    ],
                    "Share of the prompts' tokens that the cache had, when they were admitted.",
                    6,
                ),
                Panel(
                    "Compiling grammars",
                    "s",
                    quantiles("pressroom_grammar_compile_seconds", 'outcome=~".+"', "outcome", 0.5, 0.95),
                    "JSON Schemas, regular expressions and choices; one that was asked before is ready at once.",
                    6,
                ),
                Panel(
                    "Adapters",
                    "short",
                    [
                        ("sum by (service) (pressroom_known_adapters)", "known"),
                        ("sum by (service) (pressroom_loaded_adapters)", "loaded"),
                    ],
                    "Finetuned models that may be asked for, and those of them that are in memory.",
                ),
                Panel(
                    "Loads of adapters",
                    "short",
                    [
                        (
                            "sum by (outcome) (increase(pressroom_adapter_loads_total[$__rate_interval]))",
                            "{{outcome}}",
                        ),
                        ("sum(increase(pressroom_adapter_evictions_total[$__rate_interval]))", "evicted"),
                    ],
                    "full: all others were in use. busy: no time for the probe. evicted: made room for another one.",
                ),
                Panel(
                    "Memory of adapters",
                    "bytes",
                    [("sum by (service) (pressroom_adapter_bytes)", "adapters")],
                    "Those being probed, and replaced ones that still run, included.",
                ),
            ],
        ),
        (
            "How answers end",
            [
                Panel(
                    "Requests by finish reason",
                    "reqps",
                    [
                        (
                            'sum by (finish_reason) (rate(pressroom_monitor_records_total{model=~"$model"}'
                            "[$__rate_interval]))",
                            "{{finish_reason}}",
                        )
                    ],
                    "As the monitor heard it on the bus.",
                    12,
                ),
                Panel(
                    "Tokens as the monitor heard them",
                    "short",
                    [
                        (
                            'sum by (model, kind) (rate(pressroom_monitor_tokens_total{model=~"$model"}'
                            "[$__rate_interval]))",
                            "{{model}} {{kind}}",
                        )
                    ],
                    "Tokens per second. Where it stays below the gateway's figure, events wait on the bus.",
                    12,
                ),
            ],
        ),
    ],
    variables=[("model", 'label_values(pressroom_ttft_seconds_count{service="gateway"}, model)')],
)

WORK = Dashboard(
    uid="pressroom-work",
    title="Pressroom: jobs, bus and profiles",
    description="What nobody waits for: ingest, training, evaluation, events, and the monitor's profiles.",
    rows=[
        (
            "Bus",
            [
                Panel(
                    "Messages handled",
                    "cps",
                    [
                        (
                            'sum by (service, consumer) (rate(pressroom_bus_messages_total{outcome="ack"}'
                            "[$__rate_interval]))",
                            "{{service}} {{consumer}}",
                        )
                    ],
                    "Done and acknowledged.",
                ),
                Panel(
                    "Messages that were not",
                    "cps",
                    [
                        (
                            'sum by (service, consumer, outcome) (rate(pressroom_bus_messages_total{outcome!="ack"}'
                            "[$__rate_interval]))",
                            "{{service}} {{consumer}} {{outcome}}",
                        )
                    ],
                    "retry: comes again. dead: given up, kept in the stream DEAD. unconfirmed: done, may come again.",
                ),
                Panel(
                    "Backlog",
                    "short",
                    [
                        (
                            'sum by (service) (pressroom_queue_depth{service=~"retriever|trainer|evaluator|monitor"})',
                            "{{service}}",
                        )
                    ],
                    "Messages that wait, those in work included.",
                ),
            ],
        ),
        (
            "Finetuning",
            [
                Panel(
                    "Training jobs that ended",
                    "short",
                    [("sum by (outcome) (increase(pressroom_train_jobs_total[1h]))", "{{outcome}}")],
                    "Within an hour. Most failures are data that the owner must mend: `./pressroom jobs show ID`.",
                    12,
                ),
                Panel(
                    "Optimizer steps",
                    "cps",
                    [("sum(rate(pressroom_train_steps_total[$__rate_interval]))", "steps per second")],
                    "At low priority: it sinks while chat is busy. No steps with a job that runs means that it hangs.",
                    12,
                ),
            ],
        ),
        (
            "Monitor",
            [
                Panel(
                    "Behind by",
                    "s",
                    [("max(pressroom_monitor_lag_seconds)", "oldest waiting sample")],
                    "How long ago the request ended that waits longest for its profile.",
                    6,
                ),
                Panel(
                    "Samples",
                    "cps",
                    [
                        ("sum by (outcome) (rate(pressroom_monitor_samples_total[$__rate_interval]))", "{{outcome}}"),
                    ],
                    "dropped: too many waited.",
                    6,
                ),
                Panel(
                    "Time of one batch",
                    "s",
                    [
                        (
                            "histogram_quantile(0.95, sum by (le) (rate(pressroom_monitor_profile_seconds_bucket"
                            "[$__rate_interval])))",
                            "p95",
                        ),
                    ],
                    "At low priority: it grows when chat needs the cores.",
                    6,
                ),
                Panel(
                    "Waiting samples",
                    "short",
                    [("sum(pressroom_monitor_waiting_samples)", "waiting")],
                    "Sampled records whose profile is not made yet.",
                    6,
                ),
                Panel(
                    "Share that is profiled",
                    "percentunit",
                    [("max(pressroom_monitor_sample_rate)", "share of the records")],
                    "The rate of sampling that is set; the rest is counted, and not read.",
                    6,
                    "stat",
                ),
                Panel(
                    "Means of the profiles",
                    "short",
                    [
                        (
                            'avg by (model, column) (pressroom_monitor_column_mean{model=~"$model"})',
                            "{{model}} {{column}}",
                        )
                    ],
                    "Of the newest window: readability, sentiment, similarity to known attacks and the others.",
                    18,
                    lowest=None,
                ),
            ],
        ),
        (
            "Limits",
            [
                Panel(
                    "Limits without room",
                    "reqps",
                    [
                        (
                            "sum by (scope, counted) (rate(pressroom_limit_refusals_total[$__rate_interval]))",
                            "{{scope}} {{counted}}",
                        ),
                        (
                            f'sum(rate(pressroom_requests_total{{{GATEWAY}, code="429"}}[$__rate_interval])) '
                            "or vector(0)",
                            "429",
                        ),
                    ],
                    "By whose limit it is and what it counts. Several may refuse one request; 429 counts requests.",
                    12,
                ),
                Panel(
                    "Limits without Valkey",
                    "reqps",
                    [
                        (
                            "sum(rate(pressroom_limiter_local_decisions_total[$__rate_interval]))",
                            "decided alone",
                        ),
                        (
                            "sum(rate(pressroom_limiter_unsettled_total[$__rate_interval]))",
                            "never given back",
                        ),
                    ],
                    "Alone each gateway counts for itself. What was not given back in time counts as used in full.",
                    12,
                ),
                Panel(
                    "Repeats",
                    "reqps",
                    [("sum by (outcome) (rate(pressroom_repeats_total[$__rate_interval]))", "{{outcome}}")],
                    "Answered from the cache (hit) or from another's run (shared); miss: looked up, not found.",
                    12,
                ),
            ],
        ),
    ],
    variables=[("model", "label_values(pressroom_monitor_records_total, model)")],
)

DASHBOARDS = (SIGNALS, MODELS, WORK)
