"""Joins the gateway's state (keys, limits, ledger, jobs, documents, files) with its routes and background tasks.

main.py calls open_state once and adds what comes back to the app; it knows nothing of the classes behind it.
"""

from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc.aio
from fastapi import APIRouter

from chassis.bus import Bus
from gateway.core.ports import Keys, Ledger, RequestLimiter, UsageReport


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
    raise NotImplementedError
