"""MonitorService over gRPC. Profiles are not built yet; see the README."""

import grpc.aio
from pressroom.monitor.v1 import monitor_pb2 as pb
from pressroom.monitor.v1 import monitor_pb2_grpc

from chassis.errors import Code, PlatformError


class MonitorServicer(monitor_pb2_grpc.MonitorServiceServicer):
    """Answers UNIMPLEMENTED."""

    async def GetProfiles(self, request: pb.GetProfilesRequest, _: grpc.aio.ServicerContext) -> pb.GetProfilesResponse:
        raise PlatformError(Code.UNIMPLEMENTED, "profiles are not available yet: they come with the next milestone")
