"""A gateway and its generator as real processes, with the bus and the counters that they need."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from testkit.ports import free_port
from testkit.processes import ServiceProcess
from testkit.servers import NatsServer, ValkeyServer, nats_server, valkey_server

KEY, ADMIN_KEY = "sk-boot-0123456789abcdef", "sk-admin-0123456789abcdef"
MODEL = "smollm2-135m-instruct"


@dataclass
class Pair:
    """A gateway and its generator on the toy engine."""

    gateway: ServiceProcess
    generator: ServiceProcess
    nats: NatsServer
    valkey: ValkeyServer
    database: Path  # the gateway's

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
        yield Pair(gateway, generator, nats, valkey, tmp_path / "gateway" / "gateway.db")
