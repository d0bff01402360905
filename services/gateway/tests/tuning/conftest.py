"""The gateway over real SQLite and real files, with fakes of the services that it calls, for files, jobs and models."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from openai import AsyncOpenAI
from pressroom.common.v1 import common_pb2
from pressroom.events.v1 import events_pb2
from starlette.types import ASGIApp

from chassis.bus import Received
from chassis.errors import Code, PlatformError
from chassis.telemetry import tracer
from contracts import subjects
from gateway.api.consumers import JobConsumer
from gateway.api.http import Limits, make_app
from gateway.api.http_admin_keys import keys_router
from gateway.api.http_documents import documents_router
from gateway.api.http_evaluations import evaluations_router
from gateway.api.http_jobs import jobs_router
from gateway.api.openai_batches import batches_router
from gateway.api.openai_files import files_router
from gateway.api.openai_finetuning import finetuning_router
from gateway.api.settlement import Recorder
from gateway.backends import events
from gateway.backends.bus_control import BusControl
from gateway.backends.directory_files import DirectoryFiles
from gateway.backends.graph_files import Services, assemble, read_graphs
from gateway.backends.sqlite import Database
from gateway.backends.sqlite_batches import SqliteBatches
from gateway.backends.sqlite_documents import SqliteDocuments
from gateway.backends.sqlite_finetuning import SqliteEvaluations, SqliteFinetunes
from gateway.backends.sqlite_idempotency import SqliteIdempotency
from gateway.backends.sqlite_jobs import SqliteJobs
from gateway.backends.sqlite_keys import SqliteKeys
from gateway.backends.sqlite_ledger import SqliteLedger
from gateway.backends.sqlite_outbox import SqliteOutbox
from gateway.backends.sqlite_schema import MIGRATIONS
from gateway.backends.sqlite_uploads import SqliteUploads
from gateway.core.administration import Administration, NewKey
from gateway.core.batches import Batches
from gateway.core.catalog import Catalog
from gateway.core.documents import Indexed, Library
from gateway.core.evaluations import Evaluations, Task
from gateway.core.finetuning import Finetuning, Run
from gateway.core.idempotency import IdempotencyKeys
from gateway.core.keys import KeyRing
from gateway.core.limits import LocalLimiter
from gateway.core.services import (
    Delta,
    Done,
    Embedded,
    Finished,
    Generation,
    ServedModel,
    Source,
    Started,
    Tokenized,
    Usage,
)
from gateway.core.serving import Serving
from gateway.core.uploads import Uploads
from testkit import free_port
from testkit.fake_bus import FakeBus

GRAPHS_DIR = Path(__file__).parents[2] / "src" / "gateway" / "graphs"
BASE = "smollm2-135m-instruct"
ENCODER = "all-minilm-l6-v2"
MAX_UPLOAD_BYTES = 100_000
MAX_TENANT_BYTES = 250_000
LINE = b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'


@dataclass
class FakeGenerator:
    """Says which adapter answers, word by word."""

    adapters: set[str] = field(default_factory=set)
    calls: list[Generation] = field(default_factory=list)
    num_stopped: int = 0
    num_running: int = 0
    token_s: float = 0.0
    error: Exception | None = None

    async def generate(self, call: Generation, *, timeout_s: float) -> Any:
        self.calls.append(call)
        if self.error is not None:
            raise self.error
        if call.adapter and call.adapter not in self.adapters:
            raise PlatformError(Code.NOT_FOUND, "no such adapter", param="model", reason="model_not_found")
        complete = False
        self.num_running += 1
        try:
            yield Started(3, "v1")
            for word in ("I", " am", f" {call.adapter or call.model}"):
                await asyncio.sleep(self.token_s)
                yield Delta(0, word, 1)
            yield Finished(0, "stop")
            complete = True
            yield Done(Usage(3, 3, 1))
        finally:
            self.num_running -= 1
            self.num_stopped += not complete

    async def tokenize(self, model: str, prompt: object, *, timeout_s: float) -> Tokenized:
        return Tokenized(10, 2048)

    async def list_models(self, *, timeout_s: float) -> Sequence[ServedModel]:
        return [ServedModel(BASE, 1_700, BASE), *(ServedModel(one, 1_800, BASE) for one in sorted(self.adapters))]


class FakeEmbedder:
    async def embed(self, model: str, inputs: object, *, truncate: bool, dimensions: int, timeout_s: float) -> Embedded:
        return Embedded(([0.5],), 1)

    async def list_models(self, *, timeout_s: float) -> Sequence[ServedModel]:
        return [ServedModel(ENCODER, 1_600)]


@dataclass
class FakeRetriever:
    sources: list[Source] = field(default_factory=list)

    async def search(self, query: object, *, timeout_s: float) -> Sequence[Source]:
        return self.sources


class FakeIndex:
    """Nothing is indexed."""

    async def get(self, tenant: str, document_id: str) -> Indexed | None:
        return None

    async def delete(self, tenant: str, document_id: str) -> int | None:
        return None


@dataclass
class FakeTrainer:
    """What the trainer knows, or the error that it answers with."""

    runs: dict[str, Run] = field(default_factory=dict)
    error: Exception | None = None

    async def get(self, job_id: str) -> Run | None:
        if self.error is not None:
            raise self.error
        return self.runs.get(job_id)


@dataclass
class FakeEvaluator:
    tasks: list[Task] = field(default_factory=lambda: [Task("facts", "1", ("f1", "rouge1"), "Facts.", 12)])
    error: Exception | None = None

    async def all(self) -> Sequence[Task]:
        if self.error is not None:
            raise self.error
        return self.tasks


@dataclass
class World:
    """The application and everything behind it."""

    app: ASGIApp
    database: Database
    directory: Path
    bus: FakeBus
    outbox: SqliteOutbox
    jobs: SqliteJobs
    kept: SqliteUploads
    files: DirectoryFiles
    catalog: Catalog
    recorder: Recorder
    consumer: JobConsumer
    generator: FakeGenerator
    retriever: FakeRetriever
    trainer: FakeTrainer
    evaluator: FakeEvaluator
    keys: dict[str, str]  # by tenant
    ring: KeyRing
    clients: list[httpx.AsyncClient] = field(default_factory=list)

    def http(self, tenant: str = "acme") -> httpx.AsyncClient:
        """A client with a key of the tenant's."""
        client = httpx.AsyncClient(
            transport=httpx.ASGITransport(app=self.app),
            base_url="http://gateway/v1",
            headers={"authorization": f"Bearer {self.keys[tenant]}"},
        )
        self.clients.append(client)
        return client

    async def upload(self, content: bytes = LINE, purpose: str = "fine-tune", tenant: str = "acme") -> str:
        """Uploads a file; returns its id."""
        response = await self.http(tenant).post(
            "/files", files={"file": ("a.jsonl", content)}, data={"purpose": purpose}
        )
        assert response.status_code == 200, response.text
        file_id = response.json()["id"]
        assert isinstance(file_id, str)
        return file_id

    async def order(self, tenant: str = "acme", **changes: object) -> dict[str, Any]:
        """Orders a finetuning, with a file of its own unless one is given."""
        body = {"model": BASE, "training_file": changes.get("training_file") or await self.upload(tenant=tenant)}
        response = await self.http(tenant).post("/fine_tuning/jobs", json=body | changes)
        assert response.status_code == 200, response.text
        job: dict[str, Any] = response.json()
        return job

    async def report(self, job_id: str, status: str, sequence: int = 1, **fields: object) -> None:
        """Says something of a job as its worker would, over the bus's payload."""
        progress = events_pb2.JobProgress(
            job_id=job_id,
            status=getattr(common_pb2, f"JOB_STATUS_{status}"),
            sequence=sequence,
            at_unix_ms=sequence,
            **fields,
        )
        received = Received(subjects.progress(job_id), progress.SerializeToString(), "", 1, {})
        await self.consumer.on_progress(received)

    async def orders(self, subject: str) -> list[bytes]:
        """What waits to be published on a subject."""
        return [one.message.payload for one in await self.outbox.unpublished(100) if one.message.subject == subject]

    def told_to_stop(self) -> list[str]:
        return [
            events_pb2.RequestCancel.FromString(one.payload).id
            for one in self.bus.broadcasts
            if one.subject == subjects.CONTROL_REQUEST_CANCEL
        ]

    async def usage(self) -> list[tuple[Any, ...]]:
        """The ledger's rows: tenant, key, model, route, tokens, how it ended."""
        return await self.database.read(
            lambda connection: connection.execute(
                "SELECT tenant, key_id, model, route, prompt_tokens, completion_tokens, finish_reason, http_status,"
                " error_code FROM usage ORDER BY id"
            ).fetchall()
        )


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    directory = tmp_path / "files"
    directory.mkdir()
    database = await Database.open(tmp_path / "gateway.db", MIGRATIONS)
    made = await make_world(database, directory)
    yield made
    for client in made.clients:
        await client.aclose()
    await made.recorder.close()
    await database.close()


