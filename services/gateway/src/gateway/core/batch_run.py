"""The work on a batch: check the file, ask every line that has no result yet, put the results into files.

Each result is durable before the next step builds on it, so that a worker that was killed is followed by one that asks
only what has no result. Lines stand behind people's requests. Knows nothing of HTTP, SQLite or the bus.
"""

import asyncio
import random
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Protocol

from chassis.errors import Code, PlatformError
from gateway.core.batch_lines import (
    Census,
    Fault,
    Line,
    RawLine,
    Result,
    answered,
    not_asked,
    raw_lines,
    read_line,
    repeated_name,
)
from gateway.core.batches import Batch, BatchWork, Ending
from gateway.core.documents import FileRow, StoredFile
from gateway.core.jobs import JobStatus
from gateway.core.ports import Principal
from gateway.core.uploads import Purpose, Upload, UploadStore

PRIORITY = -10  # below every class that is for people
MAX_LINES = 50_000  # OpenAI's
_MAX_FAULTS = 100  # told of a file in which no line is good
_PAGE = 200  # results read or written together
# By status: how often a line is asked before its error is its result. 429 and 503 pass when their time comes: a
# generator that is away for a quarter of an hour, or a limit of a few lines a minute, fails no line.
_MAX_ATTEMPTS = {429: 120, 500: 3, 502: 3, 503: 40, 504: 3}
_NEVER_AGAIN = ("insufficient_quota", "budget_exceeded")  # no waiting helps within the day
_MAX_PAUSE_S = 60.0


@dataclass(frozen=True, slots=True)
class Answer:
    """What an endpoint answered. error_code is that of OpenAI's envelope; empty where there is none."""

    status: int
    request_id: str
    body: bytes
    error_code: str = ""
    retry_after_s: float = 0.0


class Endpoints(Protocol):
    """The routes that lines are for."""

    async def post(self, principal: Principal, endpoint: str, body: bytes) -> Answer:
        """Asks as the principal would over HTTP; what goes wrong is an answer too."""
        ...


class KeyOwners(Protocol):
    """Whose a key is, without the key."""

    async def owner(self, tenant: str, key_id: str) -> Principal:
        """Returns what authenticate would; raises UNAUTHENTICATED where the key is no longer good."""
        ...


class ResultFiles(Protocol):
    """Where files are written."""

    async def write(self, pieces: AsyncIterator[bytes]) -> StoredFile:
        """Writes a file, durable when it returns; raises UNAVAILABLE for a full disk."""
        ...

    def read(self, row: FileRow) -> AsyncGenerator[bytes]:
        """Yields the bytes; raises DATA_LOSS when they are not those that were stored."""
        ...


class _Pace:
    """When a batch asks next: not before the time that a refusal named, and ever later while refusals go on."""

    def __init__(self, clock: Callable[[], float], sleep: Callable[[float], Awaitable[None]]) -> None:
        self._clock = clock
        self._sleep = sleep
        self._not_before_s = 0.0
        self._num_refused = 0

    async def wait(self) -> None:
        while True:  # the time may be put off while a line waits for it
            left_s = self._not_before_s - self._clock()
            if left_s <= 0:
                return
            await self._sleep(left_s)

    def refused(self, retry_after_s: float) -> None:
        if self._clock() < self._not_before_s:  # the lines beside this one were refused for the same reason
            return
        pause_s = max(retry_after_s, 0.5 * 2**self._num_refused)
        self._not_before_s = self._clock() + min(pause_s, _MAX_PAUSE_S) * random.uniform(1.0, 1.2)
        self._num_refused = min(self._num_refused + 1, 7)

    def went_through(self) -> None:
        self._num_refused = 0


