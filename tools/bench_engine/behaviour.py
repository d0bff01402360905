"""What the generator promises beside speed, through its gRPC: stutter, prefix cache, ragged arrivals, cancels."""

import asyncio
import contextlib
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import grpc

from bench_engine.answers import Answer, prompt
from bench_engine.clients import ANSWER_TIMEOUT_S, GrpcClient, read
from bench_engine.figures import percentile
from loadtest import arrivals, prompts

STREAMS = 8
LONG_TOKENS, PREFIX_TOKENS, TAIL_TOKENS = 1500, 1000, 40
_ALONE_TOKENS = 48
_DRAINED_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class Stutter:
    """Seconds between tokens of running streams (p95), alone and while a long prompt is prefilled beside them."""

    alone_s: float
    beside_s: float
    long_ttft_s: float
    num_gaps: int

    @property
    def ratio(self) -> float:
        """At most 2 is promised."""
        return self.beside_s / self.alone_s


async def stutter(client: GrpcClient, number: int) -> Stutter:
    """Eight streams decode; when each has 48 tokens a prompt of 1,500 comes. number: a fresh seed for each call."""
    running = [Answer(time.perf_counter()) for _ in range(STREAMS)]
    seeds = range(2_000_000 + number * 100, 2_000_000 + number * 100 + STREAMS)

    async def stream(answer: Answer, seed: int) -> None:
        async for message in client.stub.Generate(client.request(prompt(seed), 600), timeout=ANSWER_TIMEOUT_S):
            read(message, answer)

    tasks = [asyncio.create_task(stream(answer, seed)) for answer, seed in zip(running, seeds, strict=True)]
    try:
        while min(len(answer.stamps) for answer in running) < 8:
            await _pause(tasks)
        alone_from_s = time.perf_counter()
        aims = [len(answer.stamps) + _ALONE_TOKENS for answer in running]
        while any(len(answer.stamps) < aim for answer, aim in zip(running, aims, strict=True)):
            await _pause(tasks)
        long_from_s = time.perf_counter()
        long = await client.generate(client.request(prompts.text_of(LONG_TOKENS, number), 1))
        long_to_s = time.perf_counter()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    if long.error or long.ttft_s is None:
        raise RuntimeError(f"the long prompt was not answered: {long.error}")
    beside = gaps_within(running, long_from_s, long_to_s)
    alone = gaps_within(running, alone_from_s, long_from_s)
    return Stutter(percentile(alone, 95), percentile(beside, 95), long.ttft_s, len(beside))


async def _pause(tasks: Sequence["asyncio.Task[None]"]) -> None:
    await asyncio.sleep(0.02)
    for task in tasks:
        if task.done():
            task.result()
            raise RuntimeError("a stream ended before the long prompt came")


def gaps_within(answers: Sequence[Answer], from_s: float, to_s: float) -> list[float]:
    """Gaps that ended within a span, and those still open at its end: a stream that stands still is not left out."""
    found: list[float] = []
    for answer in answers:
        pairs = zip(answer.stamps, answer.stamps[1:], strict=False)
        found += [after - before for before, after in pairs if from_s <= after < to_s]
        before = [stamp for stamp in answer.stamps if stamp < to_s]
        if before and before[-1] < from_s:
            found.append(to_s - before[-1])
    return found


@dataclass(frozen=True, slots=True)
class Prefix:
    """TTFT of the first request with a prefix of 1,000 tokens, of the second, and of one of another tenant."""

    first_s: float
    second_s: float
    other_s: float
    cached_tokens: int
    other_cached_tokens: int


async def prefix(client: GrpcClient, number: int) -> Prefix:
    """Three requests one after another: same prefix, tails of their own."""
    shared = prompts.text_of(PREFIX_TOKENS, 3_000_000 + number)
    answers: list[Answer] = []
    for tail, salt in enumerate(("one", "one", "two")):
        text = shared + prompts.text_of(prompts.TEMPLATE_TOKENS + TAIL_TOKENS, 4_000_000 + number * 10 + tail)
        answers.append(await client.generate(client.request(text, 2, salt=f"{salt}-{number}")))
    first, second, other = answers
    for answer in answers:
        if answer.error or answer.ttft_s is None:
            raise RuntimeError(f"not answered: {answer.error}")
    assert first.ttft_s and second.ttft_s and other.ttft_s
    return Prefix(first.ttft_s, second.ttft_s, other.ttft_s, second.cached_tokens, other.cached_tokens)


