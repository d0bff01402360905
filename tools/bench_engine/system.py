"""Our system for a measurement: started in a home of its own on free ports, or one that runs already."""

import asyncio
import contextlib
import json
import os
import shutil
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from bench_engine import machine
from bench_engine.engines import EngineError

ROOT = Path(__file__).resolve().parents[2]
_UP_TIMEOUT_S = 600
_READY_TIMEOUT_S = 120
_IDLE_SHARE = 0.10  # of one core, all processes together
_IDLE_TIMEOUT_S = 120


@dataclass(frozen=True, slots=True)
class System:
    """Where it answers. pids: every process of ours by name, empty for a system that is elsewhere.

    computes: what the generator's log says that it computes with; it may have chosen itself.
    """

    grpc: str
    base_url: str
    key: str = field(repr=False)
    pids: Mapping[str, int] = field(default_factory=dict)
    ready_s: float | None = None
    computes: str = "unknown"


@asynccontextmanager
async def started(engine: str | None, store: Path) -> AsyncIterator[System]:
    """`pressroom up` in a temporary home over the given model store; everything ends with the block.

    engine: GENERATOR_ENGINE of the generator, None for the default. The generator is started a second time, alone, so
    that its time to ready is not that of seven services that start at once. Raises EngineError.
    """
    home = Path(tempfile.mkdtemp(prefix="pressroom-bench-"))
    try:
        (home / "models").symlink_to(store)
        environ = os.environ | {"PRESSROOM_HOME": str(home), "PRESSROOM_PORT": "0"}
        environ |= {"GENERATOR_ENGINE": engine} if engine else {}
        try:
            await _cli(environ, "up")
            ready_s = await _restart_generator(environ)
            yield _found(home, environ, ready_s)
        finally:
            with contextlib.suppress(EngineError):
                await _cli(environ, "down")
    finally:
        shutil.rmtree(home, ignore_errors=True)


async def _cli(environ: Mapping[str, str], *arguments: str) -> str:
    command = [str(ROOT / "pressroom"), *arguments]
    done = await asyncio.to_thread(
        subprocess.run, command, env=environ, capture_output=True, text=True, timeout=_UP_TIMEOUT_S
    )
    if done.returncode:
        raise EngineError(f"pressroom {' '.join(arguments)} failed:\n{done.stderr or done.stdout}")
    return str(done.stdout)


async def _status(environ: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in json.loads(await _cli(environ, "status", "--json"))["services"]}


async def _restart_generator(environ: Mapping[str, str]) -> float:
    """Returns the seconds from the start of its process to /readyz."""
    await _cli(environ, "down", "generator")
    port = (await _status(environ))["generator"]["http_port"]
    up = asyncio.create_task(_cli(environ, "up", "generator"))
    ready_at, end_s = None, time.monotonic() + _READY_TIMEOUT_S
    while ready_at is None:
        if time.monotonic() > end_s:
            raise EngineError(f"the generator is not ready after {_READY_TIMEOUT_S} s")
        ready_at = time.time() if await asyncio.to_thread(_is_ready, port) else None
        await asyncio.sleep(0.02)
    await up
    pid = (await _status(environ))["generator"]["pid"]
    return float(ready_at - psutil.Process(pid).create_time())


def _is_ready(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=5) as response:
            return bool(response.status == 200)
    except OSError:
        return False


def _found(home: Path, environ: Mapping[str, str], ready_s: float | None) -> System:
    from devstack import status
    from devstack.home import Home, read_json, read_pairs

    ports, env = read_json(Home(home).ports_file), read_pairs(Home(home).env_file)
    rows = status.read(Home(home))["services"]
    return System(
        grpc=f"127.0.0.1:{ports['generator.grpc']}",
        base_url=env["PRESSROOM_BASE_URL"],
        key=env["PRESSROOM_API_KEY"],
        pids={row["name"]: row["pid"] for row in rows if row["pid"]},
        ready_s=ready_s,
        computes=computes((home / "logs" / "generator.log").read_text()),
    )


def computes(log: str) -> str:
    """Model and precision from the newest line of a generator's log about a loaded model."""
    lines = [json.loads(line) for line in log.splitlines() if line.startswith("{") and "model loaded" in line]
    return f"{lines[-1].get('model')} in {lines[-1].get('dtype')}" if lines else "unknown"


async def wait_idle(system: System) -> float:
    """Waits until the services do nothing (the samples are in), so long at most; returns cores in use at the end."""
    end_s = time.monotonic() + _IDLE_TIMEOUT_S
    while True:
        before, began_s = machine.cpu_seconds(system.pids.values()), time.monotonic()
        await asyncio.sleep(2)
        share = (machine.cpu_seconds(system.pids.values()) - before) / (time.monotonic() - began_s)
        if share < _IDLE_SHARE or time.monotonic() > end_s or not system.pids:
            return share
