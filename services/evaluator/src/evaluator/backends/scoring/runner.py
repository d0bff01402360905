"""Runs the child process that scores, within a limit of time."""

import asyncio
import dataclasses
import json
import signal
import sys
from collections.abc import Mapping

from chassis.errors import Code, PlatformError
from evaluator.core.results import MetricValue, ScoringOrder


class ChildScorer:
    """See core.ports.Scorer. One child for each order; it is killed where its order is cancelled."""

    def __init__(self, *, timeout_s: float) -> None:
        self._timeout_s = timeout_s

    async def score(self, order: ScoringOrder) -> Mapping[str, MetricValue]:
        """Returns the values by name. Raises UNAVAILABLE where the child was stopped from outside or got no time."""
        output = await self._run(await asyncio.to_thread(_dumped, order))
        return {name: MetricValue(**fields) for name, fields in json.loads(output).items()}

    async def _run(self, data: bytes) -> bytes:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "evaluator.backends.scoring.child",
            str(max(1, int(self._timeout_s))),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        try:
            # The limit is on the time of the processor; being last in the queue, the child may wait for it much longer.
            async with asyncio.timeout(10 * self._timeout_s):
                output, errors = await process.communicate(data)
        except TimeoutError:
            raise PlatformError(Code.UNAVAILABLE, "scoring got no time on the processor", retryable=True) from None
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        self._check_end(process.returncode, errors)
        return output

    def _check_end(self, status: int | None, errors: bytes) -> None:
        if status == 0:
            return
        if status == -signal.SIGXCPU:
            message = f"task: scoring takes more than {self._timeout_s:.0f} s; use fewer or shorter references"
            raise PlatformError(Code.INVALID_ARGUMENT, message, param="task")
        if status is not None and status < 0:
            raise PlatformError(Code.UNAVAILABLE, f"scoring was stopped by signal {-status}", retryable=True)
        last = errors.decode(errors="replace").strip().rsplit("\n", 1)[-1][:200]
        raise PlatformError(Code.INTERNAL, f"scoring ended with {status}: {last}")


def _dumped(order: ScoringOrder) -> bytes:
    fields = dataclasses.asdict(order)
    return json.dumps(fields).encode()
