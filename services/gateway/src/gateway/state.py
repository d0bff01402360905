"""Joins the gateway's state (keys, limits, ledger, jobs, documents, files) with its routes and background tasks.

main.py calls open_state once and adds what comes back to the app; it knows nothing of the classes behind it.
"""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc.aio
from fastapi import APIRouter
from pressroom.gateway.v1 import gateway_pb2_grpc

from chassis.bus import Bus
from contracts.names import DEFAULT_TENANT
from gateway.api.consumers import JobConsumer, RevocationListener
from gateway.api.grpc_files import FileServicer
from gateway.api.http_admin import admin_router
from gateway.api.http_documents import documents_router
from gateway.api.http_jobs import jobs_router
from gateway.api.http_later import later_router
from gateway.api.http_monitor import monitor_router
from gateway.api.http_search import search_router
from gateway.api.relay import Relay
from gateway.backends import events
from gateway.backends.bus_control import BusControl
from gateway.backends.directory_files import DirectoryFiles
from gateway.backends.monitor_profiles import MonitorProfiles
from gateway.backends.retriever_documents import RetrieverDocuments
from gateway.backends.sqlite import Database
from gateway.backends.sqlite_documents import SqliteDocuments
from gateway.backends.sqlite_jobs import SqliteJobs
from gateway.backends.sqlite_keys import SqliteKeys
from gateway.backends.sqlite_ledger import SqliteLedger
from gateway.backends.sqlite_outbox import SqliteOutbox
from gateway.backends.sqlite_schema import MIGRATIONS
from gateway.backends.valkey_limits import ValkeyLimiter
from gateway.core.documents import Library
from gateway.core.keys import KeyRing
from gateway.core.ports import Keys, Ledger, RequestLimiter, UsageReport

ADMIN_TENANT = "admin"


@dataclass(frozen=True, slots=True)
class State:
    """What main needs of the gateway's state.

    routers: to include in the HTTP app, after the authentication middleware (request.state.principal is read).
    add_files_servicer, files_servicer, files_service_name: for app.add_grpc.
    tasks: name and coroutine function of what runs until cancelled, for app.spawn(name, fn()).
    close: for app.on_close; waits for what is being written.
    """

    keys: Keys
    limiter: RequestLimiter
    ledger: Ledger
    usage: UsageReport
    routers: tuple[APIRouter, ...]
    add_files_servicer: Callable[[Any, Any], None]
    files_servicer: object
    files_service_name: str
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
    bus: Bus,
    retriever: grpc.aio.Channel,
    monitor: grpc.aio.Channel,
) -> State:
    """Opens the database (migrating it), the file folder and the Valkey client, and upserts the bootstrap keys.

    Valkey, the bus, the retriever and the monitor may all be away: nothing of them is waited for here.
    """
    files_dir = data_dir / "files"
    await asyncio.to_thread(_make_directories, data_dir, files_dir)
    database = await Database.open(data_dir / "gateway.db", MIGRATIONS)
    limiter = ValkeyLimiter.connect(valkey_url)

    outbox = SqliteOutbox(database)
    ledger = SqliteLedger(database, outbox, events.request_completed)
    jobs = SqliteJobs(database)
    documents = SqliteDocuments(database, outbox)
    files = DirectoryFiles(files_dir)
    control = BusControl(bus)
    index = RetrieverDocuments(retriever)
    keys = KeyRing(SqliteKeys(database), key_pepper.encode(), control)
    library = Library(files, documents, jobs, index, control, events.ingest_job)

    if bootstrap_api_key:
        await keys.bootstrap(bootstrap_api_key, DEFAULT_TENANT, is_admin=False, allows_text=True)
    if bootstrap_admin_key:
        await keys.bootstrap(bootstrap_admin_key, ADMIN_TENANT, is_admin=True, allows_text=False)
    await files.sweep(await documents.file_ids())

    job_consumer = JobConsumer(bus, jobs, files, control)

    async def close() -> None:
        await limiter.close()
        await database.close()

    return State(
        keys=keys,
        limiter=limiter,
        ledger=ledger,
        usage=ledger,
        routers=(
            documents_router(library, max_upload_bytes=max_upload_bytes),
            jobs_router(jobs, control),
            search_router(index),
            admin_router(keys, ledger),
            monitor_router(MonitorProfiles(monitor)),
            later_router(),
        ),
        add_files_servicer=gateway_pb2_grpc.add_FileServiceServicer_to_server,
        files_servicer=FileServicer(documents, files),
        files_service_name="pressroom.gateway.v1.FileService",
        tasks=(
            ("outbox-relay", Relay(outbox, bus).run),
            ("job-progress", job_consumer.consume_progress),
            ("dead-jobs", job_consumer.consume_dead_jobs),
            ("revoked-keys", RevocationListener(bus, keys).listen),
        ),
        close=close,
    )


def _make_directories(*directories: Path) -> None:
    for directory in directories:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
