"""Starts the child that trains and follows it. Implements core.ports.Trainings.

The child stays in the service's process group and lowers its own priority; see backends.lora.child.
"""

import asyncio
import collections
import contextlib
import json
import logging
import sys
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from trainer.core.ports import ChildMessage, RunFolder

log = logging.getLogger(__name__)

_COMMAND = (sys.executable, "-m", "trainer.backends.lora.child")
_TAIL_LINES = 30
_LINE_BYTES = 1024 * 1024
_KILL_PATIENCE_S = 10.0


@dataclass(frozen=True, slots=True)
class Ended:
    """How a child ended; see core.ports.ChildEnd."""

    status: int
    last_words: str


class ChildProcesses:
    """One child at a time is the caller's business."""

    def __init__(self, command: Sequence[str] = ()) -> None:
        self._command = tuple(command) or _COMMAND

    async def run(self, folder: RunFolder, on_message: Callable[[ChildMessage], Awaitable[None]]) -> Ended:
        """See Trainings.run. Its standard input stays open: the child ends when it closes."""
        process = await asyncio.create_subprocess_exec(
            *self._command,
            str(folder.path),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            limit=_LINE_BYTES,
        )
        assert process.stdout is not None and process.stderr is not None
        tail: collections.deque[str] = collections.deque(maxlen=_TAIL_LINES)
        listening = asyncio.create_task(_keep_tail(process.stderr, tail))
        try:
            async for line in process.stdout:
                if (message := _message(line)) is not None:
                    await on_message(message)
            status = await process.wait()
            # Bounded: what the child has started may hold the pipe open.
            await asyncio.wait({listening}, timeout=_KILL_PATIENCE_S)
            return Ended(status, "\n".join(tail))
        finally:
            listening.cancel()
            await _kill(process)


async def _kill(process: asyncio.subprocess.Process) -> None:
    if process.returncode is not None:
        return
    with contextlib.suppress(ProcessLookupError):
        process.kill()
    try:
        async with asyncio.timeout(_KILL_PATIENCE_S):
            await process.wait()
    except TimeoutError:
        log.error("the training process does not end", extra={"child_pid": process.pid})


async def _keep_tail(stream: asyncio.StreamReader, tail: collections.deque[str]) -> None:
    """Reads in pieces: a line without an end must not stop the reading."""
    rest = ""
    while piece := await stream.read(4096):
        *lines, rest = (rest + piece.decode(errors="replace")).split("\n")
        tail.extend(line[:500] for line in lines if line.strip())
        rest = rest[-500:]
    if rest.strip():
        tail.append(rest)


def _message(line: bytes) -> ChildMessage | None:
    try:
        message = json.loads(line)
    except ValueError:
        message = None
    if not isinstance(message, dict) or "kind" not in message:  # cut off by a death
        log.warning("the training process told something unreadable", extra={"size_bytes": len(line)})
        return None
    return message
