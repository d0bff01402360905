"""The evaluation worker: takes jobs from the work queue, runs them, and tells how they end before it acks them."""

import json
import logging
import re

from google.protobuf.message import DecodeError
from pressroom.events.v1 import events_pb2

from chassis import context, telemetry
from chassis.bus import Bus, Received
from chassis.errors import Code, PlatformError
from chassis.jobs import Cancellations, JobCancelled, Reporter, again, check_attempt, final_reason
from contracts.jobs import encode_progress
from evaluator.core.evaluation import Evaluator, Order
from evaluator.core.results import Result

log = logging.getLogger(__name__)

DURABLE = "evaluator-jobs"
_ID = re.compile(r"[A-Za-z0-9_-]{1,128}")  # it becomes the name of a file


class _JobWatcher:
    """Joins one attempt to the job's reports and cancellation."""

    def __init__(self, job_id: str, reporter: Reporter, cancellations: Cancellations) -> None:
        self._job_id = job_id
        self._reporter = reporter
        self._cancellations = cancellations

    def check(self) -> None:
        self._cancellations.check(self._job_id)

    async def report(self, done: int, total: int) -> None:
        await self._reporter.running(done, total)


class EvaluateWorker:
    """Handles deliveries of EvaluateJob. Each delivery runs the job again and repeats nothing that is done."""

    def __init__(self, bus: Bus, evaluator: Evaluator, cancellations: Cancellations) -> None:
        self._bus = bus
        self._evaluator = evaluator
        self._cancellations = cancellations

    async def handle(self, received: Received) -> None:
        """Returns when the job has ended, well or not; raises a retryable error where it is to be delivered again."""
        job = _parsed(received.payload)
        request = context.RequestContext(context.current().request_id, job.tenant)
        with context.use(request), telemetry.tracer().start_as_current_span("evaluator.evaluate") as span:
            span.set_attribute("job_id", job.job_id)
            await self._handle(job, received.num_delivered)

    async def _handle(self, job: events_pb2.EvaluateJob, delivery: int) -> None:
        reporter = Reporter(self._bus, encode_progress, job.job_id, delivery)
        try:
            check_attempt(delivery)
            result = await self._run(job, reporter)
        except JobCancelled:
            await self._evaluator.abandon(job.job_id)
            await reporter.ended("cancelled")
            log.info("evaluation cancelled", extra={"job_id": job.job_id})
        except Exception as error:
            why = final_reason(error, delivery, "evaluator")
            if why is None:
                raise again(error) from error
            if not isinstance(error, PlatformError):
                log.exception("evaluation failed unexpectedly", extra={"job_id": job.job_id})
            await self._evaluator.abandon(job.job_id)
            await reporter.ended("failed", error=why)
            log.warning("evaluation failed", extra={"job_id": job.job_id, "error": why})
        else:
            await reporter.ended("succeeded", result_json=json.dumps(result.as_json()))
            log.info("evaluation succeeded", extra={"job_id": job.job_id, "model": job.model, "task": result.task})
        self._cancellations.forget(job.job_id)

    async def _run(self, job: events_pb2.EvaluateJob, reporter: Reporter) -> Result:
        watcher = _JobWatcher(job.job_id, reporter, self._cancellations)
        watcher.check()
        await reporter.running()
        order = Order(
            job_id=job.job_id,
            tenant=job.tenant,
            model=job.model,
            task=job.task,
            task_file_id=job.task_file_id,
            task_file_sha256=job.task_file_sha256,
        )
        try:
            return await self._cancellations.run(job.job_id, self._evaluator.run(order, watcher))
        except PlatformError as error:
            if error.reason == "job_cancelled":  # the gateway knows, and the call to stop was missed
                raise JobCancelled from error
            raise


def _parsed(payload: bytes) -> events_pb2.EvaluateJob:
    """Reads a job; one that cannot even be reported on becomes a dead letter."""
    try:
        job = events_pb2.EvaluateJob.FromString(payload)
    except DecodeError as error:
        raise PlatformError(Code.INVALID_ARGUMENT, "an evaluation job could not be read") from error
    if not _ID.fullmatch(job.job_id):
        raise PlatformError(Code.INVALID_ARGUMENT, "an evaluation job has no id that can be used", param="job_id")
    return job
