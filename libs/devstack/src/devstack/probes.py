"""Readiness checks, one for each kind of server, over plain sockets.

The supervisor holds no client libraries: it runs for days and its memory counts as the system's.
"""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Protocol

_HOST = "127.0.0.1"
_MAX_ANSWER_BYTES = 64 * 1024
_HTTP2_HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))  # preface, empty SETTINGS
_HTTP2_SETTINGS = 4


@dataclass(frozen=True, slots=True)
class Reading:
    """What a probe saw. detail says why not ready."""

    ready: bool
    detail: str = ""
    queue_depth: int | None = None


class Probe(Protocol):
    """Looks once at a server. Never raises for a server that is away or answers badly; bounded by its caller."""

    async def check(self) -> Reading: ...


@dataclass(frozen=True, slots=True)
class HttpProbe:
    """Ready when GET path answers 200. Reads a service's /readyz, or a bare status as nats-server's /healthz."""

    port: int
    path: str = "/readyz"

    async def check(self) -> Reading:
        try:
            async with _connection(self.port) as (reader, writer):
                writer.write(f"GET {self.path} HTTP/1.0\r\nHost: {_HOST}\r\n\r\n".encode())
                answer = await reader.read(_MAX_ANSWER_BYTES)
                while not reader.at_eof() and len(answer) < _MAX_ANSWER_BYTES:
                    answer += await reader.read(_MAX_ANSWER_BYTES)
        except OSError as error:
            return Reading(False, error.strerror or "no answer")
        head, _, body = answer.partition(b"\r\n\r\n")
        status = head.split(b" ", 2)[1:2]
        return _read_readyz(status == [b"200"], body)


def _read_readyz(is_ready: bool, body: bytes) -> Reading:
    try:
        report = json.loads(body)
    except ValueError:
        report = None
    if not isinstance(report, dict):
        return Reading(is_ready, "" if is_ready else "not ready")
    checks = report.get("checks")
    waiting = [name for name, holds in checks.items() if not holds] if isinstance(checks, dict) else []
    depth = report.get("queue_depth")
    detail = "" if is_ready else f"waiting for {', '.join(waiting)}" if waiting else "setting up"
    return Reading(is_ready, detail, depth if isinstance(depth, int) else None)


@dataclass(frozen=True, slots=True)
class ValkeyProbe:
    """Ready when PING answers PONG under our password; that also shows that it is our server."""

    port: int
    password: str

    async def check(self) -> Reading:
        try:
            async with _connection(self.port) as (reader, writer):
                writer.write(f"AUTH {self.password}\r\nPING\r\n".encode())
                auth, pong = await reader.readline(), await reader.readline()
        except OSError as error:
            return Reading(False, error.strerror or "no answer")
        if auth == b"+OK\r\n" and pong == b"+PONG\r\n":
            return Reading(True)
        return Reading(False, (auth + pong).decode(errors="replace").strip()[:100] or "no answer")


@dataclass(frozen=True, slots=True)
class GrpcProbe:
    """Ready when the server opens an HTTP/2 connection, which a gRPC server does once it serves."""

    port: int

    async def check(self) -> Reading:
        try:
            async with _connection(self.port) as (reader, writer):
                writer.write(_HTTP2_HELLO)
                frame = await reader.readexactly(9)
        except OSError as error:
            return Reading(False, error.strerror or "no answer")
        except asyncio.IncompleteReadError:
            return Reading(False, "the connection was closed")
        return Reading(True) if frame[3] == _HTTP2_SETTINGS else Reading(False, "it does not speak HTTP/2")


@contextlib.asynccontextmanager
async def _connection(port: int) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_connection(_HOST, port, limit=_MAX_ANSWER_BYTES)
    try:
        yield reader, writer
    finally:
        writer.close()
