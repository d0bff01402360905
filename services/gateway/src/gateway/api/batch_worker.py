"""The batch worker: takes the gateway's own orders from the work queue and sees that each batch ends."""

import logging

from google.protobuf.message import DecodeError
from pressroom.events.v1 import events_pb2

from chassis import context
from chassis.bus import Bus, Received
from chassis.errors import Code, PlatformError
from chassis.jobs import (
    ACK_WAIT_S,
    BACKOFF_S,
    MAX_DELIVER_OF_BUS,
    Cancellations,
    JobCancelled,
    again,
    check_attempt,
    final_reason,
)
from contracts import subjects
from gateway.core.batch_run import BatchRunner
from gateway.core.batches import Batch, Ending
from gateway.core.jobs import JobStatus

log = logging.getLogger(__name__)

DURABLE = "gateway-batches"
_AT_ONCE = 8  # batches; their lines share the places in flight


class BatchWorker:
    """Handles deliveries of BatchJob. Each delivery goes on where the one before it was cut off."""

    def __init__(self, bus: Bus, runner: BatchRunner, cancellations: Cancellations) -> None:
        self._bus = bus
        self._runner = runner
        self._cancellations = cancellations

    async def consume(self) -> None:
        """Runs until cancelled."""
        await self._bus.consume(
            subjects.JOBS_BATCH,
            durable=DURABLE,
            handler=self.handle,
            max_deliver=MAX_DELIVER_OF_BUS,
            ack_wait_s=ACK_WAIT_S,
            concurrency=_AT_ONCE,
            backoff_s=BACKOFF_S,
        )

    async def listen(self) -> None:
        """Hears which batches are to stop, until cancelled."""
        await self._bus.listen(subjects.CONTROL_REQUEST_CANCEL, self._cancellations.handle)

    async def handle(self, received: Received) -> None:
        """Returns when the batch has ended, well or not; raises a retryable error where it is to be delivered again."""
        job = _parsed(received.payload)
        with context.use(context.RequestContext(context.current().request_id, job.tenant)):
            batch = await self._runner.start(job.tenant, job.job_id)
            if batch is not None:
                ending = await self._ending(batch, received.num_delivered)
                await self._runner.finish(batch, ending)
                log.info("batch ended", extra={"job_id": job.job_id, "status": ending.status.value})
        self._cancellations.forget(job.job_id)

    async def _ending(self, batch: Batch, delivery: int) -> Ending:
        job_id = batch.job.job_id
        try:
            check_attempt(delivery)
            if batch.job.cancel_requested:
                return Ending(JobStatus.CANCELLED)
            return await self._cancellations.run(job_id, self._runner.answer(batch))
        except JobCancelled:
            return Ending(JobStatus.CANCELLED)
        except Exception as error:
            if isinstance(error, PlatformError) and error.reason == "job_cancelled":
                return Ending(JobStatus.CANCELLED)
            why = final_reason(error, delivery, "gateway")
            if why is None:
                raise again(error) from error
            if not isinstance(error, PlatformError):
                log.exception("batch failed unexpectedly", extra={"job_id": job_id})
            log.warning("batch failed", extra={"job_id": job_id, "error": why})
            return Ending(JobStatus.FAILED, why)


def _parsed(payload: bytes) -> events_pb2.BatchJob:
    """Reads a job; one that cannot even be reported on becomes a dead letter."""
    try:
        return events_pb2.BatchJob.FromString(payload)
    except DecodeError as error:
        raise PlatformError(Code.INVALID_ARGUMENT, "a batch job could not be read") from error
