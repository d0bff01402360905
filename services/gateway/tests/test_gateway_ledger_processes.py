"""The ledger against the generator's own counters, both as real processes: clients leave, the gateway is killed."""

import asyncio
import contextlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from testkit import eventually
from testkit.ports import free_port
from testkit.processes import ServiceProcess
from testkit.servers import nats_server, valkey_server

pytestmark = [pytest.mark.integration, pytest.mark.timeout(240)]

KEY, ADMIN_KEY = "sk-boot-0123456789abcdef", "sk-admin-0123456789abcdef"
MODEL = "smollm2-135m-instruct"


@dataclass
class Pair:
    """A gateway and its generator on the toy engine."""

    gateway: ServiceProcess
    generator: ServiceProcess

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.gateway.http_port}"

    def client(self, key: str = KEY) -> httpx.AsyncClient:
        headers = {"authorization": f"Bearer {key}"}
        limits = httpx.Limits(max_connections=200)
        return httpx.AsyncClient(base_url=self.base_url, headers=headers, trust_env=False, timeout=60.0, limits=limits)

    async def usage(self) -> dict[str, int]:
        """The sums over the ledger, of the model."""
        async with self.client(ADMIN_KEY) as client:
            rows = (await client.get("/admin/usage", params={"model": MODEL})).json()["data"]
        kinds = ("prompt_tokens", "completion_tokens", "cached_tokens", "num_requests")
        return {kind: sum(row[kind] for row in rows) for kind in kinds}

    def emitted(self) -> dict[str, float]:
        """What the generator counts."""
        return {
            f"{kind}_tokens": self.generator.metric("pressroom_tokens_total", kind=kind)
            for kind in ("prompt", "completion", "cached")
        }

    async def agree(self) -> bool:
        """Nothing runs, and ledger and counters say the same."""
        if self.generator.metric("pressroom_running_sequences"):
            return False
        usage = await self.usage()
        return all(usage[kind] == count for kind, count in self.emitted().items())

    async def rows(self) -> list[dict[str, str]]:
        """Every row of the ledger."""
        async with self.client(ADMIN_KEY) as client:
            lines = (await client.get("/admin/usage/rows")).text.splitlines()
        if not lines:  # nothing is settled yet: even the names are missing
            return []
        names, *rows = [line.split(",") for line in lines]
        return [dict(zip(names, row, strict=True)) for row in rows]


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    with contextlib.ExitStack() as stack:
        nats = stack.enter_context(nats_server())
        valkey = stack.enter_context(valkey_server())
        model_dir = tmp_path / MODEL
        model_dir.mkdir()
        generator = ServiceProcess(
            "generator",
            {"ENGINE": "toy", "MODEL_DIR": model_dir, "NATS_URL": nats.url, "MAX_MODEL_LEN": 2048, "MAX_RUNNING": 16},
        )
        stack.callback(generator.close)
        generator.start()
        away = f"127.0.0.1:{free_port()}"
        peers = ("EMBEDDER", "RETRIEVER", "MONITOR", "TRAINER", "EVALUATOR")
        gateway = ServiceProcess(
            "gateway",
            {f"{peer}_ADDR": away for peer in peers}
            | {
                "GENERATOR_ADDR": generator.address,
                "NATS_URL": nats.url,
                "VALKEY_URL": valkey.url,
                "DATA_DIR": tmp_path / "gateway",
                "KEY_PEPPER": "p" * 32,
                "BOOTSTRAP_API_KEY": KEY,
                "BOOTSTRAP_ADMIN_KEY": ADMIN_KEY,
            },
        )
        stack.callback(gateway.close)
        gateway.start()
        yield Pair(gateway, generator)


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
