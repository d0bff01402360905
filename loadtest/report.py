"""One HTML file that holds everything: figures, curves over the load and over time, the knee. No script, no network."""

import html
from collections.abc import Iterable, Sequence
from pathlib import Path

from loadtest import tables
from loadtest.charts import Limit, Line, Mark, line_chart, number
from loadtest.knee import Knee, find_knee
from loadtest.recording import REPORT_NAME, Recorded
from loadtest.rows import Row
from loadtest.summary import Percentiles, Series, Slo, Summary, over_time, summarize, summarize_all, within_slo

_STYLE = Path(__file__).with_name("report.css")


class Figures:
    """Everything that the report says, computed once."""

    def __init__(self, recorded: Recorded) -> None:
        self.recorded = recorded
        self.steps = sorted(
            (summarize(recorded.rows, window, recorded.slo) for window in recorded.windows),
            key=lambda summary: summary.window.offered,
        )
        self.whole = summarize_all(recorded.rows, recorded.windows, recorded.end_s, recorded.slo)
        self.kinds = _by_kind(recorded)
        self.series: Series = over_time(recorded.rows, recorded.end_s)
        self.knee = _knee(self.steps)
        self.within_slo = within_slo(self.steps, recorded.slo)

    @property
    def knee_step(self) -> Summary | None:
        """The step at the knee."""
        return None if self.knee.index is None else self.steps[self.knee.index]


def _by_kind(recorded: Recorded) -> dict[str, Summary]:
    by_kind: dict[str, list[Row]] = {}
    for row in recorded.rows:
        by_kind.setdefault(row.kind, []).append(row)
    return {
        kind: summarize_all(rows, recorded.windows, recorded.end_s, recorded.slo)
        for kind, rows in sorted(by_kind.items())
    }


def _knee(steps: Sequence[Summary]) -> Knee:
    load = [summary.window.offered for summary in steps]
    if len(set(load)) < len(load):
        return Knee(None, "No knee: the same load was offered more than once.")
    return find_knee(load, [summary.tokens_per_s for summary in steps])


def write(recorded: Recorded, folder: Path) -> Path:
    """Writes the report into a folder and returns its path."""
    path = folder / REPORT_NAME
    path.write_text(page(Figures(recorded)), encoding="utf-8")
    return path


def page(figures: Figures) -> str:
    """The report's HTML."""
    recorded = figures.recorded
    sections = [
        _tiles(figures),
        f"<section><h2>The knee</h2>{''.join(f'<p>{html.escape(text)}</p>' for text in verdict(figures))}</section>",
        _section("Over the offered load", _load_charts(figures)) if len(figures.steps) > 1 else "",
        _section("Over time", _time_charts(figures)),
        f"<section><h2>Steps</h2>{tables.of_steps(figures.steps, recorded.offered_unit)}</section>",
        f"<section><h2>By traffic</h2>{tables.of_kinds(figures.kinds)}</section>" if len(figures.kinds) > 1 else "",
        f"<section><h2>Failures</h2>{tables.of_failures(figures.whole.failures)}</section>",
        f"<section><h2>Conditions</h2>{_definition_list(recorded.conditions)}{_METHOD.format(slo=_slo(recorded.slo))}</section>",
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Pressroom load test</title><style>{_STYLE.read_text(encoding='utf-8')}</style></head><body>"
        f"<main><h1>Pressroom load test</h1>{''.join(sections)}</main></body></html>\n"
    )


def _load(step: Summary, unit: str) -> str:
    return "1 user" if step.window.offered == 1 and unit == "users" else f"{step.window.offered:g} {unit}"


def verdict(figures: Figures) -> list[str]:
    """The knee and the load within the objectives, in sentences."""
    unit, slo, step = figures.recorded.offered_unit, figures.recorded.slo, figures.knee_step
    said = []
    if step is not None:
        said.append(
            f"The knee is at {_load(step, unit)}: {number(step.tokens_per_s)} output tokens per second, "
            f"first token after {number(step.ttft_scheduled.p50)} s (p50), {number(step.ttft_scheduled.p95)} s (p95)."
        )
        last = figures.steps[-1]
        if last is not step and step.tokens_per_s:
            growth = last.tokens_per_s / step.tokens_per_s - 1
            said.append(
                f"From there to {_load(last, unit)} the throughput changed by {growth:+.0%}, and the p95 of "
                f"the first token went from {number(step.ttft_scheduled.p95)} to {number(last.ttft_scheduled.p95)} s."
            )
    said.append(figures.knee.why)
    kept = figures.within_slo
    said.append(
        f"Within the objectives ({_slo(slo)}; at most 1% failures) up to {_load(kept, unit)}."
        if kept is not None
        else f"No step of load was within the objectives ({_slo(slo)}; at most 1% failures)."
    )
    return said


def _slo(slo: Slo) -> str:
    return f"first token within {slo.ttft_s:g} s, {slo.tpot_s:g} s for each token after it"


