"""Tables of figures, as HTML for the report and as text for a terminal."""

import html
from collections.abc import Iterable, Mapping, Sequence

from loadtest.charts import number
from loadtest.summary import Summary

_FIGURES = (
    "due", "answered", "failed", "overflow", "cut off", "answers/s", "tokens/s", "goodput", "TTFT p50 s", "p95", "p99",
    "TPOT p50 ms", "p95", "p99", "whole p50 s", "p95", "in flight", "send lag p99 ms",
)  # fmt: skip


def of_steps(steps: Sequence[Summary], unit: str) -> str:
    """A row for each step of load."""
    rows = [(f"{step.window.offered:g}", number(step.window.length_s), *_figures(step)) for step in steps]
    return _table((unit, "seconds", *_FIGURES), rows)


def of_kinds(kinds: Mapping[str, Summary]) -> str:
    """A row for each kind of traffic, over the whole test."""
    return _table(("traffic", *_FIGURES), [(kind, *_figures(summary)) for kind, summary in kinds.items()])


def of_failures(failures: Mapping[str, int]) -> str:
    """How often each status and code came; in words where there were none."""
    if not failures:
        return "<p>None.</p>"
    return _table(("status and code", "requests"), [(code, str(count)) for code, count in failures.items()])


def as_text(steps: Sequence[Summary], unit: str) -> str:
    """The steps for a terminal."""
    heads = ("", "due", "ok", "failed", "tok/s", "TTFT p50", "p95", "p99 s", "TPOT p50", "p95 ms")
    rows = [heads] + [
        (
            f"{step.window.offered:g} {unit}",
            *(str(count) for count in (step.num_due, step.num_ok, step.num_failed)),
            *(number(v) for v in (step.tokens_per_s, step.ttft_scheduled.p50, step.ttft_scheduled.p95)),
            number(step.ttft_scheduled.p99),
            *(_ms(v) for v in (step.tpot.p50, step.tpot.p95)),
        )
        for step in steps
    ]
    widths = [max(len(row[n]) for row in rows) for n in range(len(heads))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def _figures(summary: Summary) -> list[str]:
    counts = (summary.num_due, summary.num_ok, summary.num_failed, summary.num_overflow, summary.num_stopped)
    ttft, tpot, e2e = summary.ttft_scheduled, summary.tpot, summary.e2e
    return [
        *(str(count) for count in counts),
        *(number(v) for v in (summary.answers_per_s, summary.tokens_per_s, summary.goodput_tokens_per_s)),
        *(number(v) for v in (ttft.p50, ttft.p95, ttft.p99)),
        *(_ms(v) for v in (tpot.p50, tpot.p95, tpot.p99)),
        *(number(v) for v in (e2e.p50, e2e.p95, summary.mean_in_flight)),
        _ms(summary.send_lag.p99),
    ]


def _ms(seconds: float | None) -> str:
    return number(None if seconds is None else seconds * 1000)


def _table(heads: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = "".join(f"<th>{html.escape(name)}</th>" for name in heads)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
