"""The ingest worker: takes jobs from the work queue, runs them, and tells how they end before it acks them."""

import json
import logging
from typing import Protocol

from google.protobuf.message import DecodeError
from pressroom.events.v1 import events_pb2

from chassis import context, telemetry
from chassis.bus import Bus, Received
from chassis.errors import Code, PlatformError
from chassis.jobs import MAX_DELIVER, Cancellations, JobCancelled, Reporter, again, check_attempt, final_reason
from chassis.patience import is_transient, patiently
from contracts.jobs import encode_progress
from contracts.subjects import EVENTS_DOCUMENT_INDEXED
from retriever.core.documents import check_id, check_tenant
from retriever.core.indexing import Watcher
from retriever.core.ingest import Ingestor, IngestOrder, IngestResult

log = logging.getLogger(__name__)

DURABLE = "retriever-ingest"


class Files(Protocol):
    """Where uploads are read from."""

    async def read(self, file_id: str, sha256: str) -> bytes:
        """Returns the bytes of a file of the current tenant."""
        ...


class _JobWatcher(Watcher):
    """Joins one attempt to the job's reports and cancellation."""

    def __init__(self, job_id: str, reporter: Reporter, cancellations: Cancellations) -> None:
        self._job_id = job_id
        self._reporter = reporter
        self._cancellations = cancellations

    def check(self) -> None:
        self._cancellations.check(self._job_id)

    async def report(self, done: int, total: int) -> None:
        await self._reporter.running(done, total)


class IngestWorker:
    """Handles deliveries of IngestJob. Each delivery runs the whole job again and repeats nothing that is done."""

    def __init__(
        self, bus: Bus, files: Files, ingestor: Ingestor, cancellations: Cancellations, *, patience_s: float
    ) -> None:
        self._bus = bus
        self._files = files
        self._ingestor = ingestor
        self._cancellations = cancellations
        self._patience_s = patience_s

    async def handle(self, received: Received) -> None:
        """Returns when the job has ended, well or not; raises a retryable error where it is to be delivered again."""
        job = _parsed(received.payload)
        request = context.RequestContext(context.current().request_id, job.tenant)
        with context.use(request), telemetry.tracer().start_as_current_span("retriever.ingest") as span:
            span.set_attribute("job_id", job.job_id)
            await self._handle(job, received.num_delivered)

    async def _handle(self, job: events_pb2.IngestJob, delivery: int) -> None:
        reporter = Reporter(self._bus, encode_progress, job.job_id, delivery)
        try:
            check_attempt(delivery)
            result = await self._run(job, reporter)
        except JobCancelled:
            await self._undo(job, is_last=delivery >= MAX_DELIVER)
            await reporter.ended("cancelled")
            log.info("ingest cancelled", extra={"job_id": job.job_id})
        except Exception as error:
            why = final_reason(error, delivery, "retriever")
            if why is None:
                raise again(error) from error
            if not isinstance(error, PlatformError):
                log.exception("ingest failed unexpectedly", extra={"job_id": job.job_id})
            await self._undo(job, is_last=delivery >= MAX_DELIVER)
            await reporter.ended("failed", error=why)
            log.warning("ingest failed", extra={"job_id": job.job_id, "error": why})
        else:
            await self._succeed(job, result, reporter)
        self._cancellations.forget(job.job_id)

    async def _run(self, job: events_pb2.IngestJob, reporter: Reporter) -> IngestResult:
        watcher = _JobWatcher(job.job_id, reporter, self._cancellations)
        watcher.check()
        await reporter.running()
        data = await patiently(
            lambda: self._files.read(job.file_id, job.file_sha256),
            budget_s=self._patience_s,
            before_each=watcher.check,
        )
        order = IngestOrder(
            job_id=job.job_id,
            tenant=job.tenant,
            document_id=job.document_id,
            content_type=job.content_type,
            title=job.title,
            external_id=job.external_id,
            collection=job.collection,
            metadata_json=job.metadata_json,
            filename=job.filename,
        )
        return await self._ingestor.run(order, data, watcher)

    async def _succeed(self, job: events_pb2.IngestJob, result: IngestResult, reporter: Reporter) -> None:
        for document in result.documents:
            event = events_pb2.DocumentIndexed(
                document_id=document.document_id,
                tenant=job.tenant,
                collection=document.collection,
                external_id=document.external_id,
                num_chunks=document.num_chunks,
                content_sha256=document.content_sha256,
                job_id=job.job_id,
            )
            await self._bus.publish(
                EVENTS_DOCUMENT_INDEXED,
                event.SerializeToString(),
                message_id=f"{job.job_id}.{document.document_id}",
            )
        summary = {
            "document_id": job.document_id,
            "num_documents": len(result.documents),
            "num_chunks": result.num_chunks,
            "num_skipped": result.num_skipped,
        }
        await reporter.ended("succeeded", result_json=json.dumps(summary))
        log.info("ingest succeeded", extra={"job_id": job.job_id, **summary})

    async def _undo(self, job: events_pb2.IngestJob, *, is_last: bool) -> None:
        """Removes what the job wrote; on the last delivery its end is told even where that cannot be done."""
        try:
            check_id(job.document_id)
            await patiently(lambda: self._ingestor.undo(job.tenant, job.job_id), budget_s=self._patience_s)
        except PlatformError as error:
            if is_transient(error) and not is_last:
                raise again(error) from error
            log.error("what a job wrote was left behind", extra={"job_id": job.job_id, "error": repr(error)})


def _parsed(payload: bytes) -> events_pb2.IngestJob:
    """Reads a job; one that cannot even be reported on becomes a dead letter."""
    try:
        job = events_pb2.IngestJob.FromString(payload)
    except DecodeError as error:
        raise PlatformError(Code.INVALID_ARGUMENT, "an ingest job could not be read") from error
    check_id(job.job_id, "job_id")
    check_tenant(job.tenant)
    return job
