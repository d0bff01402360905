"""`make bench-engine`, `make bench-behaviour`, `make bench-greedy`, `make bench-gpu`: the generator measured.

    PYTHONPATH=tools python -m bench_engine speed --peers openvino,vllm --rounds 3
    PYTHONPATH=tools python -m bench_engine behaviour
    PYTHONPATH=tools python -m bench_engine greedy --prompts FILE
    PYTHONPATH=tools python -m bench_engine gpu --shape 1b

The system is started for it and ended after it, unless --grpc (and --url, --key) name one that runs.
"""

import argparse
import asyncio
import os
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from bench_engine import behaviour, gpu, greedy, machine, peers, speed, system
from bench_engine.clients import GrpcClient, HttpClient
from bench_engine.engines import Engine, EngineError, Served

OURS, GATEWAY = "Pressroom, gRPC, all services up", "Pressroom, through the gateway"
_QUIET_TIMEOUT_S = 90.0


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser("bench_engine", description="Measures the generator.")
    commands = made.add_subparsers(dest="command", required=True)
    home = Path(os.environ.get("PRESSROOM_HOME") or peers.ROOT / ".pressroom")
    for name, what in (
        ("speed", "tokens per second beside the peers, in turns"),
        ("behaviour", "stutter, prefix cache, ragged arrivals, cancels"),
        ("greedy", "token by token beside transformers"),
    ):
        command = commands.add_parser(name, help=what)
        command.add_argument("--grpc", help="host:port of a generator that runs; default: a system is started")
        command.add_argument("--url", help="base URL of its gateway, ending in /v1")
        command.add_argument("--key", default=os.environ.get("PRESSROOM_API_KEY", "none"), help="access key for it")
        command.add_argument("--engine", help="GENERATOR_ENGINE of the started system; default: its own")
        command.add_argument("--store", type=Path, default=home / "models", help="model store")
        command.add_argument("--out", type=Path, help="folder of results; one that has some is gone on with")
        command.add_argument("--busy", action="store_true", help="measure though the machine is not quiet")
        command.set_defaults(home=home)
    fast, promised, same = (commands.choices[name] for name in ("speed", "behaviour", "greedy"))
    fast.add_argument("--peers", default=",".join(peers.PEERS), help=f"of {', '.join(peers.NAMES)}; or none")
    fast.add_argument("--streams", default="1,8,32", help="levels of concurrency")
    fast.add_argument("--rounds", type=int, default=3)
    fast.add_argument("--tokens", type=int, default=64, help="of each answer")
    promised.add_argument("--trace", type=Path, default=peers.ROOT / "loadtest" / "traces" / "evening.jsonl")
    promised.add_argument("--seconds", type=float, default=40.0, help="so much of the trace is played")
    promised.add_argument("--pairs", type=int, default=3, help="repetitions of stutter and prefix")
    promised.add_argument("--cancels", type=int, default=1000)
    same.add_argument("--prompts", type=Path, default=peers.ROOT / "loadtest" / "questions.jsonl", help="JSON lines")
    same.add_argument("--most", type=int, default=60, help="prompts at most")
    same.add_argument("--tokens", type=int, default=64, help="of each answer at most")
    same.add_argument(
        "--reference", choices=("float32", "bfloat16"), default="float32", help="arithmetic of transformers"
    )
    gpu.add_arguments(commands.add_parser("gpu", help="the torch engine beside transformers' continuous batching"))
    return made


def tell(line: str) -> None:
    """Progress goes to stderr, results to stdout."""
    print(line, file=sys.stderr, flush=True)


@asynccontextmanager
async def served(options: argparse.Namespace) -> AsyncIterator[system.System]:
    """The system to measure, idle."""
    if options.grpc:
        yield system.System(options.grpc, options.url or "", options.key)
        return
    tell("starting the system in a home of its own ...")
    async with system.started(options.engine, options.store.resolve()) as found:
        share = await system.wait_idle(found)
        tell(f"all services are up; idle they take {share:.0%} of a core; the generator computes {found.computes}")
        yield found


