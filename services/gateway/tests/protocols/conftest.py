"""The gateway's real state and servers over a fake bus, generator and embedder; and the official client."""

import asyncio
import contextlib
import json
import sqlite3
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from openai import AsyncOpenAI

from chassis import rpc
from chassis.errors import Code, PlatformError
from chassis.telemetry import tracer
from gateway.api.http import Limits, make_app
from gateway.backends.graph_files import Services, assemble, read_graphs
from gateway.backends.retriever import GrpcRetriever
from gateway.core.ledger import Final
from gateway.core.services import (
    Chat,
    Delta,
    Done,
    Embedded,
    Finished,
    Generation,
    ServedModel,
    Started,
    Tokenized,
    Usage,
)
from gateway.state import Peers, State, open_state
from testkit import free_port
from testkit.fake_bus import FakeBus
from testkit.waiting import eventually

GRAPHS_DIR = Path(__file__).parents[2] / "src" / "gateway" / "graphs"
KEY, ADMIN_KEY = "sk-boot-0123456789abcdef", "sk-admin-0123456789abcdef"
BASE, ENCODER = "smollm2-135m-instruct", "all-minilm-l6-v2"
CHAT = "/v1/chat/completions"
MAX_IN_FLIGHT = 3
_NOBODY = "127.0.0.1:9"


@dataclass
class FakeGenerator:
    """Says a prompt's words again; words that a test names make it wait or fail."""

    calls: list[Generation] = field(default_factory=list)
    held: set[str] = field(default_factory=set)  # prompts that wait until they are let go
    failures: dict[str, list[PlatformError]] = field(default_factory=dict)  # what a prompt meets before its answer
    breaks: set[str] = field(default_factory=set)  # prompts that break off after the first piece
    num_running: int = 0
    most_running: int = 0
    used: dict[str, list[Usage]] = field(default_factory=dict)  # by usage id, one for each call

    async def generate(self, call: Generation, *, timeout_s: float) -> Any:
        self.calls.append(call)
        text = call.prompt.messages[-1].content if isinstance(call.prompt, Chat) else str(call.prompt)
        self.num_running += 1
        self.most_running = max(self.most_running, self.num_running)
        try:
            await asyncio.sleep(0)
            if self.failures.get(text):
                raise self.failures[text].pop(0)
            used = self.used.setdefault(call.usage_id, [])
            used.append(Usage(3))
            yield Started(3, "v1")
            used[-1] = Usage(3, 1)
            yield Delta(0, "so: ", 1)
            if text in self.breaks:
                raise PlatformError(Code.DATA_LOSS, "gone")
            while text in self.held:  # noqa: ASYNC110 - the test lets go of a set's member
                await asyncio.sleep(0.01)
            used[-1] = Usage(3, 2)
            yield Delta(0, text, 1)
            yield Finished(0, "stop")
            yield Done(Usage(3, 2, 0))
        finally:
            self.num_running -= 1

    async def tokenize(self, model: str, prompt: object, *, timeout_s: float) -> Tokenized:
        return Tokenized(3, 2048)

    async def list_models(self, *, timeout_s: float) -> Sequence[ServedModel]:
        return [ServedModel(BASE, 1_700, BASE)]

    async def final(self, usage_id: str, *, timeout_s: float) -> Final:
        """What was used under an id, as the book of the generator's usage tells it."""
        used = self.used.get(usage_id, [])
        return Final(sum(used, Usage()), len(used), is_complete=True)

    async def count_tokens(self, model: str, texts: Sequence[str], *, timeout_s: float) -> Sequence[int]:
        return [3 for _ in texts]

    def asked(self) -> list[str]:
        """The texts in the order of asking."""
        return [call.prompt.messages[-1].content if isinstance(call.prompt, Chat) else "" for call in self.calls]


@dataclass
class FakeEmbedder:
    """Vectors of two numbers."""

    error: PlatformError | None = None

    async def embed(
        self, model: str, inputs: Sequence[object], *, truncate: bool, dimensions: int, timeout_s: float
    ) -> Embedded:
        if model != ENCODER:
            raise PlatformError(Code.NOT_FOUND, "unknown encoder")
        return Embedded(tuple([0.5, 0.25] for _ in inputs), len(inputs))

    async def count_tokens(self, model: str, texts: Sequence[str], *, timeout_s: float) -> Sequence[int]:
        return [1 for _ in texts]

    async def list_models(self, *, timeout_s: float) -> Sequence[ServedModel]:
        if self.error is not None:
            raise self.error
        return [ServedModel(ENCODER, 1_600)]


