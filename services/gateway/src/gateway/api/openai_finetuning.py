"""The routes of /v1/fine_tuning/jobs: OpenAI's paths and shapes."""

import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Literal, NoReturn

from fastapi import APIRouter, Query, Request
from pydantic import Field, WithJsonSchema
from pydantic.json_schema import SkipJsonSchema
from starlette.responses import Response

from chassis.errors import Code, PlatformError
from gateway.api.http_jobs import cancel
from gateway.api.identity import principal_of
from gateway.api.inference import json_response
from gateway.api.json_body import Body, read_json, unsupported
from gateway.api.openai_files import page_shape
from gateway.api.openai_params import ModelName
from gateway.api.openapi import documented
from gateway.api.openapi_schemas import ANY_OBJECT, COUNT, NUMBER, TEXT, TIME, array, nullable, one_of, page, record
from gateway.core.catalog import Catalog
from gateway.core.finetuning import Finetune, Finetuning, Hyperparameters, Order, Run, RunEvent
from gateway.core.jobs import Canceller, JobStatus, JobStore
from gateway.core.serving import Serving

_PATH = "/v1/fine_tuning/jobs"
_AUTO = Literal["auto"]
_FIELD_AT_FAULT = re.compile(r"(?P<param>(?P<field>training_file|hyperparameters)[a-z_.]{0,64}): ")
_MAX_SEED = 2**63 - 1

Id = Annotated[str, Field(min_length=1, max_length=100)]
MetadataKey = Annotated[str, Field(min_length=1, max_length=64)]
MetadataValue = Annotated[str, Field(max_length=512)]


class _Hyperparameters(Body):
    """OpenAI's three; "auto" and null leave one to the trainer."""

    n_epochs: _AUTO | Annotated[int, Field(ge=1, le=50)] | None = None
    batch_size: _AUTO | Annotated[int, Field(ge=1, le=256)] | None = None
    learning_rate_multiplier: _AUTO | Annotated[float, Field(gt=0, le=100)] | None = None

    def chosen(self) -> Hyperparameters:
        """As the core knows them."""
        return Hyperparameters(
            n_epochs=None if self.n_epochs == "auto" else self.n_epochs,
            batch_size=None if self.batch_size == "auto" else self.batch_size,
            learning_rate_multiplier=None if self.learning_rate_multiplier == "auto" else self.learning_rate_multiplier,
        )


class _Supervised(Body):
    hyperparameters: _Hyperparameters | None = None


class _Method(Body):
    """How to train."""

    type: Annotated[Literal["supervised", "dpo", "reinforcement"], WithJsonSchema({"const": "supervised"})]
    supervised: _Supervised | None = None


class OrderBody(Body):
    """The request."""

    refused: ClassVar[Mapping[str, str]] = MappingProxyType({"integrations": "nothing is told to other services"})

    model: ModelName
    training_file: Id
    validation_file: SkipJsonSchema[Id | None] = None
    suffix: str | None = None
    seed: Annotated[int, Field(ge=0, le=_MAX_SEED)] | None = None
    hyperparameters: _Hyperparameters | None = None
    method: _Method | None = None
    metadata: Annotated[dict[MetadataKey, MetadataValue], Field(max_length=16)] | None = None

    def order(self) -> Order:
        """What is wanted; raises what says why we cannot do it."""
        self._refuse_what_is_missing()
        return Order(
            base=self.model,
            training_file=self.training_file,
            suffix=self.suffix,
            seed=self.seed,
            hyperparameters=self._chosen().chosen(),
            metadata=self.metadata or {},
        )

    def _refuse_what_is_missing(self) -> None:
        if self.validation_file is not None:
            message = "validation files are not supported; evaluate the tuned model with POST /v1/evaluations"
            raise unsupported("validation_file", message)
        if self.method is not None and self.method.type != "supervised":
            message = f"the method {self.method.type!r} is not supported; there is: supervised"
            raise unsupported("method.type", message)

    def _chosen(self) -> _Hyperparameters:
        """Those of the method, or in OpenAI's older place; both are taken where they say the same."""
        of_method = self.method.supervised.hyperparameters if self.method and self.method.supervised else None
        if of_method is not None and self.hyperparameters is not None and of_method != self.hyperparameters:
            raise PlatformError(
                Code.INVALID_ARGUMENT,
                "hyperparameters differ from method.supervised.hyperparameters; send one of them",
                param="hyperparameters",
            )
        return of_method or self.hyperparameters or _Hyperparameters()


