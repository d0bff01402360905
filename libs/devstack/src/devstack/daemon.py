"""The supervisor's process: `python -m devstack.daemon --home DIR`, in a session of its own.

It answers on the control socket. One connection may bring the system up; until that connection says "settle", its end
(Ctrl-C, a closed terminal, a kill -9) takes everything down again, so that a failed start leaves nothing running.
"""

import argparse
import asyncio
import contextlib
import fcntl
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TextIO

from devstack import control, environment, settings, topology
from devstack.home import Home, ensure_secrets, read_json, read_pairs, write_private
from devstack.logfiles import LogFile, supervisor_line
from devstack.processes import start_ticks
from devstack.specs import Spec
from devstack.supervisor import Change, StartFailed, State, Supervisor

log = logging.getLogger(__name__)

_IDLE_EXIT_S = 30.0  # nobody asked for a start: the command that started us is gone
_MAX_CONNECTIONS = 64


class Daemon:
    """Supervises some specs and serves the control socket."""

    def __init__(self, home: Home, specs: Iterable[Spec], inherited: Mapping[str, str], ports: Mapping[str, int]):
        self._home = home
        self._supervisor = Supervisor(specs, inherited, self._on_change)
        self._ports = dict(ports)
        self._started_unix_s = time.time()
        self._lock_sha256 = environment.lock_sha256()
        self._over = asyncio.Event()
        self._is_up = False
        self._has_started = False
        self._num_connections = 0

    async def serve(self) -> None:
        """Runs until told to stop; then everything it started is gone."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._over.set)
        with control.socket_path(self._home.run) as path:
            server = await asyncio.start_unix_server(self._handle, path, limit=control.MAX_LINE_BYTES)
            os.chmod(path, 0o600)
            self._write_state()
            idle = loop.call_later(_IDLE_EXIT_S, lambda: None if self._has_started else self._over.set())
            try:
                await self._over.wait()
            finally:
                idle.cancel()
                await self._supervisor.stop_all()
                server.close()
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(path)
                self._home.state_file.unlink(missing_ok=True)
                # What waits for our end reads this connection's: let its last message out.
                await asyncio.sleep(0.05)

    def _on_change(self, change: Change) -> None:
        """Keeps the state file true: it is what a later command finds if this process is killed."""
        if change.state in (State.STARTING, State.RESTARTING, State.STOPPED):
            self._write_state()

    async def _handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._num_connections += 1
        try:
            if self._num_connections <= _MAX_CONNECTIONS and (request := await _read(reader)):
                await self._answer(request, reader, writer)
        except ConnectionError:
            pass
        finally:
            self._num_connections -= 1
            writer.close()

    async def _answer(
        self, request: dict[str, Any], reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        op, name = request.get("op"), request.get("service")
        if name is not None and name not in self._supervisor.services:
            await _send(writer, done=True, ok=False, cause=f"no service {name!r}")
        elif op == "status":
            await _send(writer, done=True, ok=True, **self._status())
        elif op == "start" and name is None:
            await self._bring_up(reader, writer)
        elif op == "start" and name is not None:
            await self._with_changes(writer, self._supervisor.start(name))
        elif op == "stop" and name is not None:
            await self._with_changes(writer, self._supervisor.stop(name))
        elif op == "stop":
            await self._with_changes(writer, self._supervisor.stop_all())
            self._over.set()
        else:
            await _send(writer, done=True, ok=False, cause=f"no operation {op!r}")

    async def _bring_up(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Starts all. Before the caller settles, the end of its connection ends everything."""
        self._has_started = True
        work = asyncio.create_task(self._with_changes(writer, self._supervisor.start_all()))
        caller = asyncio.create_task(_read(reader))
        await asyncio.wait({work, caller}, return_when=asyncio.FIRST_COMPLETED)
        is_settled = False
        try:
            if work.done() and await work:
                is_settled = (await caller or {}).get("op") == "settle"
        finally:
            for task in (work, caller):
                task.cancel()
            await asyncio.gather(work, caller, return_exceptions=True)
            if is_settled:
                self._is_up = True
            elif not self._is_up:
                log.warning("start was not settled")
                self._over.set()
        if is_settled:
            await _send(writer, done=True, ok=True)

    async def _with_changes(self, writer: asyncio.StreamWriter, work: Any) -> bool:
        """Runs a coroutine while telling of every change; then says how it ended."""
        async with self._supervisor.changes() as changes:
            task = asyncio.ensure_future(work)
            teller = asyncio.create_task(_tell(changes, writer))
            try:
                await task
                outcome: dict[str, Any] = {"ok": True}
            except StartFailed as failure:
                outcome = {"ok": False, "service": failure.name, "cause": failure.cause, "lines": failure.last_lines}
            finally:
                teller.cancel()
                task.cancel()
            while not changes.empty():
                await _send(writer, **_change_message(changes.get_nowait()))
            await _send(writer, done=True, **outcome)
            return bool(outcome["ok"])

    def _status(self) -> dict[str, Any]:
        services = [
            {
                "name": name,
                "state": service.state.value,
                "pid": service.process.pid if service.process else None,
                "port": service.spec.port,
                "http_port": service.spec.http_port,
                "queue_depth": service.reading.queue_depth,
                "detail": service.reading.detail if service.state is not State.STOPPED else "",
                "restarts": service.num_restarts,
            }
            for name, service in self._supervisor.services.items()
        ]
        about = {"pid": os.getpid(), "started_unix_s": self._started_unix_s, "lock_sha256": self._lock_sha256}
        return {"services": services, "ports": self._ports, "is_up": self._is_up, "supervisor": about}

    def _write_state(self) -> None:
        own = {"pid": os.getpid(), "start_ticks": start_ticks(os.getpid())}
        running = {
            name: {"pid": service.process.pid, "start_ticks": service.process.start_ticks}
            for name, service in self._supervisor.services.items()
            if service.process is not None
        }
        state = {"supervisor": own, "services": running, "ports": self._ports}
        try:
            write_private(self._home.state_file, json.dumps(state))
        except OSError as error:  # a full disk must not end the supervision
            log.error("state not written", extra={"error": str(error)})


