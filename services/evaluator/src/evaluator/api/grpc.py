"""EvaluatorService over gRPC. Nothing of it is built yet; see the README."""

import grpc.aio
from pressroom.evaluator.v1 import evaluator_pb2 as pb
from pressroom.evaluator.v1 import evaluator_pb2_grpc

from chassis.errors import Code, PlatformError


class EvaluatorServicer(evaluator_pb2_grpc.EvaluatorServiceServicer):
    """Answers UNIMPLEMENTED."""

    async def ListTasks(self, request: pb.ListTasksRequest, _: grpc.aio.ServicerContext) -> pb.ListTasksResponse:
        raise _not_yet("evaluation tasks")

    async def GetResult(self, request: pb.GetResultRequest, _: grpc.aio.ServicerContext) -> pb.GetResultResponse:
        raise _not_yet("results of evaluations")


def _not_yet(what: str) -> PlatformError:
    return PlatformError(Code.UNIMPLEMENTED, f"{what} are not available yet: they come with the next milestone")
