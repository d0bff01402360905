"""Reads the local span store and draws one trace as a tree with times."""

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_TRACE_ID = re.compile(r"[0-9a-f]{32}")
_MAX_DEPTH = 64


@dataclass(slots=True)
class Span:
    """One finished span. parent_id None: a root."""

    span_id: str
    parent_id: str | None
    name: str
    service: str
    start_ns: int
    end_ns: int
    status: str
    attributes: dict[str, Any]
    children: list["Span"] = field(default_factory=list)


def find(folder: Path, wanted: str) -> tuple[str, list[Span]]:
    """Returns a trace's id and its spans, by trace id or request id; an empty list where there is none."""
    trace_id = wanted if _TRACE_ID.fullmatch(wanted) else None
    if trace_id is None:
        carriers = (row["trace_id"] for row in _rows(folder, wanted) if _carries(row, wanted))
        trace_id = next(carriers, None)
        if trace_id is None:
            return wanted, []
    rows = (row for row in _rows(folder, trace_id) if row["trace_id"] == trace_id)
    spans = {row["span_id"]: _span(row) for row in rows}
    return trace_id, sorted(spans.values(), key=lambda span: span.start_ns)


def tree(spans: Iterable[Span]) -> tuple[list[Span], list[Span]]:
    """Links spans to their parents; returns the roots and those whose parent is missing (it may still run)."""
    by_id = {span.span_id: span for span in spans}
    for span in by_id.values():
        span.children.clear()
    roots, orphans = [], []
    for span in by_id.values():
        if span.parent_id is None:
            roots.append(span)
        elif span.parent_id in by_id and span.parent_id != span.span_id:
            by_id[span.parent_id].children.append(span)
        else:
            orphans.append(span)
    return roots, orphans


def render(trace_id: str, spans: list[Span]) -> list[str]:
    """Draws the tree: offset from the trace's start, duration, service, name; errors and missing parents are marked."""
    start_ns = min(span.start_ns for span in spans)
    total_ms = (max(span.end_ns for span in spans) - start_ns) / 1e6
    services = sorted({span.service for span in spans})
    lines = [f"trace {trace_id}: {len(spans)} spans, {total_ms:.1f} ms, {', '.join(services)}"]
    roots, orphans = tree(spans)
    for root in roots:
        lines += _draw(root, start_ns, "", "", 0)
    for orphan in orphans:
        lines.append(f"{'':>20}  ? parent {orphan.parent_id} is missing (not finished, or not kept)")
        lines += _draw(orphan, start_ns, "  ", "  ", 0)
    return lines


def _draw(span: Span, start_ns: int, lead: str, below: str, depth: int) -> Iterator[str]:
    offset_ms, took_ms = (span.start_ns - start_ns) / 1e6, (span.end_ns - span.start_ns) / 1e6
    mark = "  ERROR" if span.status == "ERROR" else ""
    yield f"{offset_ms:>9.1f} {took_ms:>8.1f}ms  {lead}{span.service}  {span.name}{mark}"
    if depth >= _MAX_DEPTH:
        return
    children = sorted(span.children, key=lambda child: child.start_ns)
    for child in children:
        is_last = child is children[-1]
        yield from _draw(
            child, start_ns, below + ("└─ " if is_last else "├─ "), below + ("   " if is_last else "│  "), depth + 1
        )


def _rows(folder: Path, needle: str) -> Iterator[dict[str, Any]]:
    """Rows of all services whose line holds the text; torn lines are passed over."""
    for path in sorted(folder.glob("*.jsonl*")):
        with path.open(errors="replace") as file:
            for line in file:
                if needle in line:
                    try:
                        yield json.loads(line)
                    except ValueError:
                        continue


def _carries(row: dict[str, Any], request_id: str) -> bool:
    return bool((row.get("attributes") or {}).get("request_id") == request_id)


def _span(row: dict[str, Any]) -> Span:
    return Span(
        row["span_id"],
        row.get("parent_id"),
        row["name"],
        row["service"],
        int(row["start_ns"]),
        int(row["end_ns"]),
        row.get("status", "UNSET"),
        row.get("attributes") or {},
    )
