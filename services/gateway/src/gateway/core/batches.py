"""Batches: a file of requests, answered one by one within a day, each as if it had come over HTTP.

Order, job and message are one transaction; so are a line's result and the count of it. Knows nothing of HTTP, SQLite
or the bus; core.batch_run does the work.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from chassis.errors import Code, PlatformError
from gateway.core import creation
from gateway.core.batch_lines import Fault, Result
from gateway.core.jobs import Job, JobStatus
from gateway.core.outbox import Message
from gateway.core.uploads import (
    Purpose,
    Upload,
    UploadStore,
    check_purpose,
    file_not_found,
)

TYPE = "batch"
MAX_UNFINISHED_JOBS = 20  # of one tenant
WINDOW_S = 24 * 3600  # OpenAI's one completion window


@dataclass(frozen=True, slots=True)
class Batch:
    """A batch with all that is known of it."""

    job: Job
    endpoint: str
    input_upload_id: str
    expires_unix_ms: int
    metadata: Mapping[str, str] = field(default_factory=dict)
    in_progress_unix_ms: int | None = None
    finalizing_unix_ms: int | None = None
    cancelling_unix_ms: int | None = None
    is_expired: bool = False
    num_completed: int = 0
    num_failed: int = 0
    output_upload_id: str | None = None
    error_upload_id: str | None = None
    faults: tuple[Fault, ...] = ()  # why it failed

    @property
    def status(self) -> str:
        """OpenAI's word for where it stands."""
        match self.job.status:
            case JobStatus.SUCCEEDED:
                return "completed"
            case JobStatus.CANCELLED:
                return "cancelled"
            case JobStatus.FAILED:
                return "expired" if self.is_expired else "failed"
        if self.job.cancel_requested:
            return "cancelling"
        if self.finalizing_unix_ms is not None:
            return "finalizing"
        return "validating" if self.in_progress_unix_ms is None else "in_progress"


@dataclass(frozen=True, slots=True)
class Ending:
    """How a batch ends. Uploads are the files of results, where there are any."""

    status: JobStatus
    error: str | None = None
    is_expired: bool = False
    faults: tuple[Fault, ...] = ()
    output: Upload | None = None
    errors: Upload | None = None


class BatchStore(Protocol):
    """Where batches are kept. A write is durable when it returns."""

    async def submit(self, batch: Batch, message: Message) -> None:
        """Writes batch, job and message in one transaction.

        Raises NOT_FOUND where the file is gone, RATE_LIMITED where the tenant has MAX_UNFINISHED_JOBS already.
        """
        ...

    async def get(self, tenant: str, job_id: str) -> Batch | None:
        """Returns the tenant's batch."""
        ...

    async def newest(self, tenant: str, *, limit: int, after: str | None) -> Sequence[Batch]:
        """Returns the tenant's batches, newest first, those behind `after`."""
        ...

    async def cancel(self, tenant: str, job_id: str) -> Batch | None:
        """Asks to stop the tenant's batch and returns it as it is then."""
        ...


class BatchWork(Protocol):
    """What the worker writes of a batch. A write is durable when it returns."""

    async def start(self, tenant: str, job_id: str) -> Batch | None:
        """Says that the work begins, perhaps again, and returns the batch; one that has ended stays as it is."""
        ...

    async def validated(self, job_id: str, num_lines: int) -> None:
        """Says that the lines are being asked."""
        ...

    async def done(self, job_id: str) -> set[int]:
        """The lines that have a result."""
        ...

    async def keep(self, job_id: str, results: Sequence[Result]) -> bool:
        """Keeps the first result of each line, for ever; False where the batch is to stop."""
        ...

    async def results(self, job_id: str, *, is_answered: bool, after: int, limit: int) -> Sequence[Result]:
        """Results of either kind in the order of the lines, behind a line."""
        ...

    async def finalizing(self, job_id: str) -> None:
        """Says that the files of results are being written."""
        ...

    async def end(self, job_id: str, ending: Ending) -> None:
        """Ends the batch, adds its files and drops the results that are in them, in one transaction."""
        ...


class Batches:
    """Takes orders for batches and tells of them."""

    def __init__(
        self,
        store: BatchStore,
        uploads: UploadStore,
        batch_message: Callable[[Batch], Message],
        *,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._store = store
        self._uploads = uploads
        self._batch_message = batch_message
        self._now = now

    async def submit(
        self, tenant: str, key_id: str, *, endpoint: str, input_file: str, metadata: Mapping[str, str]
    ) -> Batch:
        """Orders a batch; raises as BatchStore.submit does, INVALID_ARGUMENT for a file of another purpose."""
        upload = await self._uploads.get(tenant, input_file)
        if upload is None:
            raise file_not_found(input_file, "input_file_id")
        check_purpose(upload, Purpose.BATCH, "input_file_id", "a batch needs one with the purpose 'batch'")
        job_id = f"batch_{creation.new_id('job')}"
        if creation.may_exist() and (existing := await self._store.get(tenant, job_id)):
            return existing
        created_unix_ms = int(self._now() * 1000)
        batch = Batch(
            job=Job(job_id, tenant, TYPE, created_unix_ms, file_id=upload.upload_id, key_id=key_id),
            endpoint=endpoint,
            input_upload_id=upload.upload_id,
            expires_unix_ms=created_unix_ms + WINDOW_S * 1000,
            metadata=metadata,
        )
        await self._store.submit(batch, self._batch_message(batch))
        return batch

    async def get(self, tenant: str, job_id: str) -> Batch:
        """Returns the tenant's batch; raises NOT_FOUND."""
        return _found(await self._store.get(tenant, job_id))

    async def newest(self, tenant: str, *, limit: int, after: str | None) -> Sequence[Batch]:
        """Returns the tenant's batches, newest first."""
        return await self._store.newest(tenant, limit=limit, after=after)

    async def cancel(self, tenant: str, job_id: str) -> Batch:
        """Asks to stop a batch; raises NOT_FOUND, and CONFLICT for one that has ended otherwise."""
        batch = _found(await self._store.cancel(tenant, job_id))
        if batch.job.status in (JobStatus.SUCCEEDED, JobStatus.FAILED):
            raise PlatformError(Code.CONFLICT, f"the batch is {batch.status} already", reason="job_finished")
        return batch


def _found(batch: Batch | None) -> Batch:
    if batch is None:
        raise PlatformError(Code.NOT_FOUND, "no such batch", param="batch_id", reason="batch_not_found")
    return batch
