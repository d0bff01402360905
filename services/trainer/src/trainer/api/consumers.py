"""The training worker: takes jobs from the work queue, one at a time, and tells how they end before it acks them."""

import asyncio
import hashlib
import json
import logging
from typing import Literal

from google.protobuf.message import DecodeError
from pressroom.events.v1 import events_pb2

from chassis import context, telemetry
from chassis.bus import Bus, Received
from chassis.errors import Code, PlatformError
from chassis.jobs import Cancellations, JobCancelled, Reporter, again, check_attempt, final_reason
from contracts.jobs import encode_progress
from trainer.api.job_metrics import JOBS, STEPS
from trainer.core.finetune import AlreadyEnded, Finetuner
from trainer.core.ports import Watcher
from trainer.core.runs import Adapter, RunStatus, TrainOrder, check_job_id

log = logging.getLogger(__name__)

DURABLE = "trainer-jobs"
_ENDINGS: dict[RunStatus, Literal["succeeded", "failed", "cancelled"]] = {
    RunStatus.SUCCEEDED: "succeeded",
    RunStatus.FAILED: "failed",
    RunStatus.CANCELLED: "cancelled",
}


class _JobWatcher(Watcher):
    """Joins one attempt to the job's reports and cancellation."""

    def __init__(self, job_id: str, reporter: Reporter, cancellations: Cancellations) -> None:
        self._job_id = job_id
        self._reporter = reporter
        self._cancellations = cancellations
        self._done = 0

    def check(self) -> None:
        self._cancellations.check(self._job_id)

    async def report(self, done: int, total: int) -> None:
        if done == self._done + 1:  # not the steps of an earlier attempt
            STEPS.inc()
        self._done = done
        await self._reporter.running(done, total)


class TrainWorker:
    """Handles deliveries of TrainJob. Each delivery goes on where the one before it was cut off."""

    def __init__(self, bus: Bus, finetuner: Finetuner, cancellations: Cancellations) -> None:
        self._bus = bus
        self._finetuner = finetuner
        self._cancellations = cancellations

    async def handle(self, received: Received) -> None:
        """Returns when the job has ended, well or not; raises a retryable error where it is to be delivered again."""
        order = _order(received.payload)
        request = context.RequestContext(context.current().request_id, order.tenant)
        with context.use(request), telemetry.tracer().start_as_current_span("trainer.finetune") as span:
            span.set_attribute("job_id", order.job_id)
            await self._handle(order, received.num_delivered)

    async def _handle(self, order: TrainOrder, delivery: int) -> None:
        reporter = Reporter(self._bus, encode_progress, order.job_id, delivery)
        result_json, error = "", ""
        try:
            check_attempt(delivery)
            self._cancellations.check(order.job_id)
            await reporter.running()
            watcher = _JobWatcher(order.job_id, reporter, self._cancellations)
            adapter = await self._finetuner.run(order, watcher)
            status, result_json = RunStatus.SUCCEEDED, json.dumps(_result(adapter))
        except JobCancelled:
            status = RunStatus.CANCELLED
        except AlreadyEnded as ended:
            status, error = ended.status, ended.error
        except asyncio.CancelledError:
            await self._finetuner.leave()
            raise
        except Exception as problem:
            why = final_reason(problem, delivery, "trainer")
            if why is None:
                await self._finetuner.leave()
                raise again(problem) from problem
            if not isinstance(problem, PlatformError):
                log.exception("finetune failed unexpectedly", extra={"job_id": order.job_id})
            status, error = RunStatus.FAILED, why
        await self._finetuner.finish(order, status, error)
        await reporter.ended(_ENDINGS[status], error=error, result_json=result_json)
        JOBS.labels(status.value).inc()
        log.info("finetune ended", extra={"job_id": order.job_id, "status": status.value, "error": error})
        self._cancellations.forget(order.job_id)


def _result(adapter: Adapter) -> dict[str, object]:
    return {
        "fine_tuned_model": adapter.id,
        "trained_tokens": adapter.trained_tokens,
        "final_loss": adapter.final_loss,
        "adapter": {"path": adapter.path, "manifest_sha256": adapter.manifest_sha256},
    }


def _order(payload: bytes) -> TrainOrder:
    """Reads a job; one that cannot even be reported on becomes a dead letter."""
    try:
        job = events_pb2.TrainJob.FromString(payload)
    except DecodeError as error:
        raise PlatformError(Code.INVALID_ARGUMENT, "a training job could not be read") from error
    check_job_id(job.job_id)
    derived = int.from_bytes(hashlib.sha256(job.job_id.encode()).digest()[:4], "big")
    return TrainOrder(
        job_id=job.job_id,
        tenant=job.tenant,
        model=job.model,
        file_id=job.training_file_id,
        file_sha256=job.training_file_sha256,
        suffix=job.suffix,
        hyperparameters_json=job.hyperparameters_json,
        seed=job.seed if job.HasField("seed") else derived,
    )