FINETUNE = record(
    {
        "id": TEXT,
        "object": one_of("fine_tuning.job"),
        "created_at": TIME,
        "finished_at": nullable(TIME),
        "model": TEXT,
        "fine_tuned_model": nullable(TEXT),
        "organization_id": TEXT,
        "status": one_of(*JobStatus),
        "training_file": TEXT,
        "error": nullable(record({"code": TEXT, "message": TEXT, "param": nullable(TEXT)})),
    }
)
_EVENT = record(
    {
        "id": TEXT,
        "object": one_of("fine_tuning.job.event"),
        "created_at": TIME,
        "level": TEXT,
        "message": TEXT,
        "type": TEXT,
        "data": nullable(ANY_OBJECT),
    }
)
_LOSSES = record(
    {
        "object": one_of("fine_tuning.job.losses"),
        "step": COUNT,
        "total_steps": COUNT,
        "losses": array(NUMBER),
        "trained_tokens": COUNT,
        "tracker_run_id": nullable(TEXT),
    }
)


def finetuning_router(finetuning: Finetuning, catalog: Catalog, jobs: JobStore, canceller: Canceller) -> APIRouter:
    """Makes the routes."""
    router = APIRouter()

    @router.post(_PATH, response_model=None)
    @documented(FINETUNE, body=OrderBody)
    async def create_job(request: Request) -> dict[str, Any]:
        body = await read_json(request, OrderBody)
        principal = principal_of(request)
        Serving.permit(principal, body.model)
        await catalog.check_tunable(body.model)
        order = body.order()
        return job_shape(await finetuning.submit(principal.tenant, principal.key_id, order))

    @router.get(_PATH, response_model=None)
    @documented(page(FINETUNE, with_ends=True))
    async def list_jobs(
        request: Request,
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
        after: Annotated[str | None, Query(max_length=100)] = None,
    ) -> dict[str, Any]:
        if any(name.startswith("metadata") for name in request.query_params):
            raise unsupported("metadata", "jobs cannot be sought by metadata")
        found = await finetuning.newest(principal_of(request).tenant, limit=limit + 1, after=after)
        return page_shape([job_shape(one) for one in found[:limit]], has_more=len(found) > limit)

    @router.get(_PATH + "/{job_id}", response_model=None)
    @documented(FINETUNE)
    async def get_job(request: Request, job_id: str) -> dict[str, Any]:
        return job_shape(await finetuning.get(principal_of(request).tenant, job_id))

    @router.post(_PATH + "/{job_id}/cancel", response_model=None)
    @documented(FINETUNE)
    async def cancel_job(request: Request, job_id: str) -> dict[str, Any]:
        tenant = principal_of(request).tenant
        await finetuning.get(tenant, job_id)  # no other job is cancelled here
        await cancel(jobs, canceller, tenant, job_id)
        return job_shape(await finetuning.get(tenant, job_id))

    @router.get(_PATH + "/{job_id}/events", response_model=None)
    @documented(page(_EVENT, with_ends=True))
    async def list_events(
        request: Request,
        job_id: str,
        limit: Annotated[int, Query(ge=1, le=1000)] = 20,
        after: Annotated[str | None, Query(max_length=200)] = None,
    ) -> Response:
        finetune, run = await finetuning.run(principal_of(request).tenant, job_id)
        events = _newest_first(finetune, run)
        if after is not None:
            places = [place for place, event in enumerate(events) if event.id == after]
            events = events[places[0] + 1 :] if places else []
        shown = [_event_shape(event) for event in events[:limit]]
        return json_response(page_shape(shown, has_more=len(events) > limit))

    @router.get(_PATH + "/{job_id}/losses", response_model=None)
    @documented(_LOSSES)
    async def get_losses(request: Request, job_id: str) -> Response:
        """Not OpenAI's: the loss curve in one piece."""
        _, run = await finetuning.run(principal_of(request).tenant, job_id)
        return json_response(_losses_shape(run))

    @router.get(_PATH + "/{job_id}/checkpoints", response_model=None)
    @documented(page(ANY_OBJECT, with_ends=True))
    async def list_checkpoints(request: Request, job_id: str) -> dict[str, Any]:
        """None: checkpoints are for resuming after a crash, and no request can name one."""
        await finetuning.get(principal_of(request).tenant, job_id)
        return page_shape([], has_more=False)

    async def not_there(request: Request) -> NoReturn:
        message = "jobs cannot be paused; cancel them, and order anew"
        raise PlatformError(Code.UNIMPLEMENTED, message, reason="not_implemented")

    for action in ("pause", "resume"):
        router.add_api_route(
            _PATH + "/{job_id}/" + action, not_there, methods=["POST"], response_model=None, include_in_schema=False
        )
    return router


