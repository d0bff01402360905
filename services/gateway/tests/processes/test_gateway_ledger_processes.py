"""The ledger against the generator's own counters, both as real processes: clients leave, the gateway is killed."""

import asyncio
import contextlib
import random

import httpx
import pytest

from testkit import eventually

from .conftest import MODEL, Pair

pytestmark = [pytest.mark.integration, pytest.mark.timeout(240)]


def _body(dice: random.Random, *, stream: bool) -> dict[str, object]:
    kinds = [{}, {"n": 3}, {"seed": 7}, {"stop": ["e"]}]
    return {
        "model": MODEL,
        "messages": [{"role": "user", "content": "word " * dice.randint(1, 60)}],
        "max_tokens": dice.randint(1, 600),
        "temperature": 1.0,
        "stream": stream,
    } | dice.choice(kinds)


async def _ask(client: httpx.AsyncClient, dice: random.Random) -> None:
    """One request of some kind; its client may leave at any moment, before the first byte too."""
    stays = dice.random() < 0.3
    leave_s = 60.0 if stays else dice.random() ** 3 * 0.6
    route, body = "/v1/chat/completions", _body(dice, stream=dice.random() < 0.7)
    if dice.random() < 0.25:
        prompts = ["one", "two and more", "three"]
        route, body = "/v1/completions", {"model": MODEL, "prompt": prompts, "max_tokens": dice.randint(1, 200)}
    elif dice.random() < 0.1:
        body["max_tokens"] = 100_000  # refused by the generator
    with contextlib.suppress(httpx.HTTPError, TimeoutError):
        async with asyncio.timeout(leave_s), client.stream("POST", route, json=body) as answer:
            async for _ in answer.aiter_raw():
                pass


async def _storm(pair: Pair, num_requests: int, seed: int, at_a_time: int = 24) -> None:
    slots = asyncio.Semaphore(at_a_time)
    async with pair.client() as client:

        async def one(number: int) -> None:
            async with slots:
                await _ask(client, random.Random(seed * 10_000 + number))

        await asyncio.gather(*(one(number) for number in range(num_requests)))


async def test_ledger_equals_the_generators_counters_whatever_clients_do(pair: Pair) -> None:
    await _storm(pair, 150, seed=1)
    await eventually(pair.agree, timeout_s=60, interval_s=0.3)
    rows = await pair.rows()
    assert {row["is_exact"] for row in rows} == {"1"}
    reasons = {row["finish_reason"] for row in rows}
    assert {"cancelled", "length"} <= reasons, reasons
    assert (await pair.usage())["completion_tokens"] > 1000


async def test_ledger_equals_the_generators_counters_when_the_gateway_is_killed(pair: Pair) -> None:
    for seed in (2, 3, 4):
        storm = asyncio.create_task(_storm(pair, 60, seed))
        await asyncio.sleep(0.4 + 0.3 * seed)
        pair.gateway.kill9()
        await storm
        await asyncio.to_thread(pair.gateway.start)
    await _storm(pair, 20, seed=5)
    await eventually(pair.agree, timeout_s=90, interval_s=0.3)
    died = [row for row in await pair.rows() if row["error_code"] == "gateway_died"]
    assert died and any(int(row["completion_tokens"]) for row in died), "no request was under way at a kill"


async def test_what_a_killed_generator_sent_stays_accounted_and_says_that_it_is_not_exact(pair: Pair) -> None:
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": "word"}],
        "max_tokens": 1900,
        "stream": True,
        "logit_bias": {"256": -100},  # no end token
    }
    async with pair.client() as client, client.stream("POST", "/v1/chat/completions", json=body) as answer:
        lines = answer.aiter_lines()
        for _ in range(40):
            await anext(lines)
        pair.generator.kill9()
        rest = [line async for line in lines]
    assert "error" in rest[-2] or "error" in rest[-1]
    await asyncio.to_thread(pair.generator.start)

    async def settled() -> dict[str, str] | None:
        rows = await pair.rows()
        return rows[0] if rows else None

    row = await eventually(settled, timeout_s=60)
    assert row["is_exact"] == "0" and row["model"] == MODEL
    assert int(row["prompt_tokens"]) == len("user: word\nassistant: ") and int(row["completion_tokens"]) >= 19
    await _storm(pair, 20, seed=6)  # and the next ones are exact again
    after = await pair.rows()
    assert [r["is_exact"] for r in after].count("0") == 1
