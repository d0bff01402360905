"""Engines side by side: rounds of A B C ours gateway, A B C ours gateway ..., each at 1, 8 and 32 streams."""

import dataclasses
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench_engine import answers, figures, machine
from bench_engine.engines import Engine, EngineError
from bench_engine.figures import Level

# Seeds of the prompts: none is asked twice of an engine in a run, so that no prefix cache answers.
_WARM_UP_SEED = 1_000_000
_ROUND_SEEDS, _LEVEL_SEEDS = 10_000, 1_000


@dataclass(frozen=True, slots=True)
class Plan:
    """streams: levels of concurrency. max_tokens: of each answer. Each level asks 2 * streams + 3 prompts."""

    streams: tuple[int, ...] = (1, 8, 32)
    rounds: int = 3
    max_tokens: int = 64
    warm_up_tokens: int = 8


def num_requests(num_streams: int) -> int:
    """As the issue's client is called."""
    return 2 * num_streams + 3


def seeds(plan: Plan, number: int, num_streams: int) -> range:
    """The prompts of one level in one round, the same for every engine, and of no other level or round."""
    first = number * _ROUND_SEEDS + plan.streams.index(num_streams) * _LEVEL_SEEDS
    return range(first, first + num_requests(num_streams))


def turns(engines: Sequence[str], plan: Plan) -> Iterator[tuple[int, str, int]]:
    """Round, engine and streams in the order in which they are measured: engines take turns within a round."""
    for number in range(plan.rounds):
        for engine in engines:
            for num_streams in plan.streams:
                yield number, engine, num_streams


class Results:
    """The levels measured so far, in a file that a second run goes on from."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.levels: list[Level] = []
        self.cost: dict[str, tuple[float | None, float | None]] = {}
        self.notes: list[str] = []
        if path.exists():
            kept = json.loads(path.read_text())
            self.levels = [Level(**row) for row in kept["levels"]]
            self.cost = {name: tuple(pair) for name, pair in kept["cost"].items()}
            self.notes = kept["notes"]

    def has(self, engine: str, num_streams: int, number: int) -> bool:
        """Whether this was measured."""
        return any((row.engine, row.num_streams, row.round) == (engine, num_streams, number) for row in self.levels)

    def is_complete(self, engine: str, plan: Plan) -> bool:
        """Whether nothing of this engine is left to measure."""
        return all(self.has(name, streams, number) for number, name, streams in turns([engine], plan))

    def add(self, row: Level) -> None:
        """Keeps one level."""
        self.levels.append(row)
        self.save()

    def save(self) -> None:
        """Replaces the file in one step."""
        kept = {"levels": [dataclasses.asdict(row) for row in self.levels], "cost": self.cost, "notes": self.notes}
        temporary = self._path.with_suffix(".part")
        temporary.write_text(json.dumps(kept, indent=1) + "\n")
        os.replace(temporary, self._path)


async def measure(
    engines: Sequence[Engine], plan: Plan, results: Results, tell: Callable[[str], None]
) -> dict[str, str]:
    """Starts every engine that has something left, measures in turns, ends them all. Returns who failed, and how.

    An engine that fails is left out from then on; the others go on.
    """
    failed: dict[str, str] = {}
    wanted = [engine for engine in engines if not results.is_complete(engine.name, plan)]
    try:
        for engine in wanted:
            await _start(engine, results, failed, tell)
        by_name = {engine.name: engine for engine in wanted}
        for number, name, num_streams in turns(list(by_name), plan):
            if name in failed or results.has(name, num_streams, number):
                continue
            try:
                await _turn(by_name[name], plan, number, num_streams, results, tell)
            except EngineError as error:
                failed[name] = str(error)
                tell(f"{name}: {error}")
    finally:
        for engine in wanted:
            await engine.close()
    return failed


async def _start(engine: Engine, results: Results, failed: dict[str, str], tell: Callable[[str], None]) -> None:
    tell(f"{engine.name}: starting ...")
    try:
        ready_s = await engine.start()
    except EngineError as error:
        failed[engine.name] = str(error)
        tell(f"{engine.name}: {error}")
        return
    results.cost[engine.name] = ready_s, None
    engine.freeze(True)


async def _turn(
    engine: Engine, plan: Plan, number: int, num_streams: int, results: Results, tell: Callable[[str], None]
) -> None:
    """One level of one engine: the others stand still, a warm-up of the same width, then the measured loop."""
    engine.freeze(False)
    try:
        warm_up = [
            answers.prompt(seed + _WARM_UP_SEED) for seed in list(seeds(plan, number, num_streams))[:num_streams]
        ]
        await engine.run(warm_up, plan.warm_up_tokens, num_streams)
        load = os.getloadavg()[0]
        prompts = [answers.prompt(seed) for seed in seeds(plan, number, num_streams)]
        run = await engine.run(prompts, plan.max_tokens, num_streams)
    finally:
        engine.freeze(True)
    row = figures.level(engine.name, num_streams, number, run, plan.max_tokens, load)
    ready_s, most = results.cost.get(engine.name, (None, None))
    if engine.pids:
        most = max(most or 0.0, machine.memory_bytes(engine.pids))
    results.cost[engine.name] = ready_s, most
    results.add(row)
    errors = sorted({answer.error for answer in run.answers if answer.error})
    tell(
        f"round {number + 1}  {engine.name:<48} {num_streams:>3} streams {row.tokens_per_s:7.1f} tok/s  "
        f"TTFT p50 {row.ttft_p50_s:.3f} p95 {row.ttft_p95_s:.3f} s  p95 between pieces {row.gap_p95_s * 1000:.0f} ms"
        + (f"  FAILED {row.num_failed} of {row.num_answers} {errors[:1]}" if row.num_failed else "")
    )


def report(results: Results, plan: Plan, ours: str, gateway: str, peers: Iterable[str]) -> str:
    """Markdown for docs/LOG.md."""
    prompts = sorted(row.prompt_tokens for row in results.levels if row.prompt_tokens == row.prompt_tokens)
    lengths = f"{prompts[len(prompts) // 2]:.0f}" if prompts else "?"
    lines = [
        *(f"- {note}" for note in results.notes),
        f"- {plan.rounds} rounds in turns; medians (lowest-highest); {lengths} prompt tokens and {plan.max_tokens} "
        "output tokens, greedy, to the last token; closed loop of 2n+3 requests; a warm-up of n short requests before "
        "each level of every engine; no prompt twice; peers stand still (SIGSTOP) while others run.",
        "- Memory is the most PSS seen after a level; ready is from the start of the process.",
        "",
        figures.table(results.levels, results.cost),
        "",
        *figures.verdict(results.levels, ours, gateway, list(peers)),
    ]
    return "\n".join(lines) + "\n"


def results_folder(home: Path) -> Path:
    """A new folder for a run, named by the time."""
    folder = home / "bench-engine" / time.strftime("%Y%m%d-%H%M%S")
    folder.mkdir(parents=True)
    return folder
