"""One process of the platform: its lifecycle, its health and its two servers (gRPC, HTTP).

A service's main.py makes an App and gives `run` a set-up function that composes the service.
"""

import asyncio
import gc
import logging
import signal
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import grpc.aio
import uvloop
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from chassis import logs, metrics, rpc, telemetry
from chassis.http_server import HttpServer, make_http_server
from chassis.settings import ServiceSettings

log = logging.getLogger(__name__)

Closer = Callable[[], Awaitable[None]]
_POLL_S = 0.5
_GC_THRESHOLD = 10_000  # new objects between collections of the youngest; Python's 700 are a few requests
# A name of gRPC health that says no more than that the process has started and its event loop turns. The other names
# follow readiness: whoever restarted a process by them would kill it because a neighbour is away.
LIVENESS = "liveness"


class App:
    """The frame of one service process."""

    def __init__(self, name: str, settings: ServiceSettings, version: str = "0.1.0") -> None:
        self.name = name
        self._settings = settings
        self._version = version
        self._checks: dict[str, Callable[[], bool]] = {}
        self._queue_depth: Callable[[], int] = lambda: 0
        self._drainers: list[Closer] = []
        self._closers: list[Closer] = []
        self._tasks: set[asyncio.Task[Any]] = set()
        self._servicers: list[str] = []
        self._more_grpc: list[grpc.aio.Server] = []
        self._http_app: ASGIApp | None = None
        self._phase = "starting"
        self._failed = False

    # What set-up uses.

    def add_grpc(
        self, add_servicer_to_server: Callable[[Any, Any], None], servicer: object, service_full_name: str
    ) -> None:
        """Offers a gRPC service; `service_full_name` is the proto's, for health and reflection."""
        add_servicer_to_server(servicer, self._grpc)
        self._servicers.append(service_full_name)

    def add_grpc_port(self, port: int) -> grpc.aio.Server:
        """Opens a second port for those who may not reach the services of add_grpc; the caller adds services to it."""
        server = rpc.make_server(self.name, self._settings.max_connection_age_s)
        server.add_insecure_port(f"{self._settings.host}:{port}")
        self._more_grpc.append(server)
        return server

    def mount_http(self, asgi_app: ASGIApp) -> None:
        """Serves an ASGI app beside /healthz, /readyz and /metrics."""
        self._http_app = asgi_app

    def on_drain(self, drainer: Closer) -> None:
        """Runs first when the process is told to stop, before the servers refuse new work."""
        self._drainers.append(drainer)

    def on_close(self, closer: Closer) -> None:
        """Runs when everything was served, last registered first."""
        self._closers.append(closer)

    def spawn(self, name: str, coroutine: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Runs a task for the life of the process. If it fails, the process ends with 1 and is restarted."""
        task = asyncio.get_running_loop().create_task(coroutine, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._task_ended)
        return task

    def ready_when(self, name: str, check: Callable[[], bool]) -> None:
        """Adds a condition without which /readyz and gRPC health say no. It must not block."""
        self._checks[name] = check

    def set_queue_depth(self, depth: Callable[[], int]) -> None:
        """Tells how to count the work that waits."""
        self._queue_depth = depth

    def fail(self, reason: str) -> None:
        """Ends the process with 1: for a failure that only a restart mends. Call it from the loop's thread."""
        log.critical("process gives up", extra={"reason": reason})
        self._failed = True
        self._stop.set()

    def _task_ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if task.cancelled():
            return
        if (error := task.exception()) is not None:
            log.critical("background task failed", exc_info=error, extra={"task": task.get_name()})
            self.fail(f"background task {task.get_name()}")

    # The life of the process.

    def run(self, setup: Callable[["App"], Awaitable[None]]) -> int:
        """Runs the service until SIGTERM or SIGINT; returns the exit status."""
        logs.configure(self.name, self._settings.log_level, self._settings.log_format)
        provider = telemetry.configure(self.name, self._settings.trace_dir, self._settings.otlp_endpoint, self._version)
        try:
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                return runner.run(self._main(setup))
        finally:
            provider.shutdown()

    async def _main(self, setup: Callable[["App"], Awaitable[None]]) -> int:
        self._stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop.set)
        self._grpc = rpc.make_server(self.name, self._settings.max_connection_age_s)
        self._health = health.aio.HealthServicer()
        http = make_http_server(
            self._http,
            host=self._settings.host,
            port=self._settings.http_port,
            grace_s=self._settings.shutdown_grace_s,
        )
        http_task = self.spawn("http", self._serve_http(http))
        setting_up = loop.create_task(self._set_up(setup))
        stopping = loop.create_task(self._stop.wait())
        await asyncio.wait({setting_up, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if not setting_up.done():
            setting_up.cancel()
        elif (error := setting_up.exception()) is not None:
            log.critical("service could not start", exc_info=error, extra={"error": str(error)})
            self._failed = True
            self._stop.set()
        else:
            await stopping
        await self._shut_down(http, http_task)
        stopping.cancel()
        return 1 if self._failed else 0

    async def _set_up(self, setup: Callable[["App"], Awaitable[None]]) -> None:
        await setup(self)
        # What is there by now stays: collections, which come with every few requests, need not look at it again.
        gc.collect()
        gc.freeze()
        gc.set_threshold(_GC_THRESHOLD, *gc.get_threshold()[1:])
        await self._health.set(LIVENESS, health_pb2.HealthCheckResponse.SERVING)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._grpc)
        names = (*self._servicers, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self._grpc)
        self._grpc.add_insecure_port(f"{self._settings.host}:{self._settings.grpc_port}")
        for server in (self._grpc, *self._more_grpc):
            await server.start()
        self._phase = "running"
        self.spawn("health", self._watch_health())
        log.info(
            "service started", extra={"grpc_port": self._settings.grpc_port, "http_port": self._settings.http_port}
        )

    async def _shut_down(self, http: HttpServer, http_task: asyncio.Task[Any]) -> None:
        log.info("service stops")
        self._phase = "stopping"
        grace_s = self._settings.shutdown_grace_s
        await self._health.enter_graceful_shutdown()
        await self._run_all("drain", self._drainers)
        http.should_exit = True
        async with asyncio.TaskGroup() as group:
            for server in (self._grpc, *self._more_grpc):
                group.create_task(server.stop(grace_s))
            group.create_task(_settled(http_task, grace_s + 2))
        for task in tuple(self._tasks):
            task.cancel()
        if self._tasks:
            # Bounded: a task may miss its cancellation (asyncio.wait_for of Python 3.11 can drop one).
            _, deaf = await asyncio.wait(tuple(self._tasks), timeout=grace_s)
            if deaf:
                log.warning("tasks do not end", extra={"tasks": sorted(task.get_name() for task in deaf)})
        await self._run_all("close", reversed(self._closers))
        log.info("service stopped")

    async def _run_all(self, what: str, functions: Any) -> None:
        for function in tuple(functions):
            try:
                async with asyncio.timeout(self._settings.shutdown_grace_s):
                    await function()
            except Exception:
                log.exception("step of the shutdown failed", extra={"step": what})

    async def _watch_health(self) -> None:
        """Keeps gRPC health and the queue's gauge up to date."""
        while True:
            serving = self._readiness()["ready"]
            status = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
            for name in ("", *self._servicers):
                await self._health.set(name, status)
            metrics.QUEUE_DEPTH.labels(self.name).set(self._queue_depth())
            await asyncio.sleep(_POLL_S)

    # HTTP.

    async def _serve_http(self, server: HttpServer) -> None:
        try:
            await server.serve()
        except SystemExit as error:  # uvicorn's way to say that the port is taken
            raise RuntimeError(f"cannot listen on {self._settings.host}:{self._settings.http_port}") from error

    def _readiness(self) -> dict[str, Any]:
        checks = {name: bool(check()) for name, check in self._checks.items()}
        ready = self._phase == "running" and all(checks.values())
        return {
            "ready": ready,
            "service": self.name,
            "phase": self._phase,
            "checks": checks,
            "queue_depth": self._queue_depth(),
        }

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        response: ASGIApp | None
        match scope["path"]:
            case "/healthz":
                response = JSONResponse({"status": "ok", "service": self.name})
            case "/readyz":
                state = self._readiness()
                response = JSONResponse(state, 200 if state["ready"] else 503)
            case "/metrics":
                metrics.QUEUE_DEPTH.labels(self.name).set(self._queue_depth())
                response = Response(generate_latest(), media_type=CONTENT_TYPE_LATEST)
            case _:
                response = self._http_app or self._absent()
        await response(scope, receive, send)

    def _absent(self) -> Response:
        if self._phase == "starting":
            return JSONResponse(
                {"error": {"message": f"{self.name} is starting", "type": "server_error", "param": None, "code": None}},
                503,
                {"retry-after": "1"},
            )
        return JSONResponse(
            {"error": {"message": "not found", "type": "invalid_request_error", "param": None, "code": None}}, 404
        )


async def _settled(task: asyncio.Task[Any], timeout_s: float) -> None:
    """Waits for a task to end, however it ends."""
    await asyncio.wait({task}, timeout=timeout_s)
