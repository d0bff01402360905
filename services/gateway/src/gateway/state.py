"""Joins the gateway's state (keys, limits, ledger, jobs, documents, files) with its routes and background tasks.

main.py calls open_state once and adds what comes back to the app; it knows nothing of the classes behind it.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import grpc.aio
from fastapi import APIRouter
from pressroom.gateway.v1 import gateway_pb2_grpc

from chassis.bus import Bus
from chassis.jobs import Cancellations
from contracts.jobs import decode_cancel
from contracts.names import DEFAULT_TENANT
from gateway.api.batch_worker import BatchWorker
from gateway.api.consumers import JobConsumer, RevocationListener
from gateway.api.grpc_files import FileServicer
from gateway.api.grpc_graphs import GraphServicer
from gateway.api.http_admin_audit import audit_router
from gateway.api.http_admin_keys import keys_router
from gateway.api.http_admin_limits import limits_router
from gateway.api.http_admin_tenants import tenants_router
from gateway.api.http_documents import documents_router
from gateway.api.http_evaluations import evaluations_router
from gateway.api.http_jobs import jobs_router
from gateway.api.http_monitor import monitor_router
from gateway.api.http_search import search_router
from gateway.api.http_usage import usage_router
from gateway.api.in_process import InProcess
from gateway.api.open_inference import OpenInference
from gateway.api.open_inference_grpc import ADD_TO_SERVER, SERVICE, InferenceServicer
from gateway.api.open_inference_rest import open_inference_router
from gateway.api.openai_batches import PATH as BATCHES
from gateway.api.openai_batches import batches_router
from gateway.api.openai_files import files_router
from gateway.api.openai_finetuning import finetuning_router
from gateway.api.relay import Relay
from gateway.api.settlement import Recorder
from gateway.backends import events
from gateway.backends.bus_control import BusControl
from gateway.backends.directory_files import DirectoryFiles
from gateway.backends.evaluator_tasks import EvaluatorTasks
from gateway.backends.gateway_metrics import count_fallback, count_refusal
from gateway.backends.monitor_profiles import MonitorProfiles
from gateway.backends.oidc import OidcVerifier
from gateway.backends.retriever_documents import RetrieverDocuments
from gateway.backends.sqlite import Database
from gateway.backends.sqlite_audit import SqliteAudit
from gateway.backends.sqlite_batches import SqliteBatches
from gateway.backends.sqlite_documents import SqliteDocuments
from gateway.backends.sqlite_finetuning import SqliteEvaluations, SqliteFinetunes
from gateway.backends.sqlite_idempotency import SqliteIdempotency
from gateway.backends.sqlite_jobs import SqliteJobs
from gateway.backends.sqlite_keys import SqliteKeys
from gateway.backends.sqlite_ledger import SqliteLedger
from gateway.backends.sqlite_limits import SqliteLimits
from gateway.backends.sqlite_outbox import SqliteOutbox
from gateway.backends.sqlite_prices import SqlitePrices
from gateway.backends.sqlite_schema import MIGRATIONS
from gateway.backends.sqlite_uploads import SqliteUploads
from gateway.backends.sqlite_usage import SqliteUsage
from gateway.backends.trainer_runs import TrainerRuns
from gateway.backends.valkey_cache import ValkeyCache
from gateway.backends.valkey_limits import ValkeyLimiter
from gateway.core.administration import Administration
from gateway.core.batch_run import BatchRunner
from gateway.core.batches import Batches
from gateway.core.catalog import Catalog
from gateway.core.documents import Library
from gateway.core.evaluations import Evaluations
from gateway.core.finetuning import Finetuning
from gateway.core.graph import Sequenced
from gateway.core.idempotency import IdempotencyKeys
from gateway.core.keys import KeyRing
from gateway.core.ledger import FinalUsages, StartRecords, recover
from gateway.core.limiting import Limiting
from gateway.core.limits import LocalLimiter
from gateway.core.money import put_declared
from gateway.core.platform_limits import PlatformLimits
from gateway.core.ports import Keys, Ledger, RequestLimiter
from gateway.core.readiness import Readiness
from gateway.core.repeats import Repeats
from gateway.core.services import Embedder, Generator
from gateway.core.serving import NoStage, Serving, Stage
from gateway.core.sizing import Sizes
from gateway.core.tokens import Credentials, Tokens
from gateway.core.uploads import Uploads

ADMIN_TENANT = "admin"
_PROBE_TIMEOUT_S = 1.0

Servicer = tuple[Callable[[Any, Any], None], object, str]
"""What adds it to a server, itself, and its name."""


@dataclass(frozen=True, slots=True)
class Peers:
    """The services that the state calls; each may be away. The channels belong to the caller."""

    generator: Generator
    usages: FinalUsages  # the generator's book of usage
    embedder: Embedder
    retriever: grpc.aio.Channel
    trainer: grpc.aio.Channel
    evaluator: grpc.aio.Channel
    monitor: grpc.aio.Channel
    admission: Stage = field(default_factory=NoStage)  # leads requests to generator and embedder


@dataclass(frozen=True, slots=True)
class State:
    """What main needs of the gateway's state.

    routers: to include in the HTTP app, after the authentication middleware (request.state.principal is read).
    in_process: asks the HTTP app in the name of batches, once the app is made.
    servicers: what app.add_grpc takes; public_servicers too, and they check keys by themselves.
    tasks: name and coroutine function of what runs until cancelled, for app.spawn(name, fn()).
    close: for app.on_close; waits for what is being written.
    """

    keys: Keys
    limiter: RequestLimiter
    ledger: Ledger
    recorder: Recorder
    catalog: Catalog
    serving: Serving
    idempotency: IdempotencyKeys
    in_process: InProcess
    routers: tuple[APIRouter, ...]
    servicers: tuple[Servicer, ...]
    public_servicers: tuple[Servicer, ...]
    tasks: tuple[tuple[str, Callable[[], Coroutine[Any, Any, None]]], ...]
    close: Callable[[], Awaitable[None]]


async def open_state(
    *,
    data_dir: Path,
    key_pepper: str,
    valkey_url: str,
    bootstrap_api_key: str | None,
    bootstrap_admin_key: str | None,
    max_upload_bytes: int,
    max_tenant_upload_bytes: int,
    max_body_bytes: int,
    max_batch_lines_in_flight: int,
    request_timeout_s: float,
    cache_ttl_s: float = 3600.0,
    bus: Bus,
    graphs: Mapping[str, Sequenced],
    peers: Peers,
    oidc: OidcVerifier | None = None,
    local_limit_share: float = 1.0,
) -> State:
    """Opens the database (migrating it), the file folder and the Valkey client, and upserts the bootstrap keys.

    Valkey, the bus and the peers may all be away: nothing of them is waited for here.
    """
    files_dir = data_dir / "files"
    await asyncio.to_thread(_make_directories, data_dir, files_dir)
    database = await Database.open(data_dir / "gateway.db", MIGRATIONS)
    limiter = ValkeyLimiter.connect(valkey_url, local=LocalLimiter(share=local_limit_share))

    outbox = SqliteOutbox(database)
    ledger = SqliteLedger(database, outbox, events.request_completed)
    recorder = Recorder(ledger, peers.usages)
    jobs = SqliteJobs(database)
    documents = SqliteDocuments(database, outbox)
    kept = SqliteUploads(database, max_tenant_bytes=max_tenant_upload_bytes)
    finetunes = SqliteFinetunes(database, outbox)
    batches = SqliteBatches(database, outbox)
    files = DirectoryFiles(files_dir)
    control = BusControl(bus)
    index = RetrieverDocuments(peers.retriever)
    book, pepper = SqliteKeys(database), key_pepper.encode()
    keys = KeyRing(book, pepper)
    administration = Administration(book, pepper, keys, control)
    library = Library(files, documents, jobs, index, control, events.ingest_job)
    catalog = Catalog(graphs, peers.generator, peers.embedder, finetunes)
    cache = ValkeyCache.connect(valkey_url, ttl_s=cache_ttl_s)
    repeats = Repeats(catalog, cache)
    platform_limits = PlatformLimits(SqliteLimits(database))
    await platform_limits.refresh()
    sizes = Sizes(graphs, peers.generator, peers.embedder)
    limiting = Limiting(limiter, sizes, platform_limits, count_refusal)
    serving = Serving(
        catalog,
        stages=(limiting, StartRecords(ledger, sizes)),
        admission=peers.admission,
        on_fallback=count_fallback,
        repeats=repeats,
    )
    prices = SqlitePrices(database)
    declared = {name: graph.upstream.price for name, graph in graphs.items() if graph.upstream and graph.upstream.price}
    await put_declared(prices, declared, int(time.time() * 1000))
    finetuning = Finetuning(finetunes, kept, TrainerRuns(peers.trainer), events.train_job)
    evaluations = Evaluations(
        SqliteEvaluations(database, outbox), kept, EvaluatorTasks(peers.evaluator), events.evaluate_job
    )

    idempotency = SqliteIdempotency(database)
    await idempotency.open()

    if bootstrap_api_key:
        await administration.configure_key(bootstrap_api_key, DEFAULT_TENANT, is_admin=False, allows_text=True)
    if bootstrap_admin_key:
        await administration.configure_key(bootstrap_admin_key, ADMIN_TENANT, is_admin=True, allows_text=False)
    await files.sweep(await documents.file_ids() | await kept.file_ids())

    inference = OpenInference(serving, catalog, peers.embedder)
    readiness = Readiness(
        (
            partial(peers.generator.list_models, timeout_s=_PROBE_TIMEOUT_S),
            partial(peers.embedder.list_models, timeout_s=_PROBE_TIMEOUT_S),
        )
    )
    in_process = InProcess(accounted_as=BATCHES)
    runner = BatchRunner(
        batches,
        kept,
        files,
        in_process,
        keys,
        max_in_flight=max_batch_lines_in_flight,
        max_line_bytes=max_body_bytes,
    )
    batch_worker = BatchWorker(bus, runner, Cancellations(decode_cancel))
    job_consumer = JobConsumer(bus, jobs, files, control)

    async def close() -> None:
        await recorder.close()
        await repeats.close()
        cache.close()
        await limiter.close()
        await database.close()

    return State(
        keys=Credentials(keys, Tokens(oidc, keys)) if oidc else keys,
        limiter=limiter,
        ledger=ledger,
        recorder=recorder,
        catalog=catalog,
        serving=serving,
        idempotency=IdempotencyKeys(idempotency, key_pepper.encode()),
        in_process=in_process,
        routers=(
            documents_router(library, max_upload_bytes=max_upload_bytes),
            files_router(Uploads(files, kept), files, max_upload_bytes=max_upload_bytes),
            finetuning_router(finetuning, catalog, jobs, control),
            evaluations_router(evaluations, catalog),
            jobs_router(jobs, control),
            search_router(index),
            usage_router(SqliteUsage(database), prices),
            keys_router(administration),
            tenants_router(administration),
            audit_router(SqliteAudit(database)),
            limits_router(platform_limits),
            monitor_router(MonitorProfiles(peers.monitor), finetunes),
            open_inference_router(inference, readiness),
            batches_router(Batches(batches, kept, events.batch_job), control),
        ),
        servicers=(
            (
                gateway_pb2_grpc.add_FileServiceServicer_to_server,
                FileServicer((documents, kept), files),
                "pressroom.gateway.v1.FileService",
            ),
            (
                gateway_pb2_grpc.add_GraphServiceServicer_to_server,
                GraphServicer(serving, keys, jobs, recorder, timeout_s=request_timeout_s),
                "pressroom.gateway.v1.GraphService",
            ),
        ),
        public_servicers=(
            (
                ADD_TO_SERVER,
                InferenceServicer(inference, readiness, keys, limiter, recorder, timeout_s=request_timeout_s),
                SERVICE,
            ),
        ),
        tasks=(
            ("outbox-relay", Relay(outbox, bus).run),
            ("job-progress", job_consumer.consume_progress),
            ("dead-jobs", job_consumer.consume_dead_jobs),
            ("idempotency-keys", idempotency.prune_forever),
            ("batches", batch_worker.consume),
            ("batch-cancellations", batch_worker.listen),
            ("revoked-keys", RevocationListener(bus, keys).listen),
            ("left-requests", partial(recover, ledger, ledger, peers.usages)),
            *((("token-keys", oidc.run),) if oidc else ()),
            ("limiter", limiter.run),
            ("platform-limits", platform_limits.run),
        ),
        close=close,
    )


def _make_directories(*directories: Path) -> None:
    for directory in directories:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
