"""TrainerService over gRPC: runs and the registry."""

import asyncio
import json
from collections.abc import Sequence
from typing import Protocol

import grpc.aio
from pressroom.common.v1 import common_pb2
from pressroom.trainer.v1 import trainer_pb2 as pb
from pressroom.trainer.v1 import trainer_pb2_grpc

from chassis import context
from chassis.errors import Code, PlatformError
from trainer.core.runs import Adapter, Run, RunEvent, RunStatus, Step

_STATUS = {
    RunStatus.RUNNING: common_pb2.JOB_STATUS_RUNNING,
    RunStatus.SUCCEEDED: common_pb2.JOB_STATUS_SUCCEEDED,
    RunStatus.FAILED: common_pb2.JOB_STATUS_FAILED,
    RunStatus.CANCELLED: common_pb2.JOB_STATUS_CANCELLED,
}


class KeptRun(Protocol):
    """What is kept of a run."""

    def steps(self) -> list[Step]: ...
    def events(self) -> list[RunEvent]: ...
    def tracker_run_id(self) -> str: ...


class KeptRuns(Protocol):
    """Where runs are kept."""

    def find(self, job_id: str) -> tuple[Run, KeptRun] | None:
        """Returns a run by its job; blocks."""
        ...


class Registry(Protocol):
    """Where versions are listed."""

    def versions(self, base: str) -> Sequence[Adapter]:
        """Returns the adapters of a base ("": of any), newest first; blocks."""
        ...


class TrainerServicer(trainer_pb2_grpc.TrainerServiceServicer):
    """Tells a tenant of its own runs and versions; who calls without a tenant is the platform and hears of all."""

    def __init__(self, runs: KeptRuns, registry: Registry) -> None:
        self._runs = runs
        self._registry = registry

    async def GetRun(self, request: pb.GetRunRequest, _: grpc.aio.ServicerContext) -> pb.GetRunResponse:
        return await asyncio.to_thread(self._run, request.job_id, context.current().tenant)

    async def ListModelVersions(
        self, request: pb.ListModelVersionsRequest, _: grpc.aio.ServicerContext
    ) -> pb.ListModelVersionsResponse:
        adapters = await asyncio.to_thread(self._registry.versions, request.base)
        tenant = context.current().tenant
        own = [adapter for adapter in adapters if tenant in ("", adapter.tenant)]
        return pb.ListModelVersionsResponse(versions=_versions(own))

    def _run(self, job_id: str, tenant: str) -> pb.GetRunResponse:
        found = self._runs.find(job_id)
        if found is None or tenant not in ("", found[0].order.tenant):
            raise PlatformError(Code.NOT_FOUND, f"there is no training run {job_id}", param="job_id")
        run, kept = found
        steps = kept.steps()
        return pb.GetRunResponse(
            step=len(steps),
            total_steps=run.total_steps,
            losses=[step.loss for step in steps],
            status=_STATUS[run.status],
            trained_tokens=sum(step.num_tokens for step in steps),
            events=[_event(event) for event in kept.events()],
            tracker_run_id=kept.tracker_run_id(),
        )


def _event(event: RunEvent) -> pb.RunEvent:
    return pb.RunEvent(
        id=event.id,
        at_unix_ms=event.at_unix_ms,
        level=event.level,
        type=event.type,
        message=event.message,
        data_json=json.dumps(event.data) if event.data else "",
    )


def _versions(adapters: Sequence[Adapter]) -> list[pb.ModelVersion]:
    """The newest of an id is the published one; those before it are retired."""
    seen: set[str] = set()
    versions = []
    for adapter in adapters:
        stage = "retired" if adapter.id in seen else "published"
        seen.add(adapter.id)
        versions.append(
            pb.ModelVersion(
                id=adapter.id,
                base=adapter.base,
                path=adapter.path,
                manifest_sha256=adapter.manifest_sha256,
                stage=stage,
            )
        )
    return versions
