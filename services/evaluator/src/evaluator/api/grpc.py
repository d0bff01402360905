"""gRPC: maps the wire types of pressroom.evaluator.v1 to core and back."""

import re
from collections.abc import Sequence
from typing import Protocol

import grpc.aio
from pressroom.evaluator.v1 import evaluator_pb2 as pb
from pressroom.evaluator.v1 import evaluator_pb2_grpc

from chassis import context
from chassis.errors import Code, PlatformError
from evaluator.core.ports import Results
from evaluator.core.tasks import Task

_ID = re.compile(r"[A-Za-z0-9_-]{1,128}")


class Catalogue(Protocol):
    """The tasks that the evaluator has."""

    async def all(self) -> Sequence[Task]:
        """Returns every task, by name."""
        ...


class EvaluatorServicer(evaluator_pb2_grpc.EvaluatorServiceServicer):
    """The service of the proto; a result is shown to its own tenant alone."""

    def __init__(self, tasks: Catalogue, results: Results) -> None:
        self._tasks = tasks
        self._results = results

    async def ListTasks(self, request: pb.ListTasksRequest, _: grpc.aio.ServicerContext) -> pb.ListTasksResponse:
        return pb.ListTasksResponse(tasks=[_task(task) for task in await self._tasks.all()])

    async def GetResult(self, request: pb.GetResultRequest, _: grpc.aio.ServicerContext) -> pb.GetResultResponse:
        result = await self._results.get(request.job_id) if _ID.fullmatch(request.job_id) else None
        if result is None or result.tenant != context.current().tenant:
            message = f"there is no result of a job {request.job_id[:128]!r}"
            raise PlatformError(Code.NOT_FOUND, message, param="job_id")
        metrics = [
            pb.MetricValue(name=name, value=metric.value, ci95_low=metric.low, ci95_high=metric.high, n=metric.n)
            for name, metric in result.metrics.items()
        ]
        return pb.GetResultResponse(metrics=metrics)


def _task(task: Task) -> pb.Task:
    return pb.Task(
        name=task.name,
        version=task.version,
        metrics=task.metrics,
        description=task.description,
        num_samples=len(task.samples),
    )
