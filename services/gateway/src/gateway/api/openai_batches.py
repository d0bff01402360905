"""The routes of /v1/batches: OpenAI's paths and shapes."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from pydantic import Field

from gateway.api.identity import principal_of
from gateway.api.json_body import Body, read_json
from gateway.api.openai_files import page_shape
from gateway.api.openai_finetuning import Id, MetadataKey, MetadataValue
from gateway.api.openapi import documented
from gateway.api.openapi_schemas import ANY_OBJECT, COUNT, TEXT, TIME, array, nullable, one_of, page, record
from gateway.core.batch_lines import Fault
from gateway.core.batches import Batch, Batches
from gateway.core.jobs import Canceller

PATH = "/v1/batches"


class BatchBody(Body):
    """The request."""

    input_file_id: Id
    endpoint: Literal[
        "/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/messages", "/v1/rerank", "/v1/responses"
    ]
    completion_window: Literal["24h"]
    metadata: Annotated[dict[MetadataKey, MetadataValue], Field(max_length=16)] | None = None
    output_expires_after: None = Field(None, description="Files do not expire: delete them.")


_FAULT = record({"code": TEXT, "message": TEXT, "param": nullable(TEXT), "line": nullable(COUNT)})
_BATCH = record(
    {
        "id": TEXT,
        "object": one_of("batch"),
        "endpoint": TEXT,
        "errors": nullable(record({"object": one_of("list"), "data": array(_FAULT)})),
        "input_file_id": TEXT,
        "completion_window": one_of("24h"),
        "status": one_of(
            "validating", "in_progress", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled"
        ),
        "output_file_id": nullable(TEXT),
        "error_file_id": nullable(TEXT),
        "created_at": TIME,
        "expires_at": TIME,
        "in_progress_at": nullable(TIME),
        "finalizing_at": nullable(TIME),
        "completed_at": nullable(TIME),
        "failed_at": nullable(TIME),
        "expired_at": nullable(TIME),
        "cancelling_at": nullable(TIME),
        "cancelled_at": nullable(TIME),
        "request_counts": record({"total": COUNT, "completed": COUNT, "failed": COUNT}),
        "metadata": nullable(ANY_OBJECT),
    }
)


def batches_router(batches: Batches, canceller: Canceller) -> APIRouter:
    """Makes the routes."""
    router = APIRouter()

    @router.post(PATH, response_model=None)
    @documented(_BATCH, body=BatchBody)
    async def create_batch(request: Request) -> dict[str, Any]:
        body = await read_json(request, BatchBody)
        principal = principal_of(request)
        batch = await batches.submit(
            principal.tenant,
            principal.key_id,
            endpoint=body.endpoint,
            input_file=body.input_file_id,
            metadata=body.metadata or {},
        )
        return batch_shape(batch)

    @router.get(PATH, response_model=None)
    @documented(page(_BATCH, with_ends=True))
    async def list_batches(
        request: Request,
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
        after: Annotated[str | None, Query(max_length=100)] = None,
    ) -> dict[str, Any]:
        found = await batches.newest(principal_of(request).tenant, limit=limit + 1, after=after)
        return page_shape([batch_shape(one) for one in found[:limit]], has_more=len(found) > limit)

    @router.get(PATH + "/{batch_id}", response_model=None)
    @documented(_BATCH)
    async def get_batch(request: Request, batch_id: str) -> dict[str, Any]:
        return batch_shape(await batches.get(principal_of(request).tenant, batch_id))

    @router.post(PATH + "/{batch_id}/cancel", response_model=None)
    @documented(_BATCH)
    async def cancel_batch(request: Request, batch_id: str) -> dict[str, Any]:
        batch = await batches.cancel(principal_of(request).tenant, batch_id)
        await canceller.cancel(batch.job.job_id, "cancelled by the client")
        return batch_shape(batch)

    return router


def batch_shape(batch: Batch) -> dict[str, Any]:
    """OpenAI's batch object."""
    job = batch.job

    def ended(status: str) -> int | None:
        return _seconds(job.finished_unix_ms) if batch.status == status else None

    return {
        "id": job.job_id,
        "object": "batch",
        "endpoint": batch.endpoint,
        "errors": _errors(batch),
        "input_file_id": batch.input_upload_id,
        "completion_window": "24h",
        "status": batch.status,
        "output_file_id": batch.output_upload_id,
        "error_file_id": batch.error_upload_id,
        "created_at": _seconds(job.created_unix_ms),
        "in_progress_at": _seconds(batch.in_progress_unix_ms),
        "expires_at": _seconds(batch.expires_unix_ms),
        "finalizing_at": _seconds(batch.finalizing_unix_ms),
        "completed_at": ended("completed"),
        "failed_at": ended("failed"),
        "expired_at": ended("expired"),
        "cancelling_at": _seconds(batch.cancelling_unix_ms),
        "cancelled_at": ended("cancelled"),
        "request_counts": {"total": job.total, "completed": batch.num_completed, "failed": batch.num_failed},
        "metadata": dict(batch.metadata) or None,
    }


def _seconds(unix_ms: int | None) -> int | None:
    return None if unix_ms is None else unix_ms // 1000


def _errors(batch: Batch) -> dict[str, Any] | None:
    if batch.status != "failed":
        return None
    faults: Sequence[Fault] = batch.faults or (Fault("batch_failed", batch.job.error or "the batch failed"),)
    data = [{"code": one.code, "message": one.message, "param": one.param, "line": one.line} for one in faults]
    return {"object": "list", "data": data}