def job_shape(finetune: Finetune) -> dict[str, Any]:
    """OpenAI's fine_tuning.job."""
    job = finetune.job
    given = finetune.hyperparameters.given()
    hyperparameters = {name: given.get(name, "auto") for name in ("n_epochs", "batch_size", "learning_rate_multiplier")}
    succeeded = job.status is JobStatus.SUCCEEDED
    return {
        "id": job.job_id,
        "object": "fine_tuning.job",
        "created_at": job.created_unix_ms // 1000,
        "finished_at": job.finished_unix_ms // 1000 if job.finished_unix_ms else None,
        "model": finetune.base,
        "fine_tuned_model": finetune.model_id if succeeded else None,
        "organization_id": job.tenant,
        "status": job.status.value,
        "training_file": finetune.training_upload_id,
        "validation_file": None,
        "result_files": [],
        "hyperparameters": hyperparameters,
        "method": {"type": "supervised", "supervised": {"hyperparameters": hyperparameters}},
        "seed": finetune.seed,
        "suffix": finetune.suffix or None,
        "trained_tokens": (job.result or {}).get("trained_tokens"),
        "error": _error_shape(job.error) if job.status is JobStatus.FAILED else None,
        "estimated_finish": None,
        "integrations": [],
        "metadata": dict(finetune.metadata) or None,
    }


def _error_shape(message: str | None) -> dict[str, Any]:
    """OpenAI's error of a job. The trainer names the field at fault, where it is the order's, before a colon."""
    named = _FIELD_AT_FAULT.match(message or "")
    return {
        "code": f"invalid_{named['field']}" if named else "job_failed",
        "message": message or "the job failed",
        "param": named["param"] if named else None,
    }


def _newest_first(finetune: Finetune, run: Run | None) -> list[RunEvent]:
    """The run's events behind ours, which is there before the trainer knows of the job."""
    job = finetune.job
    created = RunEvent(
        f"ftevent-{job.job_id}-created",
        job.created_unix_ms,
        "info",
        "message",
        f"Created fine-tuning job: {job.job_id}",
    )
    return [*reversed(run.events if run else ()), created]


def _event_shape(event: RunEvent) -> dict[str, Any]:
    return {
        "id": event.id,
        "object": "fine_tuning.job.event",
        "created_at": event.at_unix_ms // 1000,
        "level": event.level,
        "message": event.message,
        "type": event.type,
        "data": dict(event.data) if event.data is not None else None,
    }


def _losses_shape(run: Run | None) -> dict[str, Any]:
    return {
        "object": "fine_tuning.job.losses",
        "step": run.step if run else 0,
        "total_steps": run.total_steps if run else 0,
        "losses": list(run.losses) if run else [],
        "trained_tokens": run.trained_tokens if run else 0,
        "tracker_run_id": (run.tracker_run_id if run else "") or None,
    }