@dataclass(frozen=True, slots=True)
class Ragged:
    """Arrivals and lengths of a trace, in open loop; TTFT counts from when a request was due."""

    num: int
    num_failed: int
    tokens_per_s: float
    ttft_p50_s: float
    ttft_p95_s: float
    gap_p95_s: float
    most_under_way: int


async def ragged(client: GrpcClient, trace: Path, seconds: float, speed: float) -> Ragged:
    """Plays the beginning of a trace. Lengths beyond 1,800 and 200 tokens are shortened to that."""
    due, _ = arrivals.clip(arrivals.until(arrivals.faster(arrivals.read_trace(trace), speed), seconds), 1800, 200)
    answers, under_way, most = list[Answer](), 0, 0
    began_s = time.perf_counter()

    async def one(number: int, arrival: arrivals.Arrival) -> None:
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        request = client.request(prompts.text_of(arrival.prompt_tokens, 5_000_000 + number), arrival.completion_tokens)
        answer = await client.generate(request)
        answer.began_s = began_s + arrival.at_s
        answers.append(answer)
        under_way -= 1

    async with asyncio.TaskGroup() as group:
        for number, arrival in enumerate(due):
            await asyncio.sleep(max(0.0, began_s + arrival.at_s - time.perf_counter()))
            group.create_task(one(number, arrival))
    wall_s = time.perf_counter() - began_s
    whole = [answer for answer in answers if not answer.error and answer.stamps]
    ttfts = [answer.ttft_s for answer in whole if answer.ttft_s is not None]
    return Ragged(
        num=len(answers),
        num_failed=len(answers) - len(whole),
        tokens_per_s=sum(answer.completion_tokens for answer in whole) / wall_s,
        ttft_p50_s=percentile(ttfts, 50),
        ttft_p95_s=percentile(ttfts, 95),
        gap_p95_s=percentile((gap for answer in whole for gap in answer.gaps_s), 95),
        most_under_way=most,
    )


@dataclass(frozen=True, slots=True)
class Cancels:
    """What is left after many cancels, and how long it took until nothing was."""

    num: int
    num_finished_first: int
    num_errors: int
    seconds: float
    blocks_before: int
    blocks_left: int
    running_left: int
    waiting_left: int
    drained_s: float


async def cancels(client: GrpcClient, num: int, seed: int, num_streams: int = 24) -> Cancels:
    """Random prompts, each cancelled by the client at a random moment: in the queue, in prefill or while it decodes."""
    rng = random.Random(seed)
    before = (await client.stats()).blocks_used
    orders = iter([(rng.randint(20, 400), rng.expovariate(1 / 0.4), rng.getrandbits(30)) for _ in range(num)])
    finished = errors = 0

    async def stream() -> None:
        nonlocal finished, errors
        for length, delay_s, number in orders:
            call = client.stub.Generate(client.request(prompts.text_of(length, number), 64), timeout=ANSWER_TIMEOUT_S)
            try:
                async with asyncio.timeout(delay_s):
                    async for _ in call:
                        pass
                finished += 1
            except TimeoutError:
                call.cancel()
            except grpc.aio.AioRpcError:
                errors += 1

    began_s = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for _ in range(num_streams):
            group.create_task(stream())
    ended_s = time.perf_counter()
    stats = await client.stats()
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_DRAINED_TIMEOUT_S):
            while stats.blocks_used > 0 or stats.running_sequences or stats.waiting_sequences:
                await asyncio.sleep(0.02)
                stats = await client.stats()
    return Cancels(
        num=num,
        num_finished_first=finished,
        num_errors=errors,
        seconds=ended_s - began_s,
        blocks_before=before,
        blocks_left=stats.blocks_used,
        running_left=stats.running_sequences,
        waiting_left=stats.waiting_sequences,
        drained_s=time.perf_counter() - ended_s,
    )