def _tiles(figures: Figures) -> str:
    whole, best = figures.whole, max((s.tokens_per_s for s in figures.steps), default=0.0)
    tiles = [
        ("requests", f"{whole.num_due:,}", f"{whole.num_ok:,} answered"),
        (
            "failures",
            f"{whole.num_failed:,}",
            f"{whole.num_overflow:,} of them overflow; {whole.num_stopped:,} cut off",
        ),
        ("tokens/s, best step", number(best), f"{number(whole.tokens_per_s)} over the whole test"),
        (
            "first token, p50",
            f"{number(whole.ttft.p50)} s",
            f"p95 {number(whole.ttft.p95)} · p99 {number(whole.ttft.p99)} s",
        ),
        ("each token after, p50", _ms(whole.tpot.p50), f"p95 {_ms(whole.tpot.p95)} · p99 {_ms(whole.tpot.p99)}"),
        (
            "one stream, p50",
            f"{number(whole.stream_tokens_per_s.p50)} tok/s",
            f"whole answer {number(whole.e2e.p50)} s",
        ),
    ]
    return (
        '<section class="tiles">'
        + "".join(
            f"<div><span>{name}</span><strong>{value}</strong><small>{more}</small></div>"
            for name, value, more in tiles
        )
        + "</section>"
    )


def _ms(seconds: float | None) -> str:
    return "–" if seconds is None else f"{number(seconds * 1000)} ms"


def _load_charts(figures: Figures) -> list[str]:
    steps, slo, unit = figures.steps, figures.recorded.slo, figures.recorded.offered_unit
    x = [float(n) for n in range(len(steps))]  # evenly spaced: steps of load are mostly doublings
    labels = [f"{step.window.offered:g}" for step in steps]
    marks = [] if figures.knee.index is None else [Mark(x[figures.knee.index], "knee")]

    def chart(title: str, y_title: str, lines: Sequence[Line], limits: Sequence[Limit] = ()) -> str:
        return line_chart(title, x, lines, x_title=unit, y_title=y_title, x_labels=labels, marks=marks, limits=limits)

    return [
        chart(
            "Throughput",
            "output tokens/s",
            [
                Line("all", [s.tokens_per_s for s in steps], 1),
                Line("within the objectives", [s.goodput_tokens_per_s for s in steps], 2, is_dashed=True),
            ],
        ),
        chart(
            "Time to the first token",
            "seconds",
            _percentile_lines([s.ttft_scheduled for s in steps]),
            [Limit(slo.ttft_s, "objective")],
        ),
        chart(
            "Time for each token after the first",
            "milliseconds",
            _percentile_lines([s.tpot for s in steps], 1000),
            [Limit(slo.tpot_s * 1000, "objective")],
        ),
        chart(
            "Requests",
            "per second",
            [
                Line("answered", [s.answers_per_s for s in steps], 1),
                Line("failed", [s.num_failed / s.window.length_s for s in steps], 4),
            ],
        ),
        chart("Speed of one stream", "tokens/s", _percentile_lines([s.stream_tokens_per_s for s in steps])[:1]),
        chart("Under way", "requests", [Line("mean", [s.mean_in_flight for s in steps], 1)]),
    ]


def _percentile_lines(found: Sequence[Percentiles], factor: float = 1) -> list[Line]:
    def times(values: Iterable[float | None]) -> list[float | None]:
        return [None if value is None else value * factor for value in values]

    return [
        Line("p50", times(p.p50 for p in found), 1),
        Line("p95", times(p.p95 for p in found), 2),
        Line("p99", times(p.p99 for p in found), 3),
    ]


def _time_charts(figures: Figures) -> list[str]:
    series = figures.series
    unit = figures.recorded.offered_unit
    marks = [Mark(w.start_s, f"{w.offered:g}") for w in figures.recorded.windows[:12]]

    def chart(title: str, y_title: str, lines: Sequence[Line]) -> str:
        x_title = f"seconds; upright lines: steps of load ({unit})"
        return line_chart(title, series.at_s, lines, x_title=x_title, y_title=y_title, marks=marks, has_dots=False)

    return [
        chart("Throughput", "output tokens/s", [Line("output tokens", series.tokens_per_s, 1)]),
        chart(
            "Time to the first token",
            "seconds",
            [Line("p50", series.ttft_p50, 1), Line("p95", series.ttft_p95, 2)],
        ),
        chart("Under way", "requests", [Line("requests under way", series.in_flight, 1)]),
        chart(
            "Arrivals and failures",
            "per second",
            [Line("arrivals", series.arrivals_per_s, 1), Line("failures", series.failures_per_s, 4)],
        ),
    ]


def _section(title: str, charts: Sequence[str]) -> str:
    return f'<section><h2>{title}</h2><div class="charts">{"".join(charts)}</div></section>'


def _definition_list(pairs: dict[str, str]) -> str:
    return "<dl>" + "".join(f"<dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd>" for k, v in pairs.items()) + "</dl>"


_METHOD = """<h3>How this was counted</h3>
<p>Percentiles are exact, over all answered requests of a step, with linear interpolation between ranks. The first
token counts from the moment at which the request was <em>due</em> (for users that is the moment of sending), so that
waiting which the load test itself caused is not hidden; the tiles count from sending. Requests belong to the step in
which they were due; tokens belong to the moment at which they came, evenly spread between an answer's first and last.
Tokens are the server's own count (<code>usage</code>). Goodput counts the tokens of answers that came whole and kept
to {slo}. An answer without <code>[DONE]</code>, or with an error in its stream, is a failure. Overflow: an arrival
that found the most requests allowed under way; it was not sent, and is counted as failed. Cut off: the test ended in
the middle of the answer. An open loop beyond its capacity has no steady state: its waiting grows as long as the step
lasts.</p>"""
