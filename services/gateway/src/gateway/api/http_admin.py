"""GET /admin/usage: what was used. It needs an admin key."""

from typing import Any

from fastapi import APIRouter, Request

from gateway.api.identity import require_admin
from gateway.core.ports import UsageReport


def admin_router(usage: UsageReport) -> APIRouter:
    """The route."""
    router = APIRouter()

    @router.get("/admin/usage")
    async def get_usage(request: Request) -> dict[str, Any]:
        require_admin(request)
        return {"object": "list", "data": await usage.totals()}

    return router
