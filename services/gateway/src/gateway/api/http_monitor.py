"""GET /v1/monitor/profiles: what the monitor found in prompts and responses.

Any key that is valid may read them. They are sums over all tenants that let their text be profiled, and hold numbers
and names of patterns, no text. Profiles of a tuned model are for the tenant that owns it and for admins.
"""

from typing import Annotated, Any

from fastapi import APIRouter, Query, Request

from gateway.api.identity import principal_of
from gateway.api.openapi import documented
from gateway.api.openapi_schemas import ANY_OBJECT, COUNT, NUMBER, TEXT, array, one_of, record
from gateway.core.finetuning import TunedModels
from gateway.core.monitoring import Profile, Profiles

_PROFILES = record(
    {
        "object": one_of("list"),
        "data": array(
            record(
                {
                    "model": TEXT,
                    "window_start": NUMBER,
                    "window_s": NUMBER,
                    "num_records": COUNT,
                    "statistics": ANY_OBJECT,
                }
            )
        ),
        "sample_rate": NUMBER,
        "num_waiting": COUNT,
        "lag_s": NUMBER,
        "num_dropped": COUNT,
    }
)


def monitor_router(profiles: Profiles, tuned: TunedModels) -> APIRouter:
    """Makes GET /v1/monitor/profiles."""
    router = APIRouter()

    @router.get("/v1/monitor/profiles", response_model=None)
    @documented(_PROFILES)
    async def get_profiles(
        request: Request,
        model: Annotated[str | None, Query(max_length=200)] = None,
        limit: Annotated[int, Query(ge=1, le=1000)] = 24,
    ) -> dict[str, Any]:
        """The newest windows; fewer than `limit` where some of them are of other tenants' models."""
        principal = principal_of(request)
        report = await profiles.newest(model, limit)
        owned = {one.model_id for one in await tuned.tuned_of(principal.tenant)}
        return {
            "object": "list",
            "data": [
                _profile_shape(profile)
                for profile in report.profiles
                if ":" not in profile.model or profile.model in owned or principal.is_admin
            ],
            "sample_rate": report.sample_rate,
            "num_waiting": report.num_waiting,
            "lag_s": report.lag_s,
            "num_dropped": report.num_dropped,
        }

    return router


def _profile_shape(profile: Profile) -> dict[str, Any]:
    return {
        "model": profile.model,
        "window_start": profile.window_start_unix_s,
        "window_s": profile.window_s,
        "num_records": profile.num_records,
        "statistics": dict(profile.statistics),
    }
