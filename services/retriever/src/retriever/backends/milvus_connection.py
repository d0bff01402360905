"""A connection to Milvus that comes back by itself; pymilvus blocks, so its calls run in small thread pools.

One thread writes: Milvus Lite's engine takes one writer at a time. A watcher asks the server every second; while it
is away every call fails at once with UNAVAILABLE in place of waiting for pymilvus to give up.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import TypeVar

import grpc
from pymilvus import MilvusClient, MilvusException

from chassis import context
from chassis.errors import Code, PlatformError

log = logging.getLogger(__name__)

T = TypeVar("T")

_PROBE_EVERY_S = 1.0
_PROBE_TIMEOUT_S = 3.0
_OPEN_TIMEOUT_S = 60.0  # the first load after a kill -9 replays the log
_READ_THREADS = 4
_MOST_WAITING = 128


class MilvusConnection:
    """One server. `prepare` makes and loads what is needed, in a thread, whenever a connection was opened."""

    def __init__(self, uri: str, prepare: Callable[[MilvusClient], None], *, timeout_s: float) -> None:
        # It logs every failed call with a traceback and the filter in it; what failed is told by our errors.
        logging.getLogger("pymilvus").setLevel(logging.CRITICAL + 1)
        self._uri = uri
        self._prepare = prepare
        self._timeout_s = timeout_s
        self._client: MilvusClient | None = None
        self._readers = ThreadPoolExecutor(_READ_THREADS, thread_name_prefix="milvus-read")
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="milvus-write")
        self._watcher = ThreadPoolExecutor(1, thread_name_prefix="milvus-watch")
        self._num_waiting = 0
        self._gate = _Gate()
        self.is_lite = False
        self.num_opened = 0
        self._doubt = asyncio.Event()  # a call has failed: look at once

    @property
    def connected(self) -> bool:
        """The server answered when it was last asked."""
        return self._client is not None

    async def watch(self) -> None:
        """Opens the connection, and again whenever it is lost, until cancelled."""
        while True:
            if self._client is None:
                await self._open()
            else:
                await self._probe(self._client)
            try:
                async with asyncio.timeout(_PROBE_EVERY_S):
                    await self._doubt.wait()
            except TimeoutError:
                continue
            self._doubt.clear()
            if self._client is not None:
                await self._probe(self._client)

    async def read(self, call: Callable[[MilvusClient, float], T]) -> T:
        """Runs a read with the client and its timeout in seconds; raises PlatformError."""

        async def reading(client: MilvusClient, timeout_s: float) -> T:
            async with self._gate.shared():
                return await _in(self._readers, call, client, timeout_s)

        return await self._run(reading, self._timeout_s)

    async def write(self, call: Callable[[MilvusClient, float], T]) -> T:
        """Runs a write, after all writes before it; raises PlatformError."""
        return await self._run(lambda client, s: _in(self._writer, call, client, s), self._timeout_s)

    async def write_alone(self, call: Callable[[MilvusClient, float], T], *, timeout_s: float) -> T:
        """Runs a write while no read runs; raises PlatformError."""

        async def alone(client: MilvusClient, timeout_s: float) -> T:
            async with self._gate.exclusive():
                return await _in(self._writer, call, client, timeout_s)

        return await self._run(alone, timeout_s)

    async def _run(self, call: Callable[[MilvusClient, float], Awaitable[T]], most_s: float) -> T:
        client = self._client
        if client is None:
            raise _away()
        if self._num_waiting >= _MOST_WAITING:
            raise PlatformError(Code.OVERLOADED, "too many searches wait for Milvus", retry_after_s=1.0)
        timeout_s = context.current().remaining_s(most_s)
        if timeout_s <= 0:
            raise PlatformError(Code.DEADLINE_EXCEEDED, "no time was left to ask Milvus")
        self._num_waiting += 1
        try:
            async with asyncio.timeout(timeout_s):
                return await call(client, timeout_s)
        except TimeoutError:
            self._doubt.set()
            raise PlatformError(Code.DEADLINE_EXCEEDED, f"Milvus did not answer within {timeout_s:.1f} s") from None
        except (MilvusException, grpc.RpcError, grpc.FutureTimeoutError) as error:
            raise self._translated(error) from error
        finally:
            self._num_waiting -= 1

    def _translated(self, error: Exception) -> PlatformError:
        text = " ".join(str(error).split())[:300]
        self._doubt.set()
        # "not loaded": it was restarted between two probes, and is loaded by the next opening.
        if isinstance(error, grpc.RpcError | grpc.FutureTimeoutError) or _is_transport(error) or "not loaded" in text:
            self._drop()
            return _away()
        log.error("milvus refused a call", extra={"error": text})
        return PlatformError(Code.INTERNAL, "Milvus refused a call; the log has the cause", retryable=True)

    async def _open(self) -> None:
        try:
            self._client = await self._watching(_OPEN_TIMEOUT_S, self._connected_client)
        except (MilvusException, grpc.RpcError, grpc.FutureTimeoutError, TimeoutError, OSError) as error:
            log.debug("milvus is away", extra={"error": " ".join(str(error).split())[:300]})
        else:
            self.num_opened += 1
            log.info("milvus connected", extra={"uri": self._uri, "is_lite": self.is_lite})

    def _connected_client(self) -> MilvusClient:
        client = MilvusClient(uri=self._uri, timeout=_PROBE_TIMEOUT_S, dedicated=True)
        try:
            self.is_lite = "lite" in client.get_server_version(timeout=_PROBE_TIMEOUT_S)
            self._prepare(client)
        except BaseException:
            client.close()
            raise
        return client

    async def _probe(self, client: MilvusClient) -> None:
        try:
            await self._watching(_PROBE_TIMEOUT_S + 1, lambda: client.get_server_version(timeout=_PROBE_TIMEOUT_S))
        except (MilvusException, grpc.RpcError, grpc.FutureTimeoutError, TimeoutError) as error:
            log.warning("milvus is lost", extra={"error": " ".join(str(error).split())[:300]})
            self._drop()

    async def _watching(self, timeout_s: float, call: Callable[[], T]) -> T:
        async with asyncio.timeout(timeout_s):
            return await asyncio.get_running_loop().run_in_executor(self._watcher, call)

    def _drop(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            self._watcher.submit(client.close)

    async def close(self) -> None:
        """Closes the connection; running calls end by their timeouts."""
        self._drop()
        for pool in (self._readers, self._writer, self._watcher):
            pool.shutdown(wait=False)


def _is_transport(error: Exception) -> bool:
    """Tells whether the server was not reached, as opposed to having refused."""
    code = getattr(error, "code", None)
    if isinstance(code, grpc.StatusCode):
        return True
    text = str(error)
    return any(
        sign in text for sign in ("Retry timeout", "Retry run out", "Fail connecting", "closed channel", "UNAVAILABLE")
    )


async def _in(
    pool: ThreadPoolExecutor, call: Callable[[MilvusClient, float], T], client: MilvusClient, timeout_s: float
) -> T:
    return await asyncio.get_running_loop().run_in_executor(pool, call, client, timeout_s)


class _Gate:
    """Many share it, or one has it alone; who wants it alone goes before those that come later."""

    def __init__(self) -> None:
        self._condition = asyncio.Condition()
        self._num_sharing = 0
        self._num_exclusive = 0  # holding or waiting

    @asynccontextmanager
    async def shared(self) -> AsyncIterator[None]:
        async with self._condition:
            await self._condition.wait_for(lambda: self._num_exclusive == 0)
            self._num_sharing += 1
        try:
            yield
        finally:
            self._num_sharing -= 1
            await self._tell()

    @asynccontextmanager
    async def exclusive(self) -> AsyncIterator[None]:
        self._num_exclusive += 1
        try:
            async with self._condition:
                await self._condition.wait_for(lambda: self._num_sharing == 0)
            yield
        finally:
            self._num_exclusive -= 1
            await self._tell()

    async def _tell(self) -> None:
        async with self._condition:
            self._condition.notify_all()


def _away() -> PlatformError:
    return PlatformError(Code.UNAVAILABLE, "Milvus is not available", reason="index_unavailable", retry_after_s=1.0)