async def _read(reader: asyncio.StreamReader) -> dict[str, Any] | None:
    """Returns the next request; None at the end of the connection or for what is no request."""
    try:
        loaded = json.loads(await reader.readline())
    except (ValueError, OSError):
        return None
    return loaded if isinstance(loaded, dict) else None


async def _send(writer: asyncio.StreamWriter, **message: Any) -> None:
    writer.write(json.dumps(message).encode() + b"\n")
    await writer.drain()


def _change_message(change: Change) -> dict[str, Any]:
    return {"service": change.name, "state": change.state.value, "detail": change.detail}


async def _tell(changes: "asyncio.Queue[Change]", writer: asyncio.StreamWriter) -> None:
    while True:
        await _send(writer, **_change_message(await changes.get()))


class _FileHandler(logging.Handler):
    def __init__(self, file: LogFile) -> None:
        super().__init__()
        self._file = file

    def emit(self, record: logging.LogRecord) -> None:
        fields = {k: v for k, v in vars(record).items() if k in ("target", "exit", "restart_in_s", "error")}
        if record.exc_info and record.exc_info[1]:
            fields["exception"] = logging.Formatter().formatException(record.exc_info)
        self._file.write(supervisor_line("supervisor", record.levelname, record.getMessage(), **fields))


def hold_lock(path: Path) -> TextIO | None:
    """Takes a lock that ends with the process; None where another has it."""
    file = path.open("a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    return file


def main() -> int:
    """Runs the daemon; 1 where another runs for this home."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--home", type=Path, required=True)
    home = Home(parser.parse_args().home)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    logging.basicConfig(level=logging.INFO, handlers=[_FileHandler(LogFile(home.logs / "supervisor.log"))])
    lock = hold_lock(home.run / "supervisor.lock")
    if lock is None:
        print("another supervisor runs for this home", file=sys.stderr)
        return 1
    asyncio.run(_run(home, settings.load()))
    return 0


async def _run(home: Home, told: settings.Settings) -> None:
    wiring = topology.Wiring(
        home=home,
        ports=read_json(home.ports_file),
        secrets=ensure_secrets(home),
        client_env=read_pairs(home.env_file),
        log_level=told.log_level,
        num_cores=told.num_cores,
        inherited=os.environ,
    )
    daemon = Daemon(home, topology.specs(wiring), os.environ, wiring.ports)
    log.info("supervisor started")
    await daemon.serve()
    log.info("supervisor ended")


if __name__ == "__main__":
    sys.exit(main())
