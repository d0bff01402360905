"""Keeps the processes of a system alive: starts them in order, restarts what dies, stops in reverse order.

Knows specs, not services. The daemon around it is daemon.py; what people see of it is cli.
"""

import asyncio
import contextlib
import logging
import signal
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum

from devstack.backoff import Backoff
from devstack.logfiles import LogFile, supervisor_line
from devstack.ports import listens
from devstack.probes import Reading
from devstack.processes import Process
from devstack.specs import Spec

log = logging.getLogger(__name__)

_PROBE_TIMEOUT_S = 2.0
_PROBE_WHILE_STARTING_S = 0.2
_PROBE_STEADY_S = 1.0
_MAX_EVENTS = 1000


class State(StrEnum):
    """stopped: nobody wants it. unready: it ran and was ready, and is not now. restarting: waits for its next start."""

    STOPPED = "stopped"
    STARTING = "starting"
    READY = "ready"
    UNREADY = "unready"
    RESTARTING = "restarting"


class StartFailed(Exception):
    """A service that did not become ready: which, why, and what it said last."""

    def __init__(self, name: str, cause: str, last_lines: list[str]) -> None:
        super().__init__(f"{name}: {cause}")
        self.name = name
        self.cause = cause
        self.last_lines = last_lines


@dataclass(frozen=True, slots=True)
class Change:
    """A service came into a state."""

    name: str
    state: State
    detail: str = ""


