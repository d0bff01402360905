"""The routes of evaluations; what becomes of a job is told by /v1/jobs."""

from typing import Annotated, Any

from fastapi import APIRouter, Request
from pydantic import Field

from gateway.api.http_jobs import JOB, job_shape
from gateway.api.identity import principal_of
from gateway.api.json_body import Body, read_json
from gateway.api.openai_params import ModelName
from gateway.api.openapi import documented
from gateway.api.openapi_schemas import COUNT, TEXT, array, one_of, page, record
from gateway.core.catalog import Catalog
from gateway.core.evaluations import Evaluations, Task
from gateway.core.serving import Serving


class EvaluationBody(Body):
    """What to evaluate, on what: the name of a task, or the id of an uploaded file that holds one."""

    model: ModelName
    task: Annotated[str, Field(max_length=128, pattern=r"^[a-z0-9][a-z0-9._@-]*$")]


_TASK = record(
    {
        "id": TEXT,
        "object": one_of("evaluation.task"),
        "version": TEXT,
        "metrics": array(TEXT),
        "description": TEXT,
        "num_samples": COUNT,
    }
)


def evaluations_router(evaluations: Evaluations, catalog: Catalog) -> APIRouter:
    """Makes POST /v1/evaluations and GET /v1/evaluations/tasks."""
    router = APIRouter()

    @router.post("/v1/evaluations", status_code=202, response_model=None)
    @documented(
        record(JOB["properties"] | {"job_id": TEXT, "model": TEXT, "task": TEXT}), body=EvaluationBody, status=202
    )
    async def submit_evaluation(request: Request) -> dict[str, Any]:
        body = await read_json(request, EvaluationBody)
        principal = principal_of(request)
        Serving.permit(principal, body.model)
        await catalog.check_answers(body.model, principal.tenant)
        evaluation = await evaluations.submit(principal.tenant, principal.key_id, body.model, body.task)
        # job_id as where documents are handed in, beside the shape of GET /v1/jobs/{id}.
        return job_shape(evaluation.job) | {"job_id": evaluation.job.job_id, "model": body.model, "task": body.task}

    @router.get("/v1/evaluations/tasks", response_model=None)
    @documented(page(_TASK))
    async def list_tasks(request: Request) -> dict[str, Any]:
        principal_of(request)
        return {"object": "list", "data": [_task_shape(task) for task in await evaluations.tasks()], "has_more": False}

    return router


def _task_shape(task: Task) -> dict[str, Any]:
    return {
        "id": task.name,
        "object": "evaluation.task",
        "version": task.version,
        "metrics": list(task.metrics),
        "description": task.description,
        "num_samples": task.num_samples,
    }