@dataclass
class Gateway:
    """One running gateway over a folder, as a process would be."""

    state: State
    data_dir: Path
    generator: FakeGenerator
    embedder: "FakeEmbedder"
    bus: FakeBus
    url: str
    grpc_addr: str  # of the services for clients outside
    keys: dict[str, str]
    clients: list[AsyncOpenAI] = field(default_factory=list)

    def client(self, tenant: str = "default") -> AsyncOpenAI:
        """The official client, with a key of the tenant's."""
        made = AsyncOpenAI(base_url=f"{self.url}/v1", api_key=self.keys[tenant], max_retries=0)
        self.clients.append(made)
        return made

    async def accounted(self, rows: list[tuple[Any, ...]], columns: slice = slice(4, 7)) -> None:
        """Waits until the ledger's totals are these: they are written when the answer has been sent."""

        async def are_so() -> bool:
            found = sorted(row[columns] for row in await self.usage())
            assert found == sorted(rows)
            return True

        await eventually(are_so)

    async def usage(self) -> list[tuple[Any, ...]]:
        """The ledger's sums: tenant, key, model, requests, errors, prompt and completion tokens."""
        with contextlib.closing(sqlite3.connect(self.data_dir / "gateway.db")) as connection:
            return connection.execute(
                "SELECT tenant, key_id, model, count(*), sum(error_code <> ''), sum(prompt_tokens), "
                "sum(completion_tokens) FROM usage GROUP BY tenant, key_id, model"
            ).fetchall()

    async def admin(self, method: str, path: str, **rest: Any) -> dict[str, Any]:
        """A request with the admin's key."""
        headers = {"authorization": f"Bearer {ADMIN_KEY}"}
        async with httpx.AsyncClient(base_url=self.url, headers=headers, trust_env=False) as http:
            response = await http.request(method, path, **rest)
        assert response.status_code < 300, response.text
        answer: dict[str, Any] = response.json()
        return answer

    async def new_key(self, tenant: str, **fields: Any) -> None:
        """Makes a key; it is the tenant's from now on."""
        self.keys[tenant] = (await self.admin("POST", "/admin/keys", json={"tenant": tenant} | fields))["key"]


@contextlib.asynccontextmanager
async def running(data_dir: Path, generator: FakeGenerator, bus: FakeBus) -> AsyncIterator[Gateway]:
    """Runs a gateway; at the end its tasks are cut off wherever they are."""
    async with contextlib.AsyncExitStack() as stack:
        channel = await stack.enter_async_context(rpc.connect(_NOBODY))
        embedder = FakeEmbedder()
        services = Services(generator, embedder, GrpcRetriever(channel), tracer().start_as_current_span)
        state = await open_state(
            data_dir=data_dir,
            key_pepper="pepper",
            valkey_url=f"redis://{_NOBODY}",
            bootstrap_api_key=KEY,
            bootstrap_admin_key=ADMIN_KEY,
            max_upload_bytes=8 * 1024 * 1024,
            max_tenant_upload_bytes=64 * 1024 * 1024,
            max_body_bytes=4096,
            max_batch_lines_in_flight=MAX_IN_FLIGHT,
            request_timeout_s=30,
            bus=bus,
            graphs=assemble(read_graphs(GRAPHS_DIR), services),
            peers=Peers(generator, generator, embedder, channel, channel, channel, channel),
        )
        stack.push_async_callback(state.close)
        app = make_app(
            catalog=state.catalog,
            serving=state.serving,
            embedder=embedder,
            keys=state.keys,
            limiter=state.limiter,
            recorder=state.recorder,
            limits=Limits(30, 4096, 8 * 1024 * 1024),
            routers=state.routers,
            in_process=state.in_process,
        )
        tasks = [asyncio.create_task(run()) for _, run in state.tasks]
        stack.push_async_callback(_cut_off, tasks)
        public = rpc.make_server("gateway")
        for add_to_server, servicer, _ in state.public_servicers:
            add_to_server(servicer, public)
        grpc_addr = f"127.0.0.1:{public.add_insecure_port('127.0.0.1:0')}"
        await public.start()
        stack.push_async_callback(public.stop, 1)
        port = free_port()
        server = uvicorn.Server(
            uvicorn.Config(app, host="127.0.0.1", port=port, lifespan="off", log_config=None, access_log=False)
        )
        serving = asyncio.create_task(server.serve())
        await eventually(lambda: server.started)
        url = f"http://127.0.0.1:{port}"
        made = Gateway(state, data_dir, generator, embedder, bus, url, grpc_addr, {"default": KEY})
        await made.new_key("other")
        yield made
        for client in made.clients:
            await client.close()
        server.should_exit = True
        await serving


async def _cut_off(tasks: list[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


@pytest.fixture
async def gateway(tmp_path: Path) -> AsyncIterator[Gateway]:
    async with running(tmp_path, FakeGenerator(), FakeBus()) as made:
        yield made


def chat_line(name: str, text: str, **changes: object) -> dict[str, Any]:
    """One line of a batch for chat."""
    body = {"model": BASE, "messages": [{"role": "user", "content": text}]}
    return {"custom_id": name, "method": "POST", "url": CHAT, "body": body} | changes


def jsonl(lines: Sequence[dict[str, Any] | bytes]) -> bytes:
    """A file of lines; bytes are written as they are."""
    return b"".join((line if isinstance(line, bytes) else json.dumps(line).encode()) + b"\n" for line in lines)


async def order(client: AsyncOpenAI, lines: Sequence[dict[str, Any] | bytes] | bytes, endpoint: str = CHAT) -> str:
    """Uploads lines and orders a batch of them; returns its id."""
    content = lines if isinstance(lines, bytes) else jsonl(lines)
    file = await client.files.create(file=("lines.jsonl", content), purpose="batch")
    batch = await client.batches.create(input_file_id=file.id, endpoint=endpoint, completion_window="24h")  # type: ignore[arg-type]
    return batch.id


async def ended(client: AsyncOpenAI, batch_id: str, timeout_s: float = 20.0) -> Any:
    """The batch once it has ended."""

    async def final() -> Any:
        batch = await client.batches.retrieve(batch_id)
        return batch if batch.status in ("completed", "failed", "expired", "cancelled") else None

    return await eventually(final, timeout_s=timeout_s)


async def results(client: AsyncOpenAI, file_id: str | None) -> list[dict[str, Any]]:
    """The lines of a file of results."""
    if file_id is None:
        return []
    content = await client.files.content(file_id)
    return [json.loads(line) for line in content.text.splitlines()]
