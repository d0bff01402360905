"""The evaluator's tasks over gRPC. Implements core.evaluations.Tasks."""

from collections.abc import Sequence

import grpc.aio
from pressroom.evaluator.v1 import evaluator_pb2, evaluator_pb2_grpc

from chassis import rpc
from gateway.core.evaluations import Task

_TIMEOUT_S = 2.0


class EvaluatorTasks:
    """Calls the evaluator over a channel that the caller opened and closes."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stub = evaluator_pb2_grpc.EvaluatorServiceStub(channel)

    async def all(self) -> Sequence[Task]:
        """Returns the tasks; raises PlatformError, UNAVAILABLE when it is away."""
        async with rpc.call("evaluator.ListTasks", timeout_s=_TIMEOUT_S) as call:
            response = await self._stub.ListTasks(
                evaluator_pb2.ListTasksRequest(), timeout=call.timeout_s, metadata=call.metadata
            )
        return [
            Task(task.name, task.version, tuple(task.metrics), task.description, task.num_samples)
            for task in response.tasks
        ]
