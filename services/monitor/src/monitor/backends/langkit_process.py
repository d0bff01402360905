"""LangKit in a process of its own, at low priority. Implements core.profiles.Profiler.

The process is started when a batch comes, and ends with this one: it reads end-of-file from its pipe. It stays in this
process's group. Frames both ways: four bytes of length, then JSON (langkit_worker has the other side).
"""

import asyncio
import base64
import contextlib
import json
import logging
import struct
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from monitor.core.profiles import Profiled, ProfilerDied, ProfilerUnavailable

log = logging.getLogger(__name__)

COMMAND = (sys.executable, "-m", "monitor.backends.langkit_worker")
_LENGTH = struct.Struct("!I")
_MAX_FRAME_BYTES = 64 * 1024 * 1024
# Wall time, and long: on a machine whose cores are all busy, low priority gets less than 1% of one. A text that takes
# too much of the processor itself is ended by the worker's own limit long before.
_START_TIMEOUT_S = 900.0
_BATCH_TIMEOUT_S = 60.0
_SAMPLE_TIMEOUT_S = 60.0
_STOP_TIMEOUT_S = 2.0


class LangkitProcess:
    """One process at most. Not for two callers at a time."""

    def __init__(self, options: Mapping[str, Any], command: Sequence[str] = COMMAND) -> None:
        """options: what the worker is told first; see langkit_worker.Options."""
        self._options = dict(options)
        self._command = tuple(command)
        self._process: asyncio.subprocess.Process | None = None

    @property
    def pid(self) -> int | None:
        """The process, while one runs."""
        return self._process.pid if self._process is not None else None

    async def profile(self, binary: bytes | None, texts: Sequence[tuple[str, str]]) -> Profiled:
        """Adds prompts and responses to a profile; starts the process where none runs."""
        if self._process is not None and self._process.returncode is not None:
            log.warning("profiler ended by itself", extra={"exit_status": self._process.returncode})
            self._process = None
        process = self._process or await self._start()
        request = {"binary": _encoded(binary), "texts": list(texts)}
        answer = await self._ask(process, request, _BATCH_TIMEOUT_S + _SAMPLE_TIMEOUT_S * len(texts), ProfilerDied)
        return Profiled(
            binary=base64.b64decode(answer["binary"]),
            statistics=answer["statistics"],
            failed=tuple(answer["failed"]),
        )

    async def stop(self) -> None:
        """Ends the process."""
        process, self._process = self._process, None
        if process is None:
            return
        assert process.stdin is not None
        process.stdin.close()
        try:
            async with asyncio.timeout(_STOP_TIMEOUT_S):
                await process.wait()
        except TimeoutError:
            await _kill(process)
        log.info("profiler stopped", extra={"pid": process.pid, "exit_status": process.returncode})

    async def _start(self) -> asyncio.subprocess.Process:
        try:
            process = self._process = await asyncio.create_subprocess_exec(
                *self._command, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
            )
        except OSError as error:
            raise ProfilerUnavailable(f"the profiler's process cannot be started: {error}") from error
        answer = await self._ask(process, self._options, _START_TIMEOUT_S, ProfilerUnavailable)
        if error_message := answer.get("error"):
            await self.stop()
            raise ProfilerUnavailable(f"the profiler cannot start: {error_message}")
        log.info("profiler started", extra={"pid": process.pid} | answer)
        return process

    async def _ask(
        self,
        process: asyncio.subprocess.Process,
        request: Mapping[str, Any],
        timeout_s: float,
        failure: type[Exception],
    ) -> dict[str, Any]:
        """One exchange. Whatever ends it early ends the process: the next answer would be taken for this one's."""
        try:
            async with asyncio.timeout(timeout_s):
                return await _exchange(process, request)
        except TimeoutError as error:
            await self._lose(process)
            raise failure(f"no answer in {timeout_s:.0f} s") from error
        except (EOFError, OSError, ValueError) as error:
            await self._lose(process)
            raise failure(f"the process ended with {process.returncode}: {error!r}") from error
        except BaseException:
            await asyncio.shield(self._lose(process))
            raise

    async def _lose(self, process: asyncio.subprocess.Process) -> None:
        self._process = None
        await _kill(process)


async def _exchange(process: asyncio.subprocess.Process, request: Mapping[str, Any]) -> dict[str, Any]:
    assert process.stdin is not None and process.stdout is not None
    body = json.dumps(request).encode()
    try:
        process.stdin.write(_LENGTH.pack(len(body)) + body)
        await process.stdin.drain()
    except RuntimeError as error:  # uvloop's word for a pipe whose other end is gone
        raise BrokenPipeError(str(error)) from error
    (size_bytes,) = _LENGTH.unpack(await process.stdout.readexactly(_LENGTH.size))
    if size_bytes > _MAX_FRAME_BYTES:
        raise ValueError(f"a frame of {size_bytes} bytes")
    answer = json.loads(await process.stdout.readexactly(size_bytes))
    if not isinstance(answer, dict):
        raise ValueError("an answer that is no object")
    return answer


async def _kill(process: asyncio.subprocess.Process) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.kill()
    await process.wait()


def _encoded(binary: bytes | None) -> str | None:
    return None if binary is None else base64.b64encode(binary).decode()
