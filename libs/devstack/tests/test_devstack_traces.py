import json
from pathlib import Path

import pytest

from devstack import traces

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"


def _row(span: str, parent: str | None, service: str, name: str, start_ms: float, end_ms: float, **more: object) -> str:
    row = {
        "trace_id": TRACE,
        "span_id": span,
        "parent_id": parent,
        "name": name,
        "service": service,
        "start_ns": int(start_ms * 1e6),
        "end_ns": int(end_ms * 1e6),
        "status": "UNSET",
        "attributes": {},
    }
    return json.dumps(row | more) + "\n"


@pytest.fixture
def store(tmp_path: Path) -> Path:
    (tmp_path / "gateway.jsonl").write_text(
        _row("a", None, "gateway", "POST /v1/chat/completions", 100, 350, attributes={"request_id": "req_1"})
        + _row("b", "a", "gateway", "embedder.Embed", 101, 110)
        + "{torn"
    )
    (tmp_path / "gateway.jsonl.1").write_text(_row("x", None, "gateway", "other", 0, 1, trace_id="0" * 32))
    (tmp_path / "embedder.jsonl").write_text(_row("c", "b", "embedder", "Embed", 102, 109, status="ERROR"))
    (tmp_path / "monitor.jsonl").write_text(_row("d", "gone", "monitor", "consume", 400, 410))
    return tmp_path


def test_tree_shows_offsets_durations_nesting_errors_and_missing_parents(store: Path) -> None:
    trace_id, spans = traces.find(store, TRACE)
    lines = traces.render(trace_id, spans)
    assert lines[0] == f"trace {TRACE}: 4 spans, 310.0 ms, embedder, gateway, monitor"
    assert lines[1] == "      0.0    250.0ms  gateway  POST /v1/chat/completions"
    assert lines[2] == "      1.0      9.0ms  └─ gateway  embedder.Embed"
    assert lines[3] == "      2.0      7.0ms     └─ embedder  Embed  ERROR"
    assert "parent gone is missing" in lines[4]
    assert lines[5] == "    300.0     10.0ms    monitor  consume"


def test_request_id_finds_its_trace(store: Path) -> None:
    trace_id, spans = traces.find(store, "req_1")
    assert trace_id == TRACE
    assert {span.span_id for span in spans} == {"a", "b", "c", "d"}


def test_unknown_id_finds_nothing(store: Path) -> None:
    assert traces.find(store, "f" * 32)[1] == []
    assert traces.find(store, "req_2")[1] == []
