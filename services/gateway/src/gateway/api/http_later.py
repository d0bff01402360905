"""Routes whose services do not do their work yet: each answers 501 in the envelope, never something made up.

Where a service offers the call it is asked, so that its route begins to work on the day the service does.
"""

from typing import Annotated, Any, NoReturn

from fastapi import APIRouter, Query, Request

from chassis.errors import Code, PlatformError
from gateway.api.identity import principal_of
from gateway.core.monitoring import Profile, Profiles

_NOT_YET = (
    ("GET", "/v1/batches"),
    ("POST", "/v1/batches"),
    ("GET", "/v1/batches/{batch_id}"),
    ("POST", "/v1/batches/{batch_id}/cancel"),
)


def later_router(profiles: Profiles) -> APIRouter:
    """Makes GET /v1/monitor/profiles and the routes that are not there yet."""
    router = APIRouter()

    @router.get("/v1/monitor/profiles")
    async def get_profiles(
        request: Request,
        model: Annotated[str | None, Query(max_length=200)] = None,
        limit: Annotated[int, Query(ge=1, le=1000)] = 24,
    ) -> dict[str, Any]:
        principal_of(request)
        found = await profiles.newest(model, limit)
        return {"object": "list", "data": [_profile_shape(profile) for profile in found]}

    async def not_yet(request: Request) -> NoReturn:
        message = f"{request.method} {request.url.path} is not available yet"
        raise PlatformError(Code.UNIMPLEMENTED, message, reason="not_implemented")

    for method, path in _NOT_YET:
        router.add_api_route(path, not_yet, methods=[method], response_model=None)
    return router


def _profile_shape(profile: Profile) -> dict[str, Any]:
    return {
        "model": profile.model,
        "window_start": profile.window_start_unix_s,
        "window_s": profile.window_s,
        "num_records": profile.num_records,
        "statistics": dict(profile.statistics),
    }