def check_quiet(options: argparse.Namespace) -> bool:
    """Waits for a quiet machine; says loudly when it is not."""
    load = machine.wait_for_quiet(0 if options.busy else _QUIET_TIMEOUT_S)
    if load < machine.QUIET_LOAD:
        return True
    tell(f"WARNING: the load average is {load:.1f}: others use this machine, and no figure below can be trusted")
    return bool(options.busy)


async def run_speed(options: argparse.Namespace) -> int:
    """Ours and the peers in turns."""
    names = [name for name in options.peers.split(",") if name and name != "none"]
    streams = tuple(int(number) for number in options.streams.split(","))
    plan = speed.Plan(streams, options.rounds, options.tokens)
    peers.prepare(names)
    folder = options.out or speed.results_folder(options.home)
    folder.mkdir(parents=True, exist_ok=True)
    results = speed.Results(folder / "speed.json")
    async with served(options) as found:
        engines: list[Engine] = [peers.peer(name, options.store, folder) for name in names]
        pids = (found.pids["generator"],) if found.pids else ()
        engines.append(Served(OURS, GrpcClient(found.grpc, peers.MODEL), pids, found.ready_s))
        if found.base_url:
            engines.append(Served(GATEWAY, HttpClient(found.base_url, peers.MODEL, found.key), (), None))
        # Only now: the start of all services is itself a load, which the average remembers for a minute.
        if not check_quiet(options):
            tell("nothing was measured; --busy does it all the same")
            return 3
        results.notes.append(f"{machine.describe()}; ours: {found.computes}; {' '.join(sys.argv[1:])}")
        failed = await speed.measure(engines, plan, results, tell)
    text = speed.report(results, plan, OURS, GATEWAY, [peers.NAMES[name] for name in names])
    (folder / "speed.md").write_text(text)
    print(text)
    tell(f"results: {folder}")
    return 1 if failed or any(row.num_failed for row in results.levels) else 0


async def run_behaviour(options: argparse.Namespace) -> int:
    """What is promised beside speed."""
    async with served(options) as found:
        check_quiet(argparse.Namespace(busy=True))
        client = GrpcClient(found.grpc, peers.MODEL)
        try:
            await client.ask("Warm up.", 16)
            text = await behaviour.report(
                client,
                options.trace,
                pairs=options.pairs,
                num_cancels=options.cancels,
                seconds=options.seconds,
            )
        finally:
            await client.close()
    return _finish(f"- {machine.describe()}; {found.computes}\n{text}", options, "behaviour.md")


async def run_greedy(options: argparse.Namespace) -> int:
    """Equal to transformers or not."""
    texts = greedy.read_prompts(options.prompts, options.most)
    async with served(options) as found:
        client = GrpcClient(found.grpc, peers.MODEL)
        try:
            compared = await greedy.run(client, options.store / peers.MODEL, texts, options.tokens, options.reference)
        finally:
            await client.close()
    what = f"transformers in {options.reference} on the dequantised weights"
    text = (
        f"- {found.computes}; {options.prompts.name}, {options.tokens} tokens at most\n{greedy.report(compared, what)}"
    )
    return _finish(text, options, "greedy.md")


def _finish(text: str, options: argparse.Namespace, name: str) -> int:
    folder = options.out or speed.results_folder(options.home)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text)
    print(text)
    tell(f"results: {folder / name}")
    return 1 if "BROKEN" in text else 0


def main(arguments: Sequence[str]) -> int:
    """Returns the exit status: 1 where something failed or a promise was broken, 3 where the machine is not quiet."""
    options = parser().parse_args(arguments)
    if options.command == "gpu":
        return gpu.main(options)
    run = {"speed": run_speed, "behaviour": run_behaviour, "greedy": run_greedy}[options.command]
    try:
        return asyncio.run(run(options))
    except (EngineError, RuntimeError) as error:
        tell(f"bench_engine: {error}")
        return 1
    except KeyboardInterrupt:
        tell("stopped")
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
