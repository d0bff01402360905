"""What is told of a request when it has ended, in whatever way: one log line, the metrics, and the engine's spans."""

import contextlib
import logging

from opentelemetry import trace

from chassis import metrics, telemetry
from generator.core.events import Summary

log = logging.getLogger(__name__)

SERVICE = "generator"


def settle(summary: Summary, model_id: str, adapter: str = "") -> None:
    """Accounts for an ended request. model_id: what it is counted under, the adapter's id where it used one.

    Runs in the request's context, so ids and the parent span are its own.
    """
    _count(summary, model_id)
    _trace(summary)
    log.info(
        "generation finished",
        extra={
            "model": model_id,
            "adapter": adapter,
            "finish_reasons": [reason.value for reason in summary.reasons],
            "prompt_tokens": summary.num_prompt,
            "completion_tokens": summary.num_completion,
            "cached_tokens": summary.num_cached,
            "drafted_tokens": summary.num_drafted,
            "accepted_tokens": summary.num_accepted,
            "num_preemptions": summary.num_preemptions,
            "queue_s": round(summary.queue_s, 4),
            "prefill_s": round(summary.prefill_s, 4),
            "decode_s": round(summary.decode_s, 4),
            "ttft_s": _rounded(summary.ttft_s, 4),
            "tpot_s": _rounded(summary.tpot_s, 5),
            "tokens_per_s": _rounded(summary.tokens_per_s, 1),
        },
    )


def _rounded(value: float | None, digits: int) -> float | None:
    return None if value is None else round(value, digits)


def _count(summary: Summary, model_id: str) -> None:
    metrics.TOKENS.labels(SERVICE, model_id, "prompt").inc(summary.num_prompt_read)
    metrics.TOKENS.labels(SERVICE, model_id, "completion").inc(summary.num_completion)
    metrics.TOKENS.labels(SERVICE, model_id, "cached").inc(summary.num_cached)
    if summary.ttft_s is not None:
        metrics.TTFT_SECONDS.labels(SERVICE, model_id).observe(summary.ttft_s)
    if summary.tpot_s is not None:
        metrics.TPOT_SECONDS.labels(SERVICE, model_id).observe(summary.tpot_s)


def _trace(summary: Summary) -> None:
    """The engine batches requests, so no span can be open while it works: they are drawn afterwards, from its times."""
    if summary.admitted_s is None:
        return
    prefill_end_s = summary.first_token_s or summary.finished_s
    prefill = {"num_prompt": summary.num_prompt, "queue_s": summary.queue_s, "preemptions": summary.num_preemptions}
    _draw("engine.prefill", summary.admitted_s, prefill_end_s, prefill)
    if summary.first_token_s is not None:
        _draw("engine.decode", summary.first_token_s, summary.finished_s, {"num_completion": summary.num_completion})


def _draw(name: str, start_s: float, end_s: float, attributes: dict[str, float]) -> None:
    span = telemetry.tracer().start_span(
        name, kind=trace.SpanKind.INTERNAL, start_time=int(start_s * 1e9), attributes=attributes
    )
    span.end(int(end_s * 1e9))


def count_adapter_load(outcome: str) -> None:
    """Counts a load of an adapter: "loaded", "present", "full", "busy" or "failed"."""
    metrics.ADAPTER_LOADS.labels(SERVICE, outcome).inc()


def forget(adapter_id: str) -> None:
    """Drops the metrics of an adapter that is gone, so that labels stay as few as what may be asked for."""
    for metric, kinds in (
        (metrics.TOKENS, ("prompt", "completion", "cached")),
        (metrics.TTFT_SECONDS, None),
        (metrics.TPOT_SECONDS, None),
    ):
        for labels in [(kind,) for kind in kinds] if kinds else [()]:
            with contextlib.suppress(KeyError):  # it was never asked anything
                metric.remove(SERVICE, adapter_id, *labels)
