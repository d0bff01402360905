"""The machine and its processes, from /proc: what a figure must be read with."""

import os
import platform
import signal
import time
from collections.abc import Iterable
from pathlib import Path

import psutil

QUIET_LOAD = 1.0
_ISAS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx_vnni", "amx_int8", "asimddp", "i8mm", "bf16")


def describe() -> str:
    """Processor, usable cores, instruction sets that matter here, memory and load average."""
    model, flags = platform.machine(), set[str]()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            model = value.strip()
        if name.strip() in ("flags", "Features"):
            flags = set(value.split())
    isas = ", ".join(isa for isa in _ISAS if isa in flags) or "none of those that matter here"
    memory = psutil.virtual_memory()
    return (
        f"{model}, {len(os.sched_getaffinity(0))} cores ({isas}), {memory.total / 2**30:.0f} GiB of memory, "
        f"{memory.available / 2**30:.0f} GiB free, load average {os.getloadavg()[0]:.2f}"
    )


def wait_for_quiet(timeout_s: float) -> float:
    """Waits, so long at most, until the load average of the last minute is below QUIET_LOAD; returns it."""
    end_s = time.monotonic() + timeout_s
    while (load := os.getloadavg()[0]) >= QUIET_LOAD and time.monotonic() < end_s:
        time.sleep(2)
    return load


def tree(pid: int) -> list[psutil.Process]:
    """A process and all that it started; empty where it is gone."""
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def memory_bytes(pids: Iterable[int]) -> int:
    """PSS: shared pages are shared out, so that a sum over processes means something."""
    total = 0
    for pid in pids:
        for process in tree(pid):
            try:
                lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()
            except OSError:  # it ended meanwhile
                continue
            total += sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
    return total


def cpu_seconds(pids: Iterable[int]) -> float:
    """Processor time of processes and all that they started, since their start."""
    total = 0.0
    for process in (process for pid in pids for process in tree(pid)):
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system
    return total


def freeze(pid: int, frozen: bool) -> None:
    """Stops a process and all that it started, or lets them go on: an engine whose turn it is not takes no core."""
    for process in tree(pid):
        try:
            process.send_signal(signal.SIGSTOP if frozen else signal.SIGCONT)
        except psutil.NoSuchProcess:
            continue
