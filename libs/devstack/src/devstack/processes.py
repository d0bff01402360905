"""One process as the supervisor keeps it: started as a child that dies with us, stopped, and watched.

Linux only: process groups, /proc and the parent-death signal.
"""

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path

from devstack.logfiles import LogFile

_CHILD = str(Path(__file__).with_name("child.py"))
_READ_BYTES = 64 * 1024
_LAST_OUTPUT_S = 1.0


class Process:
    """A started child. It leads a process group of its own, so that what it starts can be ended with it."""

    def __init__(self, process: asyncio.subprocess.Process, log: LogFile) -> None:
        self._process = process
        self._log = log
        self.pid = process.pid
        self.start_ticks = start_ticks(process.pid) or 0
        self._pump = asyncio.get_running_loop().create_task(self._copy_output())

    @classmethod
    async def start(cls, argv: tuple[str, ...], env: Mapping[str, str], log: LogFile) -> "Process":
        """Starts it with its output going to the log. Raises OSError where not even the wrapper can be started."""
        log.mark_start()
        # -S -E: the wrapper needs no site-packages and starts in milliseconds.
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-S",
            "-E",
            _CHILD,
            str(os.getpid()),
            *argv,
            env=dict(env),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            process_group=0,
        )
        return cls(process, log)

    async def wait(self) -> int:
        """Returns the exit code (negative: the signal that ended it) once it and what it had started are gone."""
        code = await self._process.wait()
        self._signal_group(signal.SIGKILL)
        # A grandchild that left the group could hold the pipe open: what it still writes is not waited for.
        _, pending = await asyncio.wait({self._pump}, timeout=_LAST_OUTPUT_S)
        for pump in pending:
            pump.cancel()
        return code

    async def stop(self, grace_s: float) -> None:
        """Asks it to end, then ends it and all of its group. Returns when it is gone."""
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGTERM)
                os.kill(self.pid, signal.SIGCONT)  # a stopped process would not hear the first
        try:
            async with asyncio.timeout(grace_s):
                await self._process.wait()
        except TimeoutError:
            self._signal_group(signal.SIGKILL)
        await self.wait()

    def _signal_group(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, number)

    async def _copy_output(self) -> None:
        assert self._process.stdout is not None
        while data := await self._process.stdout.read(_READ_BYTES):
            self._log.write(data)


def start_ticks(pid: int) -> int | None:
    """Returns when a process started, in clock ticks since boot; with the pid it names a process for good."""
    fields = stat_fields(pid)
    return int(fields[19]) if fields else None


def is_alive(pid: int, ticks: int) -> bool:
    """Says whether this very process still runs (a zombie does not)."""
    fields = stat_fields(pid)
    return bool(fields) and int(fields[19]) == ticks and fields[0] != "Z"


def group_members(group: int) -> list[int]:
    """Returns the process ids of a group."""
    pids = (int(entry) for entry in os.listdir("/proc") if entry.isdecimal())
    return [pid for pid in pids if (fields := stat_fields(pid)) and int(fields[2]) == group and fields[0] != "Z"]


def memory_bytes(pid: int) -> tuple[int, int]:
    """Returns RSS and PSS of a process; zeros where it is gone or another user's."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0, 0
    values = {name: int(rest.split()[0]) * 1024 for name, _, rest in (line.partition(":") for line in lines[1:])}
    return values.get("Rss", 0), values.get("Pss", 0)


def stat_fields(pid: int) -> list[str]:
    """Fields of /proc/pid/stat from the state on, empty where it is gone.

    By index: 0 state, 2 group, 11 and 12 ticks as user and system, 16 nice value, 19 start, 38 scheduling policy.
    """
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []
