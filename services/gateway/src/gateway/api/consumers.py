"""What the gateway hears on the bus: progress of jobs, jobs that no worker could do, changed keys."""

import json
import logging

from google.protobuf.message import DecodeError
from pressroom.common.v1 import common_pb2
from pressroom.events.v1 import events_pb2

from chassis.bus import DEAD_PREFIX, Bus, Received
from chassis.errors import Code, PlatformError
from contracts import subjects
from gateway.core.documents import FileStore
from gateway.core.jobs import Canceller, JobStatus, JobStore, Report
from gateway.core.keys import KeyRing

_log = logging.getLogger(__name__)

_JobMessage = (
    type[events_pb2.IngestJob] | type[events_pb2.BatchJob] | type[events_pb2.TrainJob] | type[events_pb2.EvaluateJob]
)
_STATUSES = {
    common_pb2.JOB_STATUS_QUEUED: JobStatus.QUEUED,
    common_pb2.JOB_STATUS_RUNNING: JobStatus.RUNNING,
    common_pb2.JOB_STATUS_SUCCEEDED: JobStatus.SUCCEEDED,
    common_pb2.JOB_STATUS_FAILED: JobStatus.FAILED,
    common_pb2.JOB_STATUS_CANCELLED: JobStatus.CANCELLED,
}
_JOB_MESSAGES: dict[str, _JobMessage] = {
    subjects.JOBS_INGEST: events_pb2.IngestJob,
    subjects.JOBS_BATCH: events_pb2.BatchJob,
    subjects.JOBS_TRAIN: events_pb2.TrainJob,
    subjects.JOBS_EVALUATE: events_pb2.EvaluateJob,
}
_DEAD_JOBS = f"{DEAD_PREFIX}{subjects.PREFIX}jobs.*"
_ATTEMPTS = 100  # the database may be away for minutes; a report is small and must not be lost over it


class JobConsumer:
    """Applies what workers say of jobs."""

    def __init__(self, bus: Bus, jobs: JobStore, files: FileStore, canceller: Canceller) -> None:
        self._bus = bus
        self._jobs = jobs
        self._files = files
        self._canceller = canceller

    async def consume_progress(self) -> None:
        """Runs until cancelled."""
        await self._bus.consume(
            subjects.PROGRESS_ALL, durable="gateway-progress", handler=self.on_progress, max_deliver=_ATTEMPTS
        )

    async def consume_dead_jobs(self) -> None:
        """Runs until cancelled."""
        await self._bus.consume(
            _DEAD_JOBS, durable="gateway-dead-jobs", handler=self.on_dead_job, max_deliver=_ATTEMPTS
        )

    async def on_progress(self, received: Received) -> None:
        """Applies a report; repeated and late ones change nothing."""
        await self._apply(report_from(received.payload))

    async def on_dead_job(self, received: Received) -> None:
        """Fails a job whose order became a dead letter: no worker will report on it any more."""
        message = _JOB_MESSAGES.get(received.subject.removeprefix(DEAD_PREFIX))
        if message is None:
            return
        try:
            job_id = message.FromString(received.payload).job_id
        except DecodeError as error:
            raise PlatformError(Code.INVALID_ARGUMENT, f"not a {message.DESCRIPTOR.name}: {error}") from None
        _log.warning("job became a dead letter", extra={"job_id": job_id})
        why = received.headers.get("Pressroom-Error") or "no worker could do it"
        await self._apply(Report(job_id, JobStatus.FAILED, at_unix_ms=0, sequence=0, error=why))

    async def _apply(self, report: Report) -> None:
        applied = await self._jobs.apply(report)
        for job_id in applied.must_stop:
            await self._canceller.cancel(job_id, "cancelled")
        await self._files.delete(applied.freed_files)


class RevocationListener:
    """Forgets keys and tenants that another worker changed."""

    def __init__(self, bus: Bus, keys: KeyRing) -> None:
        self._bus = bus
        self._keys = keys

    async def listen(self) -> None:
        """Runs until cancelled."""
        await self._bus.listen(subjects.CONTROL_KEYS_REVOKED, self.on_changed)

    async def on_changed(self, received: Received) -> None:
        """Forgets them at once."""
        message = events_pb2.KeysRevoked.FromString(received.payload)
        self._keys.forget(frozenset(message.key_ids), frozenset(message.tenants))


def report_from(payload: bytes) -> Report:
    """Reads a JobProgress; raises INVALID_ARGUMENT for what is none."""
    try:
        progress = events_pb2.JobProgress.FromString(payload)
        result = json.loads(progress.result_json) if progress.result_json else None
    except (DecodeError, ValueError) as error:
        raise PlatformError(Code.INVALID_ARGUMENT, f"not a JobProgress: {error}") from None
    status = _STATUSES.get(progress.status)
    if status is None or not progress.job_id or not isinstance(result, dict | None):
        raise PlatformError(Code.INVALID_ARGUMENT, "a JobProgress needs a job, a status and an object as result")
    return Report(
        job_id=progress.job_id,
        status=status,
        at_unix_ms=progress.at_unix_ms,
        sequence=progress.sequence,
        done=progress.done,
        total=progress.total,
        error=progress.error or None,
        result=result,
    )
