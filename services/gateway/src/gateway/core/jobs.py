"""Jobs: long work that a service does over the bus, and how reports of it change its state.

States go from queued over running to succeeded, failed or cancelled, and from those three nowhere.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Protocol


class JobStatus(StrEnum):
    """State of a job."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_final(self) -> bool:
        """Nothing follows this state."""
        return self not in (JobStatus.QUEUED, JobStatus.RUNNING)


@dataclass(frozen=True, slots=True)
class Job:
    """One job. document_id names what an ingest job is about, file_id the file that any job reads."""

    job_id: str
    tenant: str
    type: str  # "ingest", "batch", "train" or "evaluate"
    created_unix_ms: int
    status: JobStatus = JobStatus.QUEUED
    done: int = 0
    total: int = 0  # 0 while unknown
    error: str | None = None
    result: Mapping[str, object] | None = None
    cancel_requested: bool = False
    document_id: str | None = None
    file_id: str | None = None
    reported_unix_ms: int = 0  # time and sequence of the last report that counted
    reported_sequence: int = 0
    key_id: str = ""  # of the key that ordered it; empty where that is not known
    started_unix_ms: int | None = None  # when we first heard that a worker has it, and that it ended: by our own clock
    finished_unix_ms: int | None = None


@dataclass(frozen=True, slots=True)
class Report:
    """What a worker says of a job."""

    job_id: str
    status: JobStatus
    at_unix_ms: int
    sequence: int
    done: int = 0
    total: int = 0
    error: str | None = None
    result: Mapping[str, object] | None = None


def advanced(job: Job, report: Report) -> Job:
    """Returns the job after a report; the same object when the report is late, repeated or comes after the end.

    The sequence begins anew with each attempt, so the time is compared first. A final report always counts, since a
    worker whose clock is behind must not leave its job running for ever.
    """
    if job.status.is_final:
        return job
    is_newer = (report.at_unix_ms, report.sequence) > (job.reported_unix_ms, job.reported_sequence)
    if not is_newer and not report.status.is_final:
        return job
    # A worker that was told to stop may end by failing, for example because its file is refused to it.
    was_stopped = job.cancel_requested and report.status is JobStatus.FAILED
    return replace(
        job,
        status=JobStatus.CANCELLED if was_stopped else report.status,
        done=report.done,
        total=report.total or job.total,
        error=report.error,
        result=report.result,
        reported_unix_ms=max(job.reported_unix_ms, report.at_unix_ms),
        reported_sequence=report.sequence,
    )


def cancelled(job: Job, why: str | None = None) -> Job:
    """Returns the job after somebody asked to stop it: at once where no worker has it, else when the worker says so."""
    if job.status is JobStatus.QUEUED:
        return replace(job, status=JobStatus.CANCELLED, error=why, cancel_requested=True)
    if job.status is JobStatus.RUNNING:
        return replace(job, cancel_requested=True)
    return job


def stamped(before: Job, after: Job, now_unix_ms: int) -> Job:
    """Returns `after` with the times of what has just changed: a worker's clock may be wrong, so ours is read."""
    if before.status is after.status:
        return after
    is_new = before.started_unix_ms is None and not (before.status is JobStatus.QUEUED and after.cancel_requested)
    return replace(
        after,
        started_unix_ms=now_unix_ms if is_new else before.started_unix_ms,
        finished_unix_ms=now_unix_ms if after.status.is_final else None,
    )


@dataclass(frozen=True, slots=True)
class Applied:
    """What a report led to.

    must_stop: jobs whose worker should be told (again) to stop, because they were cancelled or superseded.
    freed_files: files that nothing needs any more.
    """

    must_stop: Sequence[str] = ()
    freed_files: Sequence[str] = ()


class JobStore(Protocol):
    """Where jobs are kept. A write is durable when it returns."""

    async def get(self, tenant: str, job_id: str) -> Job | None:
        """Returns the tenant's job."""
        ...

    async def newest(self, tenant: str, *, limit: int, after: str | None) -> Sequence[Job]:
        """Returns the tenant's jobs, newest first, those behind `after`."""
        ...

    async def apply(self, report: Report) -> Applied:
        """Applies a report; an unknown job is ignored."""
        ...

    async def cancel(self, tenant: str, job_id: str) -> Job | None:
        """Asks to stop the tenant's job and returns it; what was not yet published of it never is."""
        ...


class Canceller(Protocol):
    """Tells the workers to stop."""

    async def cancel(self, work_id: str, reason: str) -> None:
        """Says that a job is to be stopped; never raises, since a lost call is repeated when the job reports."""
        ...
