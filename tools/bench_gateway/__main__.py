"""`make bench-gateway`: the gateway beside LiteLLM's proxy and Envoy, in front of one mock, in turns on two cores.

PYTHONPATH=tools python -m bench_gateway --rounds 5
PYTHONPATH=tools python -m bench_gateway --doors gateway --mock FILE.py --keep-alive
"""

import argparse
import asyncio
import os
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from bench_engine import machine
from bench_gateway.doors import NAMES, OWN_MOCK, ROOT, Door, opened
from bench_gateway.figures import Level, Results, Turn, broken_promises, table
from bench_gateway.load import Client, closed_loop, while_idle

_NUM_CORES = 2
_WARM_UP = 20
_IDLE_PACE_S = 15.0


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser("bench_gateway", description="Measures the gateway beside its peers.")
    made.add_argument("--doors", default=",".join(NAMES), help=f"of {', '.join(NAMES)}")
    made.add_argument("--mock", type=Path, default=OWN_MOCK, help="program that takes PORT [SECONDS_BETWEEN_CHUNKS]")
    made.add_argument("--rounds", type=int, default=3)
    made.add_argument("--requests", type=int, default=200, help="at 1 stream, of each door in each round")
    made.add_argument("--loaded", type=int, default=512, help="requests at 64 streams, likewise")
    made.add_argument("--paced", type=int, default=40, help="requests at 1 stream against the paced mock, likewise")
    made.add_argument("--pace", type=float, default=0.01, help="seconds between chunks of the paced mock")
    made.add_argument("--idle", type=int, default=1000, help="streams that stand still; 0: none")
    made.add_argument("--keep-alive", action="store_true", help="connections serve one request after the other")
    made.add_argument("--out", type=Path, help="file that the table goes to as well")
    return made


def tell(line: str) -> None:
    """Progress goes to stderr, results to stdout."""
    print(line, file=sys.stderr, flush=True)


async def _measure_level(
    level: Level, doors: Sequence[Door], *, rounds: int, num_streams: int, num_requests: int, keeps_alive: bool
) -> None:
    for number in range(rounds):
        for door in doors:
            client = Client(door.target, keeps_alive=keeps_alive)
            await closed_loop(client, num_streams=num_streams, num_requests=max(_WARM_UP, num_streams))
            before_s = machine.cpu_seconds(door.pids)
            run = await closed_loop(client, num_streams=num_streams, num_requests=num_requests)
            level.turns[door.name].append(Turn(run, machine.cpu_seconds(door.pids) - before_s))
            client.close()
            tell(f"{level.name}, round {number + 1}, {door.name}: {len(run.whole)} answers in {run.wall_s:.2f} s")


def _measure(options: argparse.Namespace, names: tuple[str, ...]) -> Results:
    results = Results()
    with opened(names, options.mock, 0.0) as doors:
        for name, num_streams, num_requests in (
            ("1 stream", 1, options.requests),
            ("64 streams", 64, options.loaded),
        ):
            level = Level(name)
            results.levels.append(level)
            asyncio.run(
                _measure_level(
                    level,
                    doors,
                    rounds=options.rounds,
                    num_streams=num_streams,
                    num_requests=num_requests,
                    keeps_alive=options.keep_alive,
                )
            )
        results.memory_bytes = {door.name: machine.memory_bytes(door.pids) for door in doors if door.pids}
    with opened(names, options.mock, options.pace) as doors:
        level = Level(f"1 stream, paced by {options.pace * 1000:.0f} ms")
        results.levels.append(level)
        how = {"rounds": options.rounds, "num_requests": options.paced, "keeps_alive": options.keep_alive}
        asyncio.run(_measure_level(level, doors, num_streams=1, **how))
    if options.idle:
        with opened(names, options.mock, _IDLE_PACE_S) as doors:
            for door in doors[1:]:
                memory = partial(machine.memory_bytes, door.pids)
                idling = while_idle(Client(door.target), num_streams=options.idle, measure=memory)
                results.idle[door.name] = asyncio.run(idling)
                tell(f"idle, {door.name}: {results.idle[door.name]}")
    return results


def main(arguments: Sequence[str]) -> int:
    """Returns the exit status: 1 where a promise is broken."""
    options = parser().parse_args(arguments)
    names = tuple(name for name in NAMES if name in options.doors.split(","))
    if set(names) - {"gateway"}:
        subprocess.run([sys.executable, str(ROOT / "tools" / "side_env.py"), "peers-gateway"], check=True)
    # Client, mock, door and its helpers share two cores, however many there are.
    cores = sorted(os.sched_getaffinity(0))[:_NUM_CORES]
    os.sched_setaffinity(0, cores)
    results = _measure(options, names)
    broken = broken_promises(results) if "gateway" in names else []
    text = "\n".join(
        [f"- {machine.describe()}; {' '.join(arguments) or 'as it is'}", "", table(results, ["direct", *names])]
        + [f"\nBROKEN: {line}" for line in broken]
    )
    print(text)
    if options.out:
        options.out.write_text(text + "\n")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