async def make_world(database: Database, directory: Path) -> World:
    """Puts the application together; what it keeps lies in the database and the directory."""
    bus, outbox, jobs = FakeBus(), SqliteOutbox(database), SqliteJobs(database)
    kept = SqliteUploads(database, max_tenant_bytes=MAX_TENANT_BYTES)
    files, finetunes, control = DirectoryFiles(directory), SqliteFinetunes(database, outbox), BusControl(bus)
    idempotency = SqliteIdempotency(database)
    await idempotency.open()
    generator, embedder, retriever = FakeGenerator(), FakeEmbedder(), FakeRetriever()
    trainer, evaluator = FakeTrainer(), FakeEvaluator()
    graphs = assemble(read_graphs(GRAPHS_DIR), Services(generator, embedder, retriever, tracer().start_as_current_span))
    catalog = Catalog(graphs, generator, embedder, finetunes)
    ledger = SqliteLedger(database, outbox, events.request_completed)
    recorder = Recorder(ledger)
    ring = KeyRing(SqliteKeys(database), b"pepper")
    administration = Administration(SqliteKeys(database), b"pepper", ring, control)
    keys = {tenant: (await administration.create_key("test", NewKey(tenant)))[1] for tenant in ("acme", "other")}
    keys["admin"] = (await administration.create_key("test", NewKey("admin", is_admin=True)))[1]
    evaluations = Evaluations(SqliteEvaluations(database, outbox), kept, evaluator, events.evaluate_job)
    app = make_app(
        catalog=catalog,
        serving=Serving(catalog),
        embedder=embedder,
        keys=ring,
        limiter=LocalLimiter(),
        recorder=recorder,
        limits=Limits(30.0, 64 * 1024, 10**9),
        idempotency=IdempotencyKeys(idempotency, b"pepper"),
        routers=(
            files_router(Uploads(files, kept), files, max_upload_bytes=MAX_UPLOAD_BYTES),
            finetuning_router(Finetuning(finetunes, kept, trainer, events.train_job), catalog, jobs, control),
            evaluations_router(evaluations, catalog),
            jobs_router(jobs, control),
            documents_router(
                Library(files, SqliteDocuments(database, outbox), jobs, FakeIndex(), control, events.ingest_job),
                max_upload_bytes=MAX_UPLOAD_BYTES,
            ),
            batches_router(Batches(SqliteBatches(database, outbox), kept, events.batch_job), control),
            keys_router(administration),
        ),
    )
    return World(
        app,
        database,
        directory,
        bus,
        outbox,
        jobs,
        kept,
        files,
        catalog,
        recorder,
        JobConsumer(bus, jobs, files, control),
        generator,
        retriever,
        trainer,
        evaluator,
        keys,
        ring,
    )


@pytest.fixture
async def client(world: World) -> AsyncIterator[AsyncOpenAI]:
    """The official client, against the application behind a real server."""
    port = free_port()
    server = uvicorn.Server(
        uvicorn.Config(world.app, host="127.0.0.1", port=port, lifespan="off", log_config=None, access_log=False)
    )
    task = asyncio.create_task(server.serve())
    while not server.started:  # noqa: ASYNC110 - uvicorn offers a flag only
        await asyncio.sleep(0.01)
    async with AsyncOpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=world.keys["acme"], max_retries=0) as made:
        yield made
    server.should_exit = True
    await task
