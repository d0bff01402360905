"""Open-loop load on a gateway: requests come when they come, whether those before them are answered or not."""

import asyncio
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass

import aiohttp

from bench_overload.backend import MODEL


@dataclass(frozen=True)
class Stream:
    """Requests of one tenant: so many a second, of such a size, each with so much time."""

    tenant: str
    key: str
    per_s: float
    prompt_tokens: int
    completion_tokens: int
    within_s: float


@dataclass(frozen=True)
class Outcome:
    """What became of one request; status 0 where there was no answer."""

    tenant: str
    status: int
    took_s: float
    is_in_time: bool
    tokens: int
    ended_s: float  # since the load began


async def run(base_url: str, streams: Sequence[Stream], seconds: float, seed: int) -> list[Outcome]:
    """Sends for so long and waits for every answer."""
    began_s = time.monotonic()
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(base_url, connector=connector, timeout=aiohttp.ClientTimeout(120)) as session:

        async def one(stream: Stream) -> Outcome:
            status, sent_s = 0, time.monotonic()
            try:
                async with session.post(
                    "/v1/completions",
                    json={
                        "model": MODEL,
                        "prompt": "abcd" * stream.prompt_tokens,
                        "max_tokens": stream.completion_tokens,
                    },
                    headers={
                        "authorization": f"Bearer {stream.key}",
                        "x-request-timeout-s": str(stream.within_s),
                    },
                ) as answer:
                    await answer.read()
                    status = answer.status
            except (aiohttp.ClientError, TimeoutError):
                pass
            took_s = time.monotonic() - sent_s
            is_in_time = status == 200 and took_s <= stream.within_s
            tokens = stream.prompt_tokens + stream.completion_tokens if status == 200 else 0
            return Outcome(stream.tenant, status, took_s, is_in_time, tokens, time.monotonic() - began_s)

        async def all_of(stream: Stream, chance: random.Random) -> list[Outcome]:
            tasks: list[asyncio.Task[Outcome]] = []
            at_s = began_s
            while (at_s := at_s + chance.expovariate(stream.per_s)) < began_s + seconds:
                await asyncio.sleep(at_s - time.monotonic())
                tasks.append(asyncio.create_task(one(stream)))
            return list(await asyncio.gather(*tasks))

        loads = [all_of(stream, random.Random(seed + number)) for number, stream in enumerate(streams)]
        return [outcome for outcomes in await asyncio.gather(*loads) for outcome in outcomes]


def percentile(values: Sequence[float], part: float) -> float:
    """A value that was seen; NaN where there is none."""
    if not values:
        return float("nan")
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(part * len(ordered)))]
