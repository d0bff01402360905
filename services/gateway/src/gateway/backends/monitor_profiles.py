"""The monitor's profiles over gRPC. Implements core.monitoring.Profiles."""

import json

import grpc.aio
from pressroom.monitor.v1 import monitor_pb2, monitor_pb2_grpc

from chassis import rpc
from gateway.core.monitoring import Profile, ProfileReport

_TIMEOUT_S = 10.0


class MonitorProfiles:
    """Calls the monitor over a channel that the caller opened and closes."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stub = monitor_pb2_grpc.MonitorServiceStub(channel)

    async def newest(self, model: str | None, limit: int) -> ProfileReport:
        """Returns the newest profiles; raises PlatformError(UNAVAILABLE) while the monitor is away."""
        request = monitor_pb2.GetProfilesRequest(model=model or "", limit=limit)
        async with rpc.call("monitor.GetProfiles", timeout_s=_TIMEOUT_S) as call:
            response = await self._stub.GetProfiles(request, timeout=call.timeout_s, metadata=call.metadata)
        return ProfileReport(
            profiles=[_profile(profile) for profile in response.profiles],
            sample_rate=response.sample_rate,
            num_waiting=response.num_waiting,
            lag_s=response.lag_s,
            num_dropped=response.num_dropped,
        )


def _profile(profile: monitor_pb2.Profile) -> Profile:
    return Profile(
        model=profile.model,
        window_start_unix_s=profile.window_start_unix_s,
        window_s=profile.window_s,
        num_records=profile.num_records,
        statistics=json.loads(profile.statistics_json) if profile.statistics_json else {},
    )