class BatchRunner:
    """Does the work on batches, several at a time. max_in_flight bounds the lines of all of them together."""

    def __init__(
        self,
        work: BatchWork,
        uploads: UploadStore,
        files: ResultFiles,
        endpoints: Endpoints,
        owners: KeyOwners,
        *,
        max_in_flight: int,
        max_line_bytes: int,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._work = work
        self._uploads = uploads
        self._files = files
        self._endpoints = endpoints
        self._owners = owners
        self._max_in_flight = max_in_flight
        self._max_line_bytes = max_line_bytes
        # Its queue is first come, first served: batches that run together share it evenly.
        self._slots = asyncio.Semaphore(max_in_flight)
        self._clock = clock
        self._sleep = sleep
        self._now = now

    async def start(self, tenant: str, job_id: str) -> Batch | None:
        """Returns the batch to work on; None where there is none, or it has ended."""
        batch = await self._work.start(tenant, job_id)
        return None if batch is None or batch.job.status.is_final else batch

    async def answer(self, batch: Batch) -> Ending:
        """Asks every line that has no result. Returns how the batch ends; finish() ends it.

        Raises FAILED_PRECONDITION with the reason job_cancelled once the batch is to stop, and what comes of a lost
        file, a revoked key or a database that is away.
        """
        try:
            async with asyncio.timeout(max(0.0, batch.expires_unix_ms / 1000 - self._now())) as window:
                return await self._answer(batch)
        except TimeoutError:
            if not window.expired():
                raise
            return Ending(JobStatus.FAILED, "the completion window has passed", is_expired=True)

    async def finish(self, batch: Batch, ending: Ending) -> None:
        """Puts the results into files and ends the batch; lines without a result get the error that says why."""
        job_id = batch.job.job_id
        if ending.is_expired:
            await self._give_up(batch, "batch_expired", "the completion window passed before this line was asked")
        elif ending.status is JobStatus.CANCELLED:
            await self._give_up(batch, "batch_cancelled", "the batch was cancelled before this line was asked")
        await self._work.finalizing(job_id)
        ended = replace(
            ending,
            output=await self._write(batch, "output", is_answered=True),
            errors=await self._write(batch, "error", is_answered=False),
        )
        await self._work.end(job_id, ended)

    async def _answer(self, batch: Batch) -> Ending:
        row = await self._row(batch)
        census = await self._census(batch, row)
        if fault := _refusal(census):
            return Ending(JobStatus.FAILED, fault[0].message, faults=fault)
        await self._work.validated(batch.job.job_id, census.num_lines)
        done = await self._work.done(batch.job.job_id)
        pace = _Pace(self._clock, self._sleep)
        running: set[asyncio.Task[None]] = set()
        try:
            async with aclosing(self._lines(batch, row)) as lines:
                async for raw in lines:
                    if raw.number in done:
                        continue
                    if len(running) == self._max_in_flight:
                        running = await _settled(running)
                    running.add(asyncio.create_task(self._line(batch, raw, raw.number in census.repeated, pace)))
            while running:
                running = await _settled(running)
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)
        return Ending(JobStatus.SUCCEEDED)

    async def _row(self, batch: Batch) -> FileRow:
        upload = await self._uploads.get(batch.job.tenant, batch.input_upload_id)
        if upload is None:  # an unfinished job's file cannot be deleted
            raise PlatformError(Code.DATA_LOSS, "the batch's file is gone", reason="file_not_found")
        return upload.row

    async def _census(self, batch: Batch, row: FileRow) -> Census:
        census = Census(batch.endpoint)
        async with aclosing(self._files.read(row)) as pieces:
            async for lines in raw_lines(pieces, self._max_line_bytes):
                await asyncio.to_thread(census.take, lines, _MAX_FAULTS)
                if census.num_lines > MAX_LINES:
                    break
        return census

    async def _lines(self, batch: Batch, row: FileRow) -> AsyncGenerator[RawLine]:
        async with aclosing(self._files.read(row)) as pieces:
            async for lines in raw_lines(pieces, self._max_line_bytes):
                for line in lines:
                    yield line

    async def _line(self, batch: Batch, raw: RawLine, is_repeated: bool, pace: _Pace) -> None:
        """Makes the one result of a line and keeps it."""
        line = read_line(raw, batch.endpoint)
        if isinstance(line, Line) and is_repeated:
            line = repeated_name(line)
        result = not_asked(line) if isinstance(line, Fault) else await self._ask(batch, line, pace)
        if not await self._work.keep(batch.job.job_id, [result]):
            raise PlatformError(Code.FAILED_PRECONDITION, "the batch was cancelled", reason="job_cancelled")

    async def _ask(self, batch: Batch, line: Line, pace: _Pace) -> Result:
        num_attempts = 0
        while True:
            await pace.wait()
            async with self._slots:
                answer = await self._endpoints.post(await self._sender(batch), batch.endpoint, line.body)
            num_attempts += 1
            is_final = answer.error_code in _NEVER_AGAIN or num_attempts >= _MAX_ATTEMPTS.get(answer.status, 1)
            if is_final:
                pace.went_through()
                return answered(line, answer.status, answer.request_id, answer.body)
            pace.refused(answer.retry_after_s)

    async def _sender(self, batch: Batch) -> Principal:
        """The owner of the key that made the batch, as it is now, behind all people."""
        owner = await self._owners.owner(batch.job.tenant, batch.job.key_id)
        return replace(owner, policy=replace(owner.policy, priority=min(owner.policy.priority, PRIORITY)))

    async def _give_up(self, batch: Batch, code: str, message: str) -> None:
        """Gives every line without a result an error for one; none where the lines were never asked."""
        if batch.in_progress_unix_ms is None and not await self._work.done(batch.job.job_id):
            return
        row, job_id = await self._row(batch), batch.job.job_id
        done = await self._work.done(job_id)
        results: list[Result] = []
        async with aclosing(self._lines(batch, row)) as lines:
            async for raw in lines:
                if raw.number in done:
                    continue
                line = read_line(raw, batch.endpoint)
                results.append(not_asked(Fault(code, message, None, raw.number, line.custom_id)))
                if len(results) == _PAGE:
                    await self._work.keep(job_id, results)
                    results = []
        await self._work.keep(job_id, results)

    async def _write(self, batch: Batch, name: str, *, is_answered: bool) -> Upload | None:
        """Writes the results of one kind into a file of the tenant's; None where there are none."""
        pieces = self._results(batch.job.job_id, is_answered=is_answered)
        async with aclosing(pieces):
            first = await anext(pieces, None)
            if first is None:
                return None
            stored = await self._files.write(_chained(first, pieces))
        job = batch.job
        row = FileRow(
            stored.file_id,
            job.tenant,
            stored.sha256,
            stored.size_bytes,
            "application/jsonl",
            f"{job.job_id}_{name}.jsonl",
        )
        return Upload(stored.file_id.replace("_", "-", 1), row, Purpose.BATCH_OUTPUT, int(self._now() * 1000))

    async def _results(self, job_id: str, *, is_answered: bool) -> AsyncGenerator[bytes]:
        after = 0
        while page := await self._work.results(job_id, is_answered=is_answered, after=after, limit=_PAGE):
            yield b"".join(result.content for result in page)
            after = page[-1].line


def _refusal(census: Census) -> tuple[Fault, ...]:
    """Why no line of the file is asked; empty where there is one to ask."""
    if census.num_lines > MAX_LINES:
        return (Fault("too_many_requests", f"the file has more than {MAX_LINES} lines", "input_file_id"),)
    if census.num_lines == 0:
        return (Fault("empty_file", "the file has no lines", "input_file_id"),)
    return () if census.num_good else tuple(census.faults)


async def _settled(running: set[asyncio.Task[None]]) -> set[asyncio.Task[None]]:
    """Waits until one of the tasks has ended; raises what it raised, and returns those that go on."""
    done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
    for task in done:
        task.result()
    return running


async def _chained(first: bytes, rest: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    yield first
    async for piece in rest:
        yield piece
