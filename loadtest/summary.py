"""From rows to figures: exact percentiles, one summary for each step of load, and series over time. Pure."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from loadtest.rows import OVERFLOW, Row


@dataclass(frozen=True, slots=True)
class Window:
    """One step of load: from start_s to end_s so much was offered."""

    step: int
    offered: float
    start_s: float
    end_s: float

    @property
    def length_s(self) -> float:
        """Its length in seconds."""
        return self.end_s - self.start_s


@dataclass(frozen=True, slots=True)
class Slo:
    """What a good answer keeps to."""

    ttft_s: float
    tpot_s: float

    def is_met(self, row: Row) -> bool:
        """Whether an answer came whole, its first token counted from the intended arrival, and flowed fast enough."""
        ttft_s = row.ttft_scheduled_s
        return row.outcome == "ok" and ttft_s is not None and ttft_s <= self.ttft_s and (row.tpot_s or 0) <= self.tpot_s


@dataclass(frozen=True, slots=True)
class Percentiles:
    """Of n values; None where there were none."""

    n: int
    p50: float | None
    p95: float | None
    p99: float | None


@dataclass(frozen=True, slots=True)
class Summary:
    """The figures of a window. Requests count where they were due; tokens count where they came."""

    window: Window
    num_due: int
    num_ok: int
    num_failed: int
    num_overflow: int
    num_stopped: int
    failures: dict[str, int]
    answers_per_s: float
    tokens_per_s: float
    goodput_tokens_per_s: float
    mean_in_flight: float
    ttft: Percentiles
    ttft_scheduled: Percentiles
    tpot: Percentiles
    e2e: Percentiles
    stream_tokens_per_s: Percentiles
    send_lag: Percentiles

    @property
    def error_share(self) -> float:
        """Failed among all that were due and not cut off by the end of the test; overflow is failure too."""
        return self.num_failed / max(1, self.num_due - self.num_stopped)


def percentile(values: Iterable[float], percent: float) -> float | None:
    """The exact percentile of all values, by linear interpolation between the two nearest ranks; None for none."""
    ordered = sorted(values)
    if not ordered:
        return None
    rank = percent / 100 * (len(ordered) - 1)
    low, high = math.floor(rank), math.ceil(rank)
    return ordered[low] + (ordered[high] - ordered[low]) * (rank - low)


def percentiles(values: Iterable[float | None]) -> Percentiles:
    """The three that the report shows, of those that are there."""
    found = [value for value in values if value is not None]
    return Percentiles(len(found), percentile(found, 50), percentile(found, 95), percentile(found, 99))


def tokens_within(row: Row, start_s: float, end_s: float) -> float:
    """How many of an answer's tokens came in a span of time, taken as evenly spread between first and last."""
    if row.first_token_s is None or row.last_token_s is None or row.num_tokens == 0:
        return 0.0
    length_s = row.last_token_s - row.first_token_s
    if length_s <= 0:
        return float(row.num_tokens) if start_s <= row.first_token_s < end_s else 0.0
    return row.num_tokens * _overlap_s(row.first_token_s, row.last_token_s, start_s, end_s) / length_s


def _overlap_s(a_start_s: float, a_end_s: float, b_start_s: float, b_end_s: float) -> float:
    return max(0.0, min(a_end_s, b_end_s) - max(a_start_s, b_start_s))


def _busy_s(rows: Iterable[Row], start_s: float, end_s: float) -> float:
    """Seconds that requests were under way in a span, added up."""
    return sum(
        _overlap_s(row.sent_s, row.done_s, start_s, end_s)
        for row in rows
        if row.sent_s is not None and row.done_s is not None
    )


def summarize(rows: Sequence[Row], window: Window, slo: Slo) -> Summary:
    """The figures of one step; rows are those of the whole test."""
    return _summarize([row for row in rows if row.step == window.step], rows, window, slo)


def summarize_all(rows: Sequence[Row], windows: Sequence[Window], end_s: float, slo: Slo) -> Summary:
    """The figures of the whole test, from its first step to its last; pauses between steps are in it."""
    start_s = min((window.start_s for window in windows), default=0.0)
    end_s = max((window.end_s for window in windows), default=end_s)
    return _summarize(rows, rows, Window(0, 0.0, start_s, max(end_s, start_s + 1e-9)), slo)


