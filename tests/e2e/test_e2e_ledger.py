"""The ledger of the running system against the generator's own counters, under clients that leave and a kill -9."""

import asyncio
import contextlib
import random
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from testkit import eventually_sync

CHAT = "smollm2-135m-instruct"
KINDS = ("prompt", "completion", "cached")


def _emitted(system: Any) -> dict[str, float]:
    """What the generator counts, of all models."""
    counts = dict.fromkeys(KINDS, 0.0)
    for family in text_string_to_metric_families(system.metrics("generator")):
        for sample in family.samples:
            if sample.name == "pressroom_tokens_total":
                counts[sample.labels["kind"]] += sample.value
    return counts


def _written(system: Any) -> dict[str, float]:
    """The sums over the ledger; encoders are not the generator's."""
    url = system.env["PRESSROOM_BASE_URL"].removesuffix("/v1") + "/admin/usage"
    headers = {"authorization": f"Bearer {system.env['PRESSROOM_ADMIN_KEY']}"}
    rows = httpx.get(url, headers=headers, trust_env=False, timeout=30).json()["data"]
    rows = [row for row in rows if row["model"] != "all-minilm-l6-v2"]
    return {kind: sum(row[f"{kind}_tokens"] for row in rows) for kind in KINDS}


async def _leaving_clients(system: Any, num_clients: int, seed: int) -> None:
    dice = random.Random(seed)

    async def one(client: httpx.AsyncClient, leave_s: float, body: dict[str, object]) -> None:
        with contextlib.suppress(httpx.HTTPError, TimeoutError):
            async with asyncio.timeout(leave_s), client.stream("POST", "/chat/completions", json=body) as answer:
                async for _ in answer.aiter_raw():
                    pass

    headers = {"authorization": f"Bearer {system.env['PRESSROOM_API_KEY']}"}
    base_url = system.env["PRESSROOM_BASE_URL"]
    async with httpx.AsyncClient(base_url=base_url, headers=headers, trust_env=False, timeout=120) as client:
        asked = []
        for number in range(num_clients):
            body = {
                "model": CHAT,
                "messages": [{"role": "user", "content": f"Count from {number} upwards, please."}],
                "max_tokens": dice.randint(2, 60),
                "stream": dice.random() < 0.7,
            }
            asked.append(one(client, 100.0 if dice.random() < 0.3 else dice.random() * 4, body))
        await asyncio.gather(*asked)


def test_ledger_equals_the_generators_counters_under_leaving_clients_and_a_killed_gateway(system: Any) -> None:
    system.wait_all_ready()
    emitted, written = _emitted(system), _written(system)

    def agree() -> bool:
        try:
            more_emitted = {kind: count - emitted[kind] for kind, count in _emitted(system).items()}
            return more_emitted == {kind: count - written[kind] for kind, count in _written(system).items()}
        except (httpx.HTTPError, KeyError):  # the gateway is on its way back
            return False

    async def storm_and_kill() -> None:
        storm = asyncio.create_task(_leaving_clients(system, 24, seed=1))
        await asyncio.sleep(2.5)
        await asyncio.to_thread(system.kill9, "gateway")
        await storm

    pid = system.pid("gateway")
    asyncio.run(storm_and_kill())
    system.wait_ready("gateway", other_than=pid)
    asyncio.run(_leaving_clients(system, 16, seed=2))
    eventually_sync(agree, 120, interval_s=1.0)
    assert _emitted(system)["completion"] > emitted["completion"] + 20
