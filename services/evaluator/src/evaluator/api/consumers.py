"""Takes evaluation jobs from the work queue.

The work itself is not built yet: every job is answered with FAILED, so that who waits for it learns so at once.
"""

import logging
import time

from google.protobuf.message import DecodeError
from pressroom.common.v1 import common_pb2
from pressroom.events.v1 import events_pb2

from chassis.bus import Bus, Received
from chassis.errors import Code, PlatformError
from contracts.subjects import progress

log = logging.getLogger(__name__)

DURABLE = "evaluator-jobs"
NOT_AVAILABLE = "evaluation is not available yet"


class EvaluateWorker:
    """Handles deliveries of EvaluateJob."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus

    async def handle(self, received: Received) -> None:
        """Returns, and so acks, once the answer is stored; a job that cannot be read is a dead letter."""
        job_id = _job_id(received.payload)
        message = events_pb2.JobProgress(
            job_id=job_id,
            status=common_pb2.JOB_STATUS_FAILED,
            error=NOT_AVAILABLE,
            sequence=received.num_delivered,
            at_unix_ms=int(time.time() * 1000),
        )
        # One id for every delivery of the job, so that the answer is stored once.
        await self._bus.publish(progress(job_id), message.SerializeToString(), message_id=f"{job_id}.not-available")
        log.info("job refused", extra={"job_id": job_id})


def _job_id(payload: bytes) -> str:
    try:
        job = events_pb2.EvaluateJob.FromString(payload)
    except DecodeError as error:
        raise PlatformError(Code.INVALID_ARGUMENT, "an evaluation job could not be read") from error
    if not job.job_id:
        raise PlatformError(Code.INVALID_ARGUMENT, "an evaluation job has no id", param="job_id")
    return job.job_id