@dataclass(frozen=True, slots=True)
class Independence:
    """Of so many texts: equal when asked twice alone, and equal alone and in one batch."""

    num: int
    equal_twice: int
    equal_in_batch: int


async def independence(client: GrpcClient, temperature: float, num_tokens: int = 48) -> Independence:
    """Eight prompts with a seed, one after another, again, then all at once."""

    async def one(number: int) -> list[int]:
        request = client.request(prompt(6_000_000 + number), num_tokens)
        request.sampling.temperature, request.sampling.seed = temperature, 7 + number
        answer = await client.generate(request)
        if answer.error:
            raise RuntimeError(f"not answered: {answer.error}")
        return answer.token_ids

    alone = [await one(number) for number in range(STREAMS)]
    twice = [await one(number) for number in range(STREAMS)]
    batch = await asyncio.gather(*(one(number) for number in range(STREAMS)))
    return Independence(
        STREAMS,
        sum(a == b for a, b in zip(alone, twice, strict=True)),
        sum(a == b for a, b in zip(alone, batch, strict=True)),
    )


async def report(client: GrpcClient, trace: Path, *, pairs: int, num_cancels: int, seconds: float) -> str:
    """All of it, in Markdown; the promises that are kept or broken are said."""
    lines: list[str] = []
    stutters = [await stutter(client, number) for number in range(pairs)]
    ratio = statistics.median(found.ratio for found in stutters)
    alone, beside = (statistics.median(getattr(s, name) for s in stutters) for name in ("alone_s", "beside_s"))
    long_s = statistics.median(found.long_ttft_s for found in stutters)
    lines.append(
        f"- Stutter: p95 between tokens of {STREAMS} streams {alone * 1000:.0f} ms alone, {beside * 1000:.0f} ms "
        f"while a prompt of {LONG_TOKENS} tokens is prefilled ({long_s:.2f} s): "
        f"{ratio:.2f} times, {_kept(ratio <= 2)} (at most 2; median of {pairs})"
    )
    found = [await prefix(client, number) for number in range(pairs)]
    share = statistics.median(p.second_s / p.first_s for p in found)
    leaked = sum(p.other_cached_tokens for p in found)
    lines.append(
        f"- Prefix of {PREFIX_TOKENS} tokens: TTFT {statistics.median(p.first_s for p in found) * 1000:.0f} ms, the "
        f"second time {statistics.median(p.second_s for p in found) * 1000:.0f} ms with "
        f"{min(p.cached_tokens for p in found)} cached tokens: {share:.2f} of it, {_kept(share <= 0.2)} (at most 0.2); "
        f"another tenant {statistics.median(p.other_s for p in found) * 1000:.0f} ms with {leaked} cached: "
        f"{_kept(leaked == 0)}"
    )
    for temperature in (0.0, 1.0):
        same = await independence(client, temperature)
        lines.append(
            f"- The same seed at temperature {temperature:g}, {same.num} texts: {same.equal_twice} equal when asked "
            f"twice, {same.equal_in_batch} equal alone and in a batch of {same.num}: "
            f"{_kept(same.equal_twice == same.equal_in_batch == same.num)}"
        )
    played = await ragged(client, trace, seconds, 1.0)
    lines.append(
        f"- {played.num} arrivals of {trace.name} in {seconds:.0f} s (at most {played.most_under_way} at once): "
        f"{played.tokens_per_s:.1f} tok/s, TTFT p50 {played.ttft_p50_s:.3f} and p95 {played.ttft_p95_s:.3f} s from "
        f"when due, p95 between pieces {played.gap_p95_s * 1000:.0f} ms, {played.num_failed} failed"
    )
    ended = await cancels(client, num_cancels, seed=4)
    lines.append(
        f"- {ended.num} random cancels in {ended.seconds:.0f} s ({ended.num_finished_first} had ended before, "
        f"{ended.num_errors} errors): {ended.blocks_left} blocks, {ended.running_left} running and "
        f"{ended.waiting_left} waiting after {ended.drained_s:.2f} s: "
        f"{_kept(not (ended.blocks_left or ended.running_left or ended.waiting_left or ended.num_errors))}"
    )
    return "\n".join(lines) + "\n"


def _kept(is_kept: bool) -> str:
    return "kept" if is_kept else "BROKEN"
