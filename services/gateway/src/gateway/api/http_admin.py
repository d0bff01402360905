"""The admin routes of keys. Each needs an admin key."""

from typing import Annotated, Any

from fastapi import APIRouter, Request
from pydantic import ConfigDict, Field

from contracts.names import DEFAULT_TENANT
from gateway.api.identity import require_admin
from gateway.api.json_body import Body, read_json
from gateway.core.keys import KeyRing, KeyRow


class NewKey(Body):
    """What a new key is to be; null means the default."""

    model_config = ConfigDict(extra="forbid")

    tenant: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,62}$")] | None = None
    rpm: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    is_admin: bool | None = None


def admin_router(keys: KeyRing) -> APIRouter:
    """Makes POST, GET and DELETE of /admin/keys."""
    router = APIRouter()

    @router.post("/admin/keys")
    async def create_key(request: Request) -> dict[str, Any]:
        require_admin(request)
        wanted = await read_json(request, NewKey)
        key_id, key = await keys.create(
            wanted.tenant or DEFAULT_TENANT, requests_per_minute=wanted.rpm, is_admin=bool(wanted.is_admin)
        )
        return {"id": key_id, "key": key}

    @router.get("/admin/keys")
    async def list_keys(request: Request) -> dict[str, Any]:
        require_admin(request)
        return {"object": "list", "data": [_key_shape(row) for row in await keys.all()]}

    @router.delete("/admin/keys/{key_id}")
    async def revoke_key(request: Request, key_id: str) -> dict[str, Any]:
        require_admin(request)
        await keys.revoke(key_id)
        return {"id": key_id, "revoked": True}

    return router


def _key_shape(row: KeyRow) -> dict[str, Any]:
    return {
        "id": row.key_id,
        "tenant": row.tenant,
        "rpm": row.requests_per_minute,
        "is_admin": row.is_admin,
        "created_at": row.created_unix_s,
        "revoked_at": row.revoked_unix_s,
    }
