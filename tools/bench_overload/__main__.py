"""`make bench-overload`: the gateway in front of a generator of a fixed capacity, at one to five times of it.

    PYTHONPATH=tools python -m bench_overload --seconds 8

Twice: as it is, and with admission that lets everything through, so that the generator's own line is the only one.
"""

import argparse
import asyncio
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import aiohttp

from bench_overload import load
from bench_overload.backend import Capacity, serve
from bench_overload.load import Outcome, Stream
from testkit import eventually
from testkit.processes import ServiceProcess
from testkit.servers import ValkeyServer

SHORT, LONG = (40, 60), (2000, 60)  # tokens of prompt and completion
WITHIN_S = 3.0
_NOBODY = "127.0.0.1:1"
_ADMIN = "sk-benchadmin-0123456789abcdef0123456789abcdef"
WAYS = {
    "admission": {},
    "all let through": {"MAX_RUNNING": 4096, "MOST_RUNNING": 4096, "MAX_WAIT_S": 3600},
}


def tell(line: str) -> None:
    """Progress goes to stderr, results to stdout."""
    print(line, file=sys.stderr, flush=True)


@asynccontextmanager
async def gateway(valkey: ValkeyServer, generator: str, capacity: Capacity, way: str) -> AsyncIterator[str]:
    """A gateway of its own; gives its base URL."""
    settings = {
        "MAX_RUNNING": capacity.slots,
        "GENERATOR_ADDR": generator,
        "VALKEY_URL": valkey.url,
        "NATS_URL": f"nats://{_NOBODY}",
        "KEY_PEPPER": "p" * 32,
        "BOOTSTRAP_ADMIN_KEY": _ADMIN,
        "LOG_LEVEL": "ERROR",
    } | {f"{name}_ADDR": _NOBODY for name in ("EMBEDDER", "RETRIEVER", "MONITOR", "TRAINER", "EVALUATOR")}
    process = ServiceProcess("gateway", settings | WAYS[way], ready_path="/healthz")
    process._settings["DATA_DIR"] = process.data_dir / "data"
    try:
        await asyncio.to_thread(process.start)
        yield f"http://127.0.0.1:{process.http_port}"
    finally:
        await asyncio.to_thread(process.close)


async def make_key(base_url: str, tenant: str) -> str:
    """A key of the tenant."""
    async with aiohttp.ClientSession(base_url, headers={"authorization": f"Bearer {_ADMIN}"}) as session:
        made = await eventually(lambda: _made(session, tenant))
        assert made is not None
        return made


async def _made(session: aiohttp.ClientSession, tenant: str) -> str | None:
    async with session.post("/admin/keys", json={"tenant": tenant}) as answer:
        if answer.status == 503:  # it is not quite up
            return None
        answer.raise_for_status()
        key: str = (await answer.json())["key"]
        return key


async def overload(base_url: str, capacity: Capacity, seconds: float, levels: Sequence[float]) -> list[str]:
    """Goodput at multiples of the capacity."""
    key, full = await make_key(base_url, "acme"), capacity.per_s(*SHORT)
    await load.run(base_url, [Stream("acme", key, full, *SHORT, WITHIN_S)], min(seconds, 4.0), seed=1)  # warm-up
    rows, good = [], []
    for level in levels:
        stream = Stream("acme", key, level * full, *SHORT, WITHIN_S)
        outcomes = await load.run(base_url, [stream], seconds, seed=int(level * 100))
        in_time = [one for one in outcomes if one.is_in_time]
        good.append(len(in_time) / max(seconds, max(one.ended_s for one in outcomes)))
        shed = [one.took_s for one in outcomes if one.status == 503]
        num_late = len(outcomes) - len(in_time) - len(shed)
        took = [one.took_s for one in in_time]
        rows.append(
            f"| {level:g}x | {good[-1] / full:.0%} | {good[-1] / max(good):.0%} | {len(shed) / len(outcomes):.0%} "
            f"| {num_late / len(outcomes):.0%} | {_spread(took)} | {load.percentile(shed, 0.95) * 1000:.0f} ms |"
        )
        tell(rows[-1])
    return rows


async def fairness(base_url: str, capacity: Capacity, seconds: float) -> str:
    """A tenant of short prompts alone, beside one that floods with long ones, and both flooding."""
    short_key, long_key = await make_key(base_url, "short"), await make_key(base_url, "long")
    short = Stream("short", short_key, 0.1 * capacity.per_s(*SHORT), *SHORT, 30.0)
    long = Stream("long", long_key, 3 * capacity.per_s(*LONG), *LONG, 30.0)
    both = Stream("short", short_key, 3 * capacity.per_s(*SHORT), *SHORT, 30.0)
    alone = _took(await load.run(base_url, [short], seconds, seed=5))
    beside = _took(await load.run(base_url, [short, long], seconds, seed=5))
    flooded = await load.run(base_url, [both, long], seconds, seed=9)
    tokens = {
        tenant: sum(one.tokens for one in flooded if one.tenant == tenant and one.ended_s <= seconds)
        for tenant in ("short", "long")
    }
    return (
        f"| {_spread(alone)} | {_spread(beside)} "
        f"| {load.percentile(beside, 0.5) / load.percentile(alone, 0.5):.1f}x "
        f"| {tokens['short'] / max(1, sum(tokens.values())):.0%} |"
    )


def _spread(seconds: Sequence[float]) -> str:
    return f"{load.percentile(seconds, 0.5):.2f} / {load.percentile(seconds, 0.95):.2f} s"


def _took(outcomes: Sequence[Outcome]) -> list[float]:
    """Of the tenant with short prompts; what was refused counts as waiting for ever."""
    return [one.took_s if one.status == 200 else float("inf") for one in outcomes if one.tenant == "short"]


async def bench(options: argparse.Namespace) -> None:
    """Runs both and prints the tables."""
    capacity = Capacity()
    levels = [float(level) for level in options.levels.split(",")]
    goodput = [
        "| load | goodput of capacity | of peak | shed | late or failed | in time p50 / p95 | refused within p95 |"
    ]
    goodput.append("| --- | --- | --- | --- | --- | --- | --- |")
    fair = ["| | short alone p50 / p95 | beside long prompts p50 / p95 | p50, ratio | both flood: short's tokens |"]
    fair.append("| --- | --- | --- | --- | --- |")
    valkey = ValkeyServer()
    server, address = await serve(capacity)
    try:
        await asyncio.to_thread(valkey.start)
        for way in WAYS:
            tell(f"{way}:")
            async with gateway(valkey, address, capacity, way) as base_url:
                goodput += [f"| **{way}** |" + " |" * 6, *await overload(base_url, capacity, options.seconds, levels)]
            async with gateway(valkey, address, capacity, way) as base_url:
                fair.append(f"| {way} " + await fairness(base_url, capacity, options.seconds))
                tell(fair[-1])
    finally:
        await server.stop(None)
        await asyncio.to_thread(valkey.close)
    print("\n".join([*goodput, "", *fair]))


def main(arguments: Sequence[str]) -> int:
    """The command line."""
    parser = argparse.ArgumentParser("bench_overload", description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--seconds", type=float, default=10.0, help="of each load")
    parser.add_argument("--levels", default="1,2,3,4,5", help="multiples of the capacity")
    asyncio.run(bench(parser.parse_args(arguments)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
