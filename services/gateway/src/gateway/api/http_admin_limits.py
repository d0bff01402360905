"""/admin/limits: the limits of all tenants together, for admins. Those of one key or tenant are in its policy."""

from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Request
from pydantic import ConfigDict, Field

from gateway.api.admin_policies import LIMIT, LimitBody, policy_shape
from gateway.api.identity import require_admin
from gateway.api.json_body import Body, read_json
from gateway.api.openapi import documented
from gateway.api.openapi_schemas import array, one_of, record
from gateway.core.platform_limits import PlatformLimits
from gateway.core.policy import Limit, Policy


class LimitsBody(Body):
    """All of them: a limit that names a model is that model's, one that names none the whole platform's."""

    model_config = ConfigDict(extra="forbid")

    limits: Annotated[list[LimitBody], Field(max_length=64)]


_LIMITS = record({"object": one_of("list"), "limits": array(LIMIT)})


def limits_router(platform: PlatformLimits) -> APIRouter:
    """Makes the routes."""
    router = APIRouter()

    @router.get("/admin/limits", response_model=None)
    @documented(_LIMITS)
    async def get_limits(request: Request) -> dict[str, Any]:
        require_admin(request)
        await platform.refresh()
        return _shape(platform.limits)

    @router.put("/admin/limits", response_model=None)
    @documented(_LIMITS, body=LimitsBody)
    async def put_limits(request: Request) -> dict[str, Any]:
        """Makes the limits exactly what the body says: here at once, in other gateways within a second."""
        sender = require_admin(request)
        body = await read_json(request, LimitsBody)
        await platform.replace(sender.key_id, [one.limit() for one in body.limits])
        return _shape(platform.limits)

    return router


def _shape(limits: Sequence[Limit]) -> dict[str, Any]:
    return {"object": "list", "limits": policy_shape(Policy(limits=tuple(limits)))["limits"]}
