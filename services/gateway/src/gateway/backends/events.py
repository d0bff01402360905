"""What the gateway publishes through its outbox, as protobuf."""

import json
import uuid

from pressroom.common.v1 import common_pb2
from pressroom.events.v1 import events_pb2

from chassis import context, telemetry
from contracts import subjects
from gateway.core.batches import Batch
from gateway.core.documents import Document, FileRow
from gateway.core.evaluations import Evaluation
from gateway.core.finetuning import Finetune
from gateway.core.outbox import Message
from gateway.core.ports import RequestRecord
from gateway.core.uploads import Upload

# The bus refuses messages over 1 MiB, and a profile needs no more of a text than this.
_MAX_TEXT_CHARS = 65_536


def request_completed(record: RequestRecord) -> Message:
    """Makes the event of a request that has ended; long texts are cut."""
    event = events_pb2.RequestCompleted(
        request_id=record.request_id,
        trace_id=record.trace_id,
        tenant=record.tenant,
        key_id=record.key_id,
        model=record.model,
        route=record.route,
        usage=common_pb2.Usage(
            prompt_tokens=record.prompt_tokens,
            completion_tokens=record.completion_tokens,
            cached_tokens=record.cached_tokens,
        ),
        finish_reason=record.finish_reason,
        http_status=record.http_status,
        stream=record.stream,
        started_unix_ms=record.started_unix_ms,
        duration_s=record.duration_s,
        ttft_s=record.ttft_s,
        tpot_s=record.tpot_s,
        grounded=record.grounded,
        prompt_text=record.prompt_text[:_MAX_TEXT_CHARS],
        completion_text=record.completion_text[:_MAX_TEXT_CHARS],
        error_code=record.error_code,
    )
    # Not the request's id: a client may choose that, and two requests may share it.
    message_id = f"request-{uuid.uuid4().hex}"
    return Message(
        subjects.EVENTS_REQUEST_COMPLETED, message_id, event.SerializeToString(), record.traceparent, record.request_id
    )


def ingest_job(document: Document, file: FileRow) -> Message:
    """Makes the order to index a file."""
    description = document.description
    order = events_pb2.IngestJob(
        job_id=document.job_id,
        tenant=document.tenant,
        document_id=document.document_id,
        file_id=file.file_id,
        content_type=description.content_type,
        title=description.title,
        external_id=description.external_id,
        collection=description.collection,
        metadata_json=json.dumps(dict(description.metadata)),
        filename=description.filename,
        size_bytes=file.size_bytes,
        file_sha256=file.sha256,
    )
    return _order(subjects.JOBS_INGEST, document.job_id, order.SerializeToString())


def train_job(finetune: Finetune, upload: Upload) -> Message:
    """Makes the order to finetune a model; hyperparameters that the client left to us are absent."""
    order = events_pb2.TrainJob(
        job_id=finetune.job.job_id,
        tenant=finetune.job.tenant,
        model=finetune.base,
        training_file_id=upload.upload_id,
        training_file_sha256=upload.row.sha256,
        # What follows the colon of the model's id, so that the trainer need not know what becomes of no suffix.
        suffix=finetune.suffix or finetune.job.job_id,
        hyperparameters_json=json.dumps(finetune.hyperparameters.given()),
        seed=finetune.seed,
    )
    return _order(subjects.JOBS_TRAIN, finetune.job.job_id, order.SerializeToString())


def evaluate_job(evaluation: Evaluation) -> Message:
    """Makes the order to evaluate a model."""
    order = events_pb2.EvaluateJob(
        job_id=evaluation.job.job_id, tenant=evaluation.job.tenant, model=evaluation.model, task=evaluation.task
    )
    if evaluation.upload is not None:
        order.task_file_id = evaluation.upload.upload_id
        order.task_file_sha256 = evaluation.upload.row.sha256
    return _order(subjects.JOBS_EVALUATE, evaluation.job.job_id, order.SerializeToString())


def batch_job(batch: Batch) -> Message:
    """Makes the order to run a batch."""
    job = batch.job
    order = events_pb2.BatchJob(
        job_id=job.job_id, tenant=job.tenant, file_id=batch.input_upload_id, endpoint=batch.endpoint
    )
    return _order(subjects.JOBS_BATCH, job.job_id, order.SerializeToString())


def _order(subject: str, job_id: str, payload: bytes) -> Message:
    # The job's id is the message's, so that publishing twice orders once.
    return Message(subject, job_id, payload, telemetry.traceparent(), context.current().request_id)
