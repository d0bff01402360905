"""TrainerService over gRPC. Nothing of it is built yet; see the README."""

import grpc.aio
from pressroom.trainer.v1 import trainer_pb2 as pb
from pressroom.trainer.v1 import trainer_pb2_grpc

from chassis.errors import Code, PlatformError


class TrainerServicer(trainer_pb2_grpc.TrainerServiceServicer):
    """Answers UNIMPLEMENTED."""

    async def GetRun(self, request: pb.GetRunRequest, _: grpc.aio.ServicerContext) -> pb.GetRunResponse:
        raise _not_yet("training runs")

    async def ListModelVersions(
        self, request: pb.ListModelVersionsRequest, _: grpc.aio.ServicerContext
    ) -> pb.ListModelVersionsResponse:
        raise _not_yet("versions of models")


def _not_yet(what: str) -> PlatformError:
    return PlatformError(Code.UNIMPLEMENTED, f"{what} are not available yet: they come with the next milestone")
