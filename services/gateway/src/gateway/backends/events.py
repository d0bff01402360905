"""What the gateway publishes through its outbox, as protobuf."""

import json
import uuid

from pressroom.common.v1 import common_pb2
from pressroom.events.v1 import events_pb2

from chassis import context, telemetry
from contracts import subjects
from gateway.core.documents import Document, FileRow
from gateway.core.outbox import Message
from gateway.core.ports import RequestRecord

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
    """Makes the order to index a file; the job's id is the message's, so that publishing twice orders once."""
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
    return Message(
        subjects.JOBS_INGEST,
        document.job_id,
        order.SerializeToString(),
        telemetry.traceparent(),
        context.current().request_id,
    )
