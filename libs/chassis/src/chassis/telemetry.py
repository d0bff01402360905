"""Traces: OpenTelemetry spans to a collector, or to a local span store where none is configured.

The local store is one JSON line for each finished span in `<trace_dir>/<service>.jsonl`, rotated once to `.1`, so it
is bounded and survives the process.
"""

import functools
import json
import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

from opentelemetry import context as otel_context
from opentelemetry import trace
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

_PROPAGATOR = TraceContextTextMapPropagator()
_EXPORT_DELAY_MS = 200  # a person who asks for a trace right after the answer should find it


class LocalSpanStore(SpanExporter):
    """Appends finished spans to a file that is rotated at `max_bytes`."""

    def __init__(self, directory: Path, service: str, max_bytes: int = 32 * 1024 * 1024) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._path = directory / f"{service}.jsonl"
        self._service = service
        self._max_bytes = max_bytes
        self._lock = threading.Lock()

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        lines = "".join(json.dumps(self._row(span), default=str) + "\n" for span in spans)
        try:
            with self._lock:
                if self._path.exists() and self._path.stat().st_size + len(lines) > self._max_bytes:
                    os.replace(self._path, self._path.with_suffix(".jsonl.1"))
                with self._path.open("a") as file:
                    file.write(lines)
        except OSError:  # a full disk must not take requests down; the SDK counts the failure
            return SpanExportResult.FAILURE
        return SpanExportResult.SUCCESS

    def _row(self, span: ReadableSpan) -> dict[str, object]:
        own = span.get_span_context()
        assert own is not None
        return {
            "trace_id": f"{own.trace_id:032x}",
            "span_id": f"{own.span_id:016x}",
            "parent_id": f"{span.parent.span_id:016x}" if span.parent else None,
            "name": span.name,
            "service": self._service,
            "start_ns": span.start_time,
            "end_ns": span.end_time,
            "status": span.status.status_code.name,
            "attributes": dict(span.attributes or {}),
        }


def configure(service: str, trace_dir: Path | None, otlp_endpoint: str | None, version: str) -> TracerProvider:
    """Sets the process's tracer provider. Called once, from the composition root; shut the result down at the end."""
    provider = TracerProvider(
        resource=Resource.create({"service.name": f"pressroom-{service}", "service.version": version})
    )
    exporter: SpanExporter | None = None
    if otlp_endpoint:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter  # heavy, only where used

        exporter = OTLPSpanExporter(endpoint=otlp_endpoint, insecure=otlp_endpoint.startswith("http://"))
    elif trace_dir is not None:
        exporter = LocalSpanStore(trace_dir, service)
    if exporter is not None:
        provider.add_span_processor(BatchSpanProcessor(exporter, schedule_delay_millis=_EXPORT_DELAY_MS))
    trace.set_tracer_provider(provider)
    return provider


def tracer() -> trace.Tracer:
    """Returns the tracer of the process."""
    return _tracer_of(trace.get_tracer_provider())


@functools.lru_cache(maxsize=1)
def _tracer_of(provider: trace.TracerProvider) -> trace.Tracer:
    # Asking a provider makes a new tracer each time, which takes longer than a span.
    return provider.get_tracer("pressroom")


def traceparent(span: trace.Span | None = None) -> str:
    """Returns the W3C traceparent of a span (default: the current one); empty where there is none."""
    own = (span or trace.get_current_span()).get_span_context()
    return f"00-{own.trace_id:032x}-{own.span_id:016x}-{own.trace_flags:02x}" if own.is_valid else ""


def parent_from(carrier: Mapping[str, str]) -> otel_context.Context:
    """Returns the context that a carrier's `traceparent` names; a malformed one starts a new trace."""
    nothing = otel_context.Context()
    return _PROPAGATOR.extract(dict(carrier), context=nothing) if carrier.get("traceparent") else nothing


def trace_id(span: trace.Span | None = None) -> str:
    """Returns the trace id of a span (default: the current one) as 32 hex digits; empty where there is none."""
    own = (span or trace.get_current_span()).get_span_context()
    return f"{own.trace_id:032x}" if own.is_valid else ""
