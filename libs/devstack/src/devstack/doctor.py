"""Looks for what keeps the system from running, and says how to mend each finding."""

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from devstack import binaries, control, environment, lifecycle, ports, topology
from devstack.home import Home, read_json
from devstack.processes import is_alive
from devstack.settings import Settings
from devstack.up import describe_holder

_NEEDED_MEMORY_BYTES = 4 * 1024**3
_NEEDED_DISK_BYTES = 2 * 1024**3


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at. mend says what to do; it is empty where all is well."""

    check: str
    ok: bool
    detail: str
    mend: str = ""


def examine(settings: Settings) -> list[Finding]:
    """Runs every check."""
    home = Home(settings.home)
    checks: list[Callable[[Settings, Home], Iterator[Finding]]] = [
        _python, _dependencies, _programs, _memory, _disk, _private_files, _models, _stale, _ports, _services,
    ]  # fmt: skip
    return [finding for check in checks for finding in check(settings, home)]


def _python(settings: Settings, home: Home) -> Iterator[Finding]:
    version = ".".join(map(str, sys.version_info[:3]))
    ok = sys.version_info >= (3, 11)
    yield Finding("python", ok, version, "" if ok else "install Python 3.11 or newer, remove .venv, make setup")


def _dependencies(settings: Settings, home: Home) -> Iterator[Finding]:
    different = environment.differences()
    if different:
        more = f" and {len(different) - 3} more" if len(different) > 3 else ""
        yield Finding("dependencies", False, "; ".join(different[:3]) + more, "make setup")
    elif not environment.is_current():
        yield Finding("dependencies", False, "the lock files changed after the last set-up", "make setup")
    else:
        yield Finding("dependencies", True, "as the lock files say")


def _programs(settings: Settings, home: Home) -> Iterator[Finding]:
    try:
        binaries.verify()
    except binaries.BadBinary as error:
        yield Finding("programs", False, str(error), "rm -r .venv && make setup")
    else:
        yield Finding("programs", True, "nats-server and valkey-server are the ones that were checked in")


def _memory(settings: Settings, home: Home) -> Iterator[Finding]:
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    needed = 0 if lifecycle.is_running(home) else _NEEDED_MEMORY_BYTES
    ok = free >= needed
    yield Finding("memory", ok, f"{free / 1e9:.1f} GB available", "" if ok else f"free {needed / 1e9:.1f} GB")


def _disk(settings: Settings, home: Home) -> Iterator[Finding]:
    free = shutil.disk_usage(home.root if home.root.exists() else home.root.parent).free
    ok = free >= _NEEDED_DISK_BYTES
    mend = "" if ok else f"free {_NEEDED_DISK_BYTES / 1e9:.0f} GB, or set PRESSROOM_HOME to another disk"
    yield Finding("disk", ok, f"{free / 1e9:.1f} GB free under {home.root}", mend)


def _private_files(settings: Settings, home: Home) -> Iterator[Finding]:
    for path in (home.env_file, home.secrets_file):
        if path.exists() and path.stat().st_mode & 0o077:
            yield Finding("secrets", False, f"{path} can be read by others", f"chmod 600 {path}")
        elif path.exists() and path.stat().st_uid != os.getuid():
            yield Finding("secrets", False, f"{path} belongs to another user", "take another PRESSROOM_HOME")


def _models(settings: Settings, home: Home) -> Iterator[Finding]:
    for model in topology.MODELS:
        folder = home.models / model
        try:
            files = json.loads((folder / "manifest.json").read_text())["files"]
            broken = [problem for file in files if (problem := _mismatch(folder / file["path"], file["sha256"]))]
        except FileNotFoundError:
            yield Finding("models", False, f"{model} is not prepared", "make models")
            continue
        except (OSError, ValueError, KeyError) as error:
            broken = [f"the manifest of {model} cannot be read: {error}"]
        mend = "make models" if broken else ""  # makes anew what does not match its checksums
        yield Finding("models", not broken, "; ".join(broken) or f"{model}: checksums hold", mend)


def _mismatch(file: Path, expected: str) -> str:
    if not file.is_file():
        return f"{file} is missing"
    with file.open("rb") as content:
        found = hashlib.file_digest(content, "sha256").hexdigest()
    return "" if found == expected else f"{file} has sha256 {found}, expected {expected}"


def _stale(settings: Settings, home: Home) -> Iterator[Finding]:
    state = read_json(home.state_file)
    if not state or lifecycle.is_running(home):
        return
    left = [name for name, p in state.get("services", {}).items() if is_alive(p["pid"], p["start_ticks"])]
    detail = f"a supervisor ended without stopping {', '.join(left)}" if left else "a supervisor was killed"
    yield Finding("left over", False, detail, "./pressroom down")


def _ports(settings: Settings, home: Home) -> Iterator[Finding]:
    if lifecycle.is_running(home) or settings.base_port == 0:
        return
    chosen = ports.plan(settings.base_port, topology.PORT_OFFSETS)
    names = {port: name for name, port in chosen.items()}
    held = ports.busy(names)
    for holder in held:
        mend = "end that process, or PRESSROOM_PORT=0 make up"
        yield Finding("ports", False, describe_holder(holder, names[holder.port]), mend)
    if not held:
        yield Finding("ports", True, f"{min(names)} to {max(names)} are free")


def _services(settings: Settings, home: Home) -> Iterator[Finding]:
    if not lifecycle.is_running(home):
        yield Finding("services", True, "not running")
        return
    try:
        told = control.ask(home.run, "status")
    except (control.NotRunning, control.ControlLost):
        yield Finding("services", False, "the supervisor does not answer", "./pressroom down && make up")
        return
    for service in told["services"]:
        name, state, detail = service["name"], service["state"], service["detail"]
        if state == "stopped":
            yield Finding("services", False, f"{name} was stopped", f"./pressroom up {name}")
        elif state != "ready":
            yield Finding("services", False, f"{name} is {state} {detail}".rstrip(), f"./pressroom logs {name}")
    if all(service["state"] == "ready" for service in told["services"]):
        yield Finding("services", True, "all ready")
