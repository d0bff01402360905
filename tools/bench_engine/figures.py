"""Figures of runs, their medians over rounds, and the Markdown that goes to docs/LOG.md. Pure."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from bench_engine.answers import Run


@dataclass(frozen=True, slots=True)
class Level:
    """One engine at one number of streams in one round. num_failed: answers with an error or of another length."""

    engine: str
    num_streams: int
    round: int
    tokens_per_s: float
    ttft_p50_s: float
    ttft_p95_s: float
    gap_p95_s: float
    prompt_tokens: float
    num_answers: int
    num_failed: int
    load_average: float
    seconds: float


def percentile(values: Iterable[float], percent: float) -> float:
    """By rank, as the issue's client has it: the value that percent of them lie below. NaN of nothing."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(percent / 100 * len(ordered)))] if ordered else float("nan")


def level(
    engine: str, num_streams: int, number: int, run: Run, expected_tokens: int, load_average: float = 0.0
) -> Level:
    """The figures of one run. Tokens of answers that failed do not count."""
    whole = [a for a in run.answers if not a.error and a.completion_tokens == expected_tokens and a.stamps]
    ttfts = [answer.ttft_s for answer in whole if answer.ttft_s is not None]
    return Level(
        engine=engine,
        num_streams=num_streams,
        round=number,
        tokens_per_s=sum(answer.completion_tokens for answer in whole) / run.wall_s,
        ttft_p50_s=percentile(ttfts, 50),
        ttft_p95_s=percentile(ttfts, 95),
        gap_p95_s=percentile((gap for answer in whole for gap in answer.gaps_s), 95),
        prompt_tokens=statistics.mean(a.prompt_tokens for a in whole) if whole else float("nan"),
        num_answers=len(run.answers),
        num_failed=len(run.answers) - len(whole),
        load_average=load_average,
        seconds=run.wall_s,
    )


@dataclass(frozen=True, slots=True)
class Median:
    """One engine at one number of streams over all rounds."""

    tokens_per_s: float
    lowest: float
    highest: float
    ttft_p50_s: float
    ttft_p95_s: float
    gap_p95_s: float
    num_failed: int


def medians(levels: Sequence[Level]) -> dict[tuple[str, int], Median]:
    """By engine and number of streams."""
    found: dict[tuple[str, int], Median] = {}
    for key in dict.fromkeys((row.engine, row.num_streams) for row in levels):
        rows = [row for row in levels if (row.engine, row.num_streams) == key]
        rates = [row.tokens_per_s for row in rows]
        found[key] = Median(
            tokens_per_s=statistics.median(rates),
            lowest=min(rates),
            highest=max(rates),
            ttft_p50_s=statistics.median(row.ttft_p50_s for row in rows),
            ttft_p95_s=statistics.median(row.ttft_p95_s for row in rows),
            gap_p95_s=statistics.median(row.gap_p95_s for row in rows),
            num_failed=sum(row.num_failed for row in rows),
        )
    return found


def table(levels: Sequence[Level], cost: Mapping[str, tuple[float | None, float | None]]) -> str:
    """One row for each engine. cost: seconds from start to ready and bytes of memory (PSS), where known."""
    streams = sorted({row.num_streams for row in levels})
    found = medians(levels)
    joined = " / ".join(map(str, streams))
    lines = [
        "| engine | "
        + " | ".join(f"{n} stream{'s' if n > 1 else ''}, tok/s" for n in streams)
        + f" | TTFT p50 at {joined}, s | TTFT p95, s | p95 between pieces, ms | ready, s | memory, MB |",
        "| --- |" + " --- |" * (len(streams) + 5),
    ]
    for engine in dict.fromkeys(row.engine for row in levels):
        rows = [found.get((engine, n)) for n in streams]
        rates = [_rate(row) for row in rows]
        ready_s, memory = cost.get(engine, (None, None))
        lines.append(
            f"| {engine} | {' | '.join(rates)} | {_joined((None if r is None else r.ttft_p50_s for r in rows), 2)} "
            f"| {_joined((None if r is None else r.ttft_p95_s for r in rows), 2)} "
            f"| {_joined((None if r is None else r.gap_p95_s * 1000 for r in rows), 0)} "
            f"| {'' if ready_s is None else f'{ready_s:.1f}'} | {'' if memory is None else f'{memory / 1e6:.0f}'} |"
        )
    return "\n".join(lines)


def _rate(row: Median | None) -> str:
    if row is None:
        return "-"
    failed = f", {row.num_failed} FAILED" if row.num_failed else ""
    return f"{row.tokens_per_s:.1f} ({row.lowest:.0f}-{row.highest:.0f}{failed})"


def _joined(values: Iterable[float | None], digits: int) -> str:
    return " / ".join("-" if value is None else f"{value:.{digits}f}" for value in values)


def verdict(levels: Sequence[Level], ours: str, gateway: str, peers: Sequence[str]) -> list[str]:
    """What the issue asks for, in sentences: ours over the best peer, its TTFT p95, the gateway's share."""
    found, lines = medians(levels), list[str]()
    for n in sorted({row.num_streams for row in levels}):
        mine = found.get((ours, n))
        rivals = {peer: found[peer, n] for peer in peers if (peer, n) in found}
        if mine is not None and rivals:
            best = max(rivals, key=lambda peer: rivals[peer].tokens_per_s)
            ratio = mine.tokens_per_s / rivals[best].tokens_per_s
            rule = "no worse" if mine.ttft_p95_s <= rivals[best].ttft_p95_s else "WORSE"
            lines.append(
                f"- {n} stream{'s' if n > 1 else ''}: {ratio:.2f} times the best peer ({best}); "
                f"TTFT p95 {mine.ttft_p95_s:.3f} s against {rivals[best].ttft_p95_s:.3f} s: {rule}"
            )
        through = found.get((gateway, n))
        if mine is not None and through is not None:
            lines.append(f"  through the gateway {through.tokens_per_s / mine.tokens_per_s:.0%} of that")
    return lines