def _summarize(due: Sequence[Row], rows: Sequence[Row], window: Window, slo: Slo) -> Summary:
    start_s, end_s, length_s = window.start_s, window.end_s, window.length_s
    ok = [row for row in due if row.outcome == "ok"]
    failed = [row for row in due if row.outcome == "failed"]
    done = [row for row in rows if row.outcome == "ok" and row.done_s is not None and start_s <= row.done_s < end_s]
    good = [row for row in rows if slo.is_met(row)]
    return Summary(
        window=window,
        num_due=len(due),
        num_ok=len(ok),
        num_failed=len(failed),
        num_overflow=sum(row.error == OVERFLOW for row in due),
        num_stopped=sum(row.outcome == "stopped" for row in due),
        failures=dict(Counter(row.code for row in failed).most_common()),
        answers_per_s=len(done) / length_s,
        tokens_per_s=sum(tokens_within(row, start_s, end_s) for row in rows) / length_s,
        goodput_tokens_per_s=sum(tokens_within(row, start_s, end_s) for row in good) / length_s,
        mean_in_flight=_busy_s(rows, start_s, end_s) / length_s,
        ttft=percentiles(row.ttft_s for row in ok),
        ttft_scheduled=percentiles(row.ttft_scheduled_s for row in ok),
        tpot=percentiles(row.tpot_s for row in ok),
        e2e=percentiles(row.e2e_s for row in ok),
        stream_tokens_per_s=percentiles(row.tokens_per_s for row in ok),
        send_lag=percentiles(None if row.sent_s is None else row.sent_s - row.scheduled_s for row in due),
    )


def within_slo(summaries: Iterable[Summary], slo: Slo, max_error_share: float = 0.01) -> Summary | None:
    """The last step, counted from the lowest load without a gap, that keeps to the objectives."""
    last = None
    for summary in sorted(summaries, key=lambda s: s.window.offered):
        p95 = summary.ttft_scheduled.p95
        if p95 is None or p95 > slo.ttft_s or summary.error_share > max_error_share:
            break
        last = summary
    return last


@dataclass(frozen=True, slots=True)
class Series:
    """Values over time, one for each bucket of width_s, at the bucket's middle."""

    at_s: list[float]
    tokens_per_s: list[float]
    arrivals_per_s: list[float]
    failures_per_s: list[float]
    in_flight: list[float]
    ttft_p50: list[float | None]
    ttft_p95: list[float | None]


def over_time(rows: Sequence[Row], end_s: float, num_buckets: int = 60) -> Series:
    """The course of the test. Latencies stand where the request was due."""
    width_s = max(1.0, math.ceil(end_s / num_buckets))
    starts = [n * width_s for n in range(max(1, math.ceil(end_s / width_s)))]

    def each(value: Callable[[float], float]) -> list[float]:
        return [value(start_s) for start_s in starts]

    def count(times: Iterable[float | None]) -> list[float]:
        buckets = Counter(int(at_s // width_s) for at_s in times if at_s is not None)
        return [buckets[n] / width_s for n in range(len(starts))]

    waits = [[r.ttft_scheduled_s for r in rows if s <= r.scheduled_s < s + width_s] for s in starts]
    found = [percentiles(wait) for wait in waits]
    return Series(
        at_s=[start_s + width_s / 2 for start_s in starts],
        tokens_per_s=each(lambda s: sum(tokens_within(row, s, s + width_s) for row in rows) / width_s),
        arrivals_per_s=count(row.scheduled_s for row in rows),
        failures_per_s=count(_failed_at_s(row) for row in rows if row.outcome == "failed"),
        in_flight=each(lambda s: _busy_s(rows, s, s + width_s) / width_s),
        ttft_p50=[p.p50 for p in found],
        ttft_p95=[p.p95 for p in found],
    )


def _failed_at_s(row: Row) -> float:
    return row.scheduled_s if row.done_s is None else row.done_s
