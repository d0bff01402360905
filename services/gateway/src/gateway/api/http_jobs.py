"""The routes of jobs."""

from typing import Annotated, Any

from fastapi import APIRouter, Query, Request

from chassis.errors import Code, PlatformError
from gateway.api.identity import principal_of
from gateway.api.openapi import documented
from gateway.api.openapi_schemas import ANY_OBJECT, COUNT, TEXT, nullable, one_of, page, record
from gateway.core.jobs import Canceller, Job, JobStatus, JobStore

JOB = record(
    {
        "id": TEXT,
        "object": one_of("job"),
        "type": TEXT,
        "status": one_of(*JobStatus),
        "progress": record({"done": COUNT, "total": COUNT}),
        "error": nullable(TEXT),
        "result": nullable(ANY_OBJECT),
    }
)


def jobs_router(jobs: JobStore, canceller: Canceller) -> APIRouter:
    """Makes GET /v1/jobs, GET /v1/jobs/{id} and POST /v1/jobs/{id}/cancel."""
    router = APIRouter()

    @router.get("/v1/jobs", response_model=None)
    @documented(page(JOB))
    async def list_jobs(
        request: Request,
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
        after: Annotated[str | None, Query(max_length=100)] = None,
    ) -> dict[str, Any]:
        found = await jobs.newest(principal_of(request).tenant, limit=limit + 1, after=after)
        return {"object": "list", "data": [job_shape(job) for job in found[:limit]], "has_more": len(found) > limit}

    @router.get("/v1/jobs/{job_id}", response_model=None)
    @documented(JOB)
    async def get_job(request: Request, job_id: str) -> dict[str, Any]:
        job = await jobs.get(principal_of(request).tenant, job_id)
        if job is None:
            raise _unknown()
        return job_shape(job)

    @router.post("/v1/jobs/{job_id}/cancel", response_model=None)
    @documented(JOB)
    async def cancel_job(request: Request, job_id: str) -> dict[str, Any]:
        return job_shape(await cancel(jobs, canceller, principal_of(request).tenant, job_id))

    return router


async def cancel(jobs: JobStore, canceller: Canceller, tenant: str, job_id: str) -> Job:
    """Asks to stop the tenant's job; raises NOT_FOUND, and CONFLICT for one that has succeeded or failed."""
    job = await jobs.cancel(tenant, job_id)
    if job is None:
        raise _unknown()
    if job.status in (JobStatus.SUCCEEDED, JobStatus.FAILED):
        raise PlatformError(Code.CONFLICT, f"the job has {job.status} already", reason="job_finished")
    # Broadcast even where it was queued: a worker may have taken it a moment ago.
    await canceller.cancel(job.job_id, "cancelled by the client")
    return job


def job_shape(job: Job) -> dict[str, Any]:
    """The job as clients see it."""
    return {
        "id": job.job_id,
        "object": "job",
        "type": job.type,
        "status": job.status.value,
        "progress": {"done": job.done, "total": job.total},
        "error": job.error,
        "result": dict(job.result) if job.result is not None else None,
    }


def _unknown() -> PlatformError:
    return PlatformError(Code.NOT_FOUND, "no such job", param="job_id")
