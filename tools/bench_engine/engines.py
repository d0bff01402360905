"""What is measured, each behind the same four verbs: start, run, freeze, close. Peers are processes of their own."""

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Protocol

from bench_engine import machine
from bench_engine.answers import Answer, Run, closed_loop
from bench_engine.clients import GrpcClient, HttpClient

START_TIMEOUT_S = 900.0  # vLLM compiles at its first start
RUN_TIMEOUT_S = 900.0
_STOP_TIMEOUT_S = 15.0


class EngineError(Exception):
    """An engine that did not start or did not answer; the message says where its log is."""


class Engine(Protocol):
    """name: as the table has it. pids: the processes that its memory and its work are counted of."""

    name: str
    pids: tuple[int, ...]

    async def start(self) -> float | None:
        """Returns the seconds from its start to ready, None where they are not known. Raises EngineError."""
        ...

    async def run(self, prompts: Sequence[str], max_tokens: int, num_streams: int) -> Run:
        """One closed loop."""
        ...

    def freeze(self, frozen: bool) -> None:
        """Takes its cores away while others are measured."""
        ...

    async def close(self) -> None:
        """Ends what start() began, and nothing else."""
        ...


class _PeerProcess:
    """A peer's process in a session of its own; its output goes to a log beside the results."""

    def __init__(self, name: str, argv: Sequence[str], env: dict[str, str], log: Path) -> None:
        self.name = name
        self.pids: tuple[int, ...] = ()
        self._argv, self._env, self._log = list(argv), env, log
        self._process: subprocess.Popen[bytes] | None = None

    def _spawn(self, stdin: int, stdout: IO[bytes] | int | None = None) -> subprocess.Popen[bytes]:
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self._argv,
                env=os.environ | self._env,
                stdin=stdin,
                stdout=log if stdout is None else stdout,
                stderr=log,
                start_new_session=True,
            )
        self.pids = (self._process.pid,)
        return self._process

    def _check_alive(self) -> None:
        if self._process is None or self._process.poll() is not None:
            code = None if self._process is None else self._process.returncode
            raise EngineError(f"{self.name} ended with {code}; its log: {self._log}")

    def freeze(self, frozen: bool) -> None:
        for pid in self.pids:
            machine.freeze(pid, frozen)

    async def close(self) -> None:
        if self._process is None:
            return
        self.freeze(False)
        members = [process for pid in self.pids for process in machine.tree(pid)]
        self._process.send_signal(signal.SIGTERM)
        try:
            await asyncio.to_thread(self._process.wait, _STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            await asyncio.to_thread(self._process.wait)
        for member in members:  # what it had started and left behind
            with contextlib.suppress(Exception):
                member.kill()
        self._process = None


class HttpPeer(_PeerProcess):
    """A peer that serves OpenAI's chat completions."""

    def __init__(self, name: str, argv: Sequence[str], env: dict[str, str], log: Path, port: int, model: str) -> None:
        super().__init__(name, argv, env, log)
        self._port = port
        self._client = HttpClient(f"http://127.0.0.1:{port}/v1", model)

    async def start(self) -> float:
        began_s = time.perf_counter()
        self._spawn(subprocess.DEVNULL)
        while not await asyncio.to_thread(self._is_ready):
            self._check_alive()
            if time.perf_counter() - began_s > START_TIMEOUT_S:
                raise EngineError(f"{self.name} is not ready after {START_TIMEOUT_S:.0f} s; its log: {self._log}")
            await asyncio.sleep(0.05)
        return time.perf_counter() - began_s

    def _is_ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self._port}/health", timeout=5) as response:
                return bool(response.status == 200)
        except OSError:
            return False

    async def run(self, prompts: Sequence[str], max_tokens: int, num_streams: int) -> Run:
        self._check_alive()
        return await closed_loop(self._client.ask, prompts, max_tokens, num_streams)


class PipePeer(_PeerProcess):
    """A peer that runs in process: in a child that is told over a pipe what to run and tells the times."""

    async def start(self) -> float:
        began_s = time.perf_counter()
        self._spawn(subprocess.PIPE, subprocess.PIPE)
        await self._read(START_TIMEOUT_S)
        return time.perf_counter() - began_s

    async def _read(self, timeout_s: float) -> dict[str, object]:
        assert self._process is not None and self._process.stdout is not None
        reading = asyncio.create_task(asyncio.to_thread(self._process.stdout.readline))
        done, _ = await asyncio.wait({reading}, timeout=timeout_s)
        if not done:
            self._process.kill()  # which ends the thread that reads
            raise EngineError(f"{self.name} did not answer within {timeout_s:.0f} s; its log: {self._log}")
        if not (line := reading.result()):
            await asyncio.to_thread(self._process.wait)
            self._check_alive()
        answer: dict[str, object] = json.loads(line)
        return answer

    async def run(self, prompts: Sequence[str], max_tokens: int, num_streams: int) -> Run:
        self._check_alive()
        assert self._process is not None and self._process.stdin is not None
        order = {"prompts": list(prompts), "max_tokens": max_tokens, "num_streams": num_streams}
        self._process.stdin.write(json.dumps(order).encode() + b"\n")
        self._process.stdin.flush()
        return read_piped(await self._read(RUN_TIMEOUT_S))


def read_piped(told: dict[str, object]) -> Run:
    """What peer_openvino.py tells of a run."""
    answers, wall_s = told["answers"], told["wall_s"]
    assert isinstance(answers, list) and isinstance(wall_s, float)
    return Run(
        wall_s,
        tuple(
            Answer(a["began_s"], a["stamps"], prompt_tokens=a["prompt_tokens"], completion_tokens=a["tokens"])
            for a in answers
        ),
    )


class Served:
    """Ours, served by a system that somebody else starts and stops: asked by gRPC, or by HTTP through the gateway."""

    def __init__(
        self, name: str, client: GrpcClient | HttpClient, pids: tuple[int, ...], ready_s: float | None
    ) -> None:
        self.name, self.pids = name, pids
        self._client, self._ready_s = client, ready_s

    async def start(self) -> float | None:
        return self._ready_s

    async def run(self, prompts: Sequence[str], max_tokens: int, num_streams: int) -> Run:
        return await closed_loop(self._client.ask, prompts, max_tokens, num_streams)

    def freeze(self, frozen: bool) -> None:
        """Never: it is measured with all services up and idle, and a frozen bus would be a failure."""

    async def close(self) -> None:
        if isinstance(self._client, GrpcClient):
            await self._client.close()
