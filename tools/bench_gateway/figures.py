"""From answers to the table. Pure."""

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from bench_gateway.load import Answer, Run

MAX_TTFT_P50_S, MAX_TTFT_P99_S = 0.002, 0.010
LEAST_RATIO = 6.0
MAX_IDLE_BYTES = 200 * 10**6


@dataclass(frozen=True, slots=True)
class Turn:
    """One door's turn at one level."""

    run: Run
    cpu_s: float


@dataclass(slots=True)
class Level:
    """What is measured at one number of streams in front of one mock, over all rounds."""

    name: str
    turns: dict[str, list[Turn]] = field(default_factory=lambda: defaultdict(list))

    def ttfts_s(self, door: str) -> list[float]:
        """Of all rounds together: a tail needs many."""
        return [answer.ttft_s for turn in self.turns[door] for answer in turn.run.whole]

    def added_s(self, door: str, percent: float) -> float:
        """Time to first token beyond that of the mock itself."""
        return percentile(self.ttfts_s(door), percent) - percentile(self.ttfts_s("direct"), percent)

    def requests_per_s(self, door: str) -> float:
        """Median over the rounds."""
        return _median(len(turn.run.whole) / turn.run.wall_s for turn in self.turns[door] if turn.run.wall_s)

    def cpu_ms(self, door: str) -> float:
        """Processor time of the door's processes for one request."""
        return _median(1000 * turn.cpu_s / len(turn.run.whole) for turn in self.turns[door] if turn.run.whole)


@dataclass(slots=True)
class Results:
    """Everything measured."""

    levels: list[Level] = field(default_factory=list)
    memory_bytes: dict[str, float] = field(default_factory=dict)  # after the load
    idle: dict[str, tuple[float, int]] = field(default_factory=dict)  # bytes with so many standing streams

    def wrong_usage(self, door: str) -> Sequence[tuple[int, int] | None]:
        """The usages that differ from what the mock itself tells."""
        (right,) = {answer.usage for level in self.levels for answer in _answers(level, "direct")}
        return [a.usage for level in self.levels for a in _answers(level, door) if a.usage != right]

    def errors(self, door: str) -> list[str]:
        """What stood in the way of answers."""
        return [a.error for level in self.levels for turn in level.turns[door] for a in turn.run.answers if a.error]


def _answers(level: Level, door: str) -> list[Answer]:
    return [answer for turn in level.turns[door] for answer in turn.run.whole]


def percentile(values: Iterable[float], percent: float) -> float:
    """By rank; NaN of nothing."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(percent / 100 * len(ordered)))] if ordered else math.nan


def _median(values: Iterable[float]) -> float:
    known = list(values)
    return statistics.median(known) if known else math.nan


def table(results: Results, doors: Sequence[str]) -> str:
    """The one table, a column for each door."""
    rows: list[tuple[str, Mapping[str, str]]] = []
    for level in results.levels:
        if level.name.startswith("1 stream"):
            for percent in (50, 99):
                shown = {d: f"{level.added_s(d, percent) * 1000:.2f}" for d in doors if d != "direct"}
                first = f"{percentile(level.ttfts_s('direct'), percent) * 1000:.2f} in all"
                rows.append((f"{level.name}: ms added to the first token, p{percent}", {"direct": first} | shown))
        if "paced" not in level.name.split():
            rows.append((f"{level.name}: requests/s", {d: f"{level.requests_per_s(d):.0f}" for d in doors}))
            cpu = {d: f"{level.cpu_ms(d):.2f}" for d in doors if d != "direct"}
            rows.append((f"{level.name}: CPU ms per request", cpu))
    rows.append(("MB after the load", {d: f"{results.memory_bytes[d] / 1e6:.0f}" for d in results.memory_bytes}))
    idle = {door: f"{size / 1e6:.0f} ({number} stand)" for door, (size, number) in results.idle.items()}
    if idle:
        rows.append(("MB with idle streams", idle))
    rows.append(("usage", {door: _usage_shown(results, door) for door in doors}))
    rows.append(("failed requests", {door: str(len(results.errors(door))) for door in doors}))
    lines = [f"| | {' | '.join(doors)} |", f"| --- |{' ---: |' * len(doors)}"]
    lines += [f"| {name} | {' | '.join(shown.get(door, '-') for door in doors)} |" for name, shown in rows]
    return "\n".join(lines)


def _usage_shown(results: Results, door: str) -> str:
    wrong = results.wrong_usage(door)
    return f"wrong in {len(wrong)}, such as {wrong[0]}" if wrong else "right"


def broken_promises(results: Results) -> list[str]:
    """What was promised of the gateway and does not hold."""
    broken = []
    for level in results.levels:
        if level.name.startswith("1 stream"):
            for percent, most_s in ((50, MAX_TTFT_P50_S), (99, MAX_TTFT_P99_S)):
                if level.added_s("gateway", percent) > most_s:
                    added_ms = level.added_s("gateway", percent) * 1000
                    broken.append(f"{level.name}: p{percent} adds {added_ms:.2f} ms, more than {most_s * 1000:.0f}")
        elif "litellm" in level.turns and level.name.startswith("64 streams"):
            ratio = level.requests_per_s("gateway") / level.requests_per_s("litellm")
            if not ratio >= LEAST_RATIO:
                broken.append(f"{level.name}: {ratio:.1f} times LiteLLM's requests/s, fewer than {LEAST_RATIO:.0f}")
    size, _ = results.idle.get("gateway", (0.0, 0))
    if size > MAX_IDLE_BYTES:
        broken.append(f"idle streams take {size / 1e6:.0f} MB, more than {MAX_IDLE_BYTES / 1e6:.0f}")
    if results.wrong_usage("gateway"):
        broken.append("the gateway tells a wrong usage")
    if errors := results.errors("gateway"):
        broken.append(f"{len(errors)} requests of the gateway failed, the first with {errors[0]}")
    return broken