class Service:
    """One spec with its process. `start` and `stop` are for the supervisor; reading the fields is for all."""

    def __init__(self, spec: Spec, inherited: Mapping[str, str], backoff: Backoff, changed: Callable[[Change], None]):
        self.spec = spec
        self.state = State.STOPPED
        self.process: Process | None = None
        self.reading = Reading(False)
        self.last_exit: int | None = None
        self.num_restarts = 0
        self.log = LogFile(spec.log_path)
        self._env = dict(inherited) | dict(spec.env)
        self._backoff = backoff
        self._changed = changed
        self._keeper: asyncio.Task[None] | None = None
        self._ready = asyncio.Event()
        self._died = asyncio.Event()

    def start(self) -> None:
        """Wants it to run, from now on; harmless when it does."""
        if self._keeper is None or self._keeper.done():
            self._ready.clear()
            self._died.clear()
            self._keeper = asyncio.get_running_loop().create_task(self._keep(), name=self.spec.name)

    async def stop(self) -> None:
        """Wants it gone; returns when it is."""
        if self._keeper is not None:
            self._keeper.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._keeper
            self._keeper = None
        if self.process is not None:
            await self.process.stop(self.spec.stop_grace_s)
            self.process = None
        self._enter(State.STOPPED)

    async def wait_ready(self) -> None:
        """Returns once it is ready; raises StartFailed when it ends first or takes too long."""
        outcomes = [asyncio.ensure_future(event.wait()) for event in (self._ready, self._died)]
        try:
            await asyncio.wait(outcomes, timeout=self.spec.start_timeout_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for outcome in outcomes:
                outcome.cancel()
        if self._ready.is_set():
            return
        if self._died.is_set():
            raise StartFailed(self.spec.name, f"it ended with {describe_exit(self.last_exit)}", self.log.tail())
        why = f" ({self.reading.detail})" if self.reading.detail else ""
        raise StartFailed(self.spec.name, f"not ready after {self.spec.start_timeout_s:.0f} s{why}", self.log.tail())

    async def _keep(self) -> None:
        while True:
            self._backoff.started()
            self.last_exit = await self._live()
            wait_s = self._backoff.after_death()
            self.num_restarts += 1
            self.process, self.reading = None, Reading(False)
            cause = describe_exit(self.last_exit)
            self.log.write(supervisor_line(self.spec.name, "ERROR", "process ended", exit=cause, restart_in_s=wait_s))
            log.error("process ended", extra={"target": self.spec.name, "exit": cause, "restart_in_s": wait_s})
            self._died.set()
            self._enter(State.RESTARTING, f"ended with {cause}")
            await asyncio.sleep(wait_s)

    async def _live(self) -> int | None:
        """Runs the process once; returns its exit code, None where it could not even be started."""
        try:
            self.process = await Process.start(self.spec.argv, self._env, self.log)
        except OSError as error:  # no memory or no process ids left: as passing as any other death
            self.log.write(supervisor_line(self.spec.name, "ERROR", "cannot start a process", error=str(error)))
            return None
        self._enter(State.STARTING)
        watcher = asyncio.create_task(self._watch(self.process))
        try:
            return await self.process.wait()
        finally:
            watcher.cancel()

    async def _watch(self, process: Process) -> None:
        """Probes until cancelled. The first success also has to show that our own process holds the port."""
        is_ours = False
        while True:
            self.reading = await self._look()
            if self.reading.ready and not is_ours:
                port = self.spec.http_port or self.spec.port
                is_ours = port is None or listens(process.pid, port)
                if not is_ours:
                    self.reading = Reading(False, f"another process answers on port {port}")
            if self.reading.ready:
                self._ready.set()
                self._enter(State.READY)
            elif self.state in (State.READY, State.UNREADY):
                self._enter(State.UNREADY, self.reading.detail)
            await asyncio.sleep(_PROBE_STEADY_S if is_ours else _PROBE_WHILE_STARTING_S)

    async def _look(self) -> Reading:
        try:
            # Not wait_for: on Python 3.11 it can swallow a cancel that comes together with the answer.
            async with asyncio.timeout(_PROBE_TIMEOUT_S):
                return await self.spec.probe.check()
        except TimeoutError:
            return Reading(False, f"no answer within {_PROBE_TIMEOUT_S:.0f} s")
        except Exception as error:  # whatever a server answers, the watch goes on
            return Reading(False, f"the answer makes no sense: {error!r}")

    def _enter(self, state: State, detail: str = "") -> None:
        if state != self.state:
            self.state = state
            self._changed(Change(self.spec.name, state, detail))


class Supervisor:
    """All services of one system. on_change is called at each change, on the event loop, and must not block."""

    def __init__(
        self,
        specs: Iterable[Spec],
        inherited: Mapping[str, str],
        on_change: Callable[[Change], None] = lambda change: None,
        make_backoff: Callable[[], Backoff] = Backoff,
    ) -> None:
        self._on_change = on_change
        self._listeners: set[asyncio.Queue[Change]] = set()
        self.services = {spec.name: Service(spec, inherited, make_backoff(), self._changed) for spec in specs}

    async def start_all(self) -> None:
        """Starts everything, each as soon as what it depends on is ready; raises StartFailed for the first that fails.

        What has started then still runs: the caller stops it, or keeps it.
        """
        try:
            async with asyncio.TaskGroup() as group:
                for service in self.services.values():
                    group.create_task(self._start_after_dependencies(service))
        except ExceptionGroup as group:  # not except*: what is raised there comes wrapped, on some versions of 3.11
            failed, others = group.split(StartFailed)
            if failed is None or others is not None:
                raise
            raise failed.exceptions[0] from None

    async def start(self, name: str) -> None:
        """Starts one service; raises StartFailed, and goes on trying."""
        self.services[name].start()
        await self.services[name].wait_ready()

    async def stop(self, name: str) -> None:
        """Stops one service until it is started again."""
        await self.services[name].stop()

    async def stop_all(self) -> None:
        """Stops everything, the edge first. One that cannot be stopped does not keep the others."""
        tiers = sorted({service.spec.tier for service in self.services.values()}, reverse=True)
        for tier in tiers:
            stops = [service.stop() for service in self.services.values() if service.spec.tier == tier]
            for outcome in await asyncio.gather(*stops, return_exceptions=True):
                if isinstance(outcome, Exception):
                    log.error("stop failed", extra={"error": repr(outcome)})

    @contextlib.asynccontextmanager
    async def changes(self) -> AsyncIterator["asyncio.Queue[Change]"]:
        """Gives a queue of what changes while it is open; a reader that lags loses the oldest."""
        queue: asyncio.Queue[Change] = asyncio.Queue(_MAX_EVENTS)
        self._listeners.add(queue)
        try:
            yield queue
        finally:
            self._listeners.discard(queue)

    async def _start_after_dependencies(self, service: Service) -> None:
        for name in service.spec.depends_on:
            await self.services[name].wait_ready()
        service.start()
        await service.wait_ready()

    def _changed(self, change: Change) -> None:
        for queue in self._listeners:
            if queue.full():
                queue.get_nowait()
            queue.put_nowait(change)
        self._on_change(change)


def describe_exit(code: int | None) -> str:
    """Says what an exit code means."""
    if code is None:
        return "no process"
    if code < 0:
        try:
            return f"signal {signal.Signals(-code).name}"
        except ValueError:
            return f"signal {-code}"
    return "exit code 78 (bad configuration)" if code == 78 else f"exit code {code}"
