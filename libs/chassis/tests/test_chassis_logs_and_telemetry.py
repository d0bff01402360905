import json
import logging
from pathlib import Path

from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor

from chassis import context, logs, telemetry
from chassis.telemetry import LocalSpanStore


def _format(message: str, **fields: object) -> str:
    record = logging.getLogger("t").makeRecord("t", logging.INFO, "f", 1, message, (), None, extra=fields)
    return logs.JsonFormatter("embedder").format(record)


def test_a_log_line_is_one_json_object_with_its_fields_and_the_request() -> None:
    with context.use(context.RequestContext("req_1", "acme")):
        line = json.loads(_format("rpc finished", method="Embed"))
    assert line["service"] == "embedder" and line["method"] == "Embed"
    assert line["request_id"] == "req_1" and line["tenant"] == "acme"


def test_a_value_with_newlines_cannot_forge_a_line() -> None:
    assert "\n" not in _format("m", value='x\n{"level": "FORGED"}')


def _provider(store: LocalSpanStore) -> TracerProvider:
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(store))
    return provider


def test_spans_land_in_the_local_store_with_their_parent(tmp_path: Path) -> None:
    tracer = _provider(LocalSpanStore(tmp_path, "gateway")).get_tracer("t")
    with tracer.start_as_current_span("outer") as outer:
        tracer.start_span("inner").end()
        expected = telemetry.trace_id(outer)
    rows = [json.loads(line) for line in (tmp_path / "gateway.jsonl").read_text().splitlines()]
    inner, outer_row = rows
    assert inner["parent_id"] == outer_row["span_id"] and outer_row["parent_id"] is None
    assert inner["trace_id"] == outer_row["trace_id"] == expected


def test_the_local_store_is_bounded(tmp_path: Path) -> None:
    tracer = _provider(LocalSpanStore(tmp_path, "gateway", max_bytes=4000)).get_tracer("t")
    for _ in range(200):
        tracer.start_span("s").end()
    sizes = [p.stat().st_size for p in tmp_path.iterdir()]
    assert len(sizes) == 2 and max(sizes) <= 4000


def test_a_malformed_traceparent_starts_a_new_trace(tmp_path: Path) -> None:
    tracer = _provider(LocalSpanStore(tmp_path, "gateway")).get_tracer("t")
    span = tracer.start_span("s", context=telemetry.parent_from({"traceparent": "00-zz-yy-01"}))
    assert span.parent is None  # type: ignore[attr-defined]


def test_traceparent_round_trips() -> None:
    tracer = TracerProvider().get_tracer("t")
    span = tracer.start_span("s")
    child = tracer.start_span("c", context=telemetry.parent_from({"traceparent": telemetry.traceparent(span)}))
    assert telemetry.trace_id(child) == telemetry.trace_id(span)
