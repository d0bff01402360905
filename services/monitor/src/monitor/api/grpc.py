"""MonitorService over gRPC."""

from collections.abc import Awaitable, Callable, Sequence

import grpc.aio
from pressroom.monitor.v1 import monitor_pb2 as pb
from pressroom.monitor.v1 import monitor_pb2_grpc

from monitor.core.profiles import Profile
from monitor.core.profiling import Profiling

_DEFAULT_LIMIT = 24
_MAX_LIMIT = 1_000

Newest = Callable[[str | None, int], Awaitable[Sequence[Profile]]]


class MonitorServicer(monitor_pb2_grpc.MonitorServiceServicer):
    """Tells of the profiles and of how far behind they are."""

    def __init__(self, newest: Newest, profiling: Profiling, sample_rate: float) -> None:
        self._newest = newest
        self._profiling = profiling
        self._sample_rate = sample_rate

    async def GetProfiles(self, request: pb.GetProfilesRequest, _: grpc.aio.ServicerContext) -> pb.GetProfilesResponse:
        limit = min(request.limit or _DEFAULT_LIMIT, _MAX_LIMIT)
        return pb.GetProfilesResponse(
            profiles=[_told(profile) for profile in await self._newest(request.model or None, limit)],
            sample_rate=self._sample_rate,
            num_waiting=self._profiling.num_waiting,
            lag_s=self._profiling.lag_s,
            num_dropped=self._profiling.num_dropped,
        )


def _told(profile: Profile) -> pb.Profile:
    return pb.Profile(
        model=profile.model,
        window_start_unix_s=profile.window_start_unix_s,
        window_s=profile.window_s,
        num_records=profile.num_records,
        statistics_json=profile.statistics_json,
    )
