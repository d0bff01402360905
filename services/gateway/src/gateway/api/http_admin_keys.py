"""/admin/keys: access keys, for admins."""

import time
from dataclasses import replace
from typing import Annotated, Any

from fastapi import APIRouter, Request
from pydantic import ConfigDict, Field

from chassis.errors import Code, PlatformError
from contracts.names import DEFAULT_TENANT
from gateway.api.admin_policies import POLICY, PolicyBody, Tenant, policy_of, policy_shape
from gateway.api.identity import require_admin
from gateway.api.json_body import Body, read_json
from gateway.api.openapi import documented
from gateway.api.openapi_schemas import ANY_OBJECT, COUNT, FLAG, TEXT, TIME, array, nullable, one_of, record
from gateway.core.administration import Administration, NewKey
from gateway.core.keys import KeyRow

_DEFAULT_OVERLAP_S = 86_400
_MAX_OVERLAP_S = 30 * 86_400
_MAX_UNIX_S = 2**33  # the year 2242

Rpm = Annotated[int, Field(ge=1, le=1_000_000)]
Name = Annotated[str, Field(max_length=128)]
MetadataKey = Annotated[str, Field(min_length=1, max_length=64)]
MetadataValue = Annotated[str, Field(max_length=512)]
Metadata = Annotated[dict[MetadataKey, MetadataValue], Field(max_length=16)]
UnixS = Annotated[int, Field(ge=0, le=_MAX_UNIX_S)]


class KeyBody(Body):
    """What a key may be told to be; null means the default."""

    model_config = ConfigDict(extra="forbid")

    rpm: Rpm | None = None
    is_admin: bool | None = None
    name: Name | None = None
    metadata: Metadata | None = None
    expires_at: UnixS | None = None
    policy: PolicyBody | None = None


class NewKeyBody(KeyBody):
    """A new key, and whose it is."""

    tenant: Tenant | None = None


class RotationBody(Body):
    """How long the old secret still works."""

    model_config = ConfigDict(extra="forbid")

    overlap_s: Annotated[int, Field(ge=0, le=_MAX_OVERLAP_S)] | None = None


_KEY = record(
    {
        "id": TEXT,
        "tenant": TEXT,
        "rpm": nullable(COUNT),
        "is_admin": FLAG,
        "name": TEXT,
        "metadata": ANY_OBJECT,
        "created_at": TIME,
        "expires_at": nullable(TIME),
        "revoked_at": nullable(TIME),
        "former_secret_until": nullable(TIME),
        "policy": POLICY,
    }
)


def keys_router(administration: Administration) -> APIRouter:
    """Makes the routes."""
    router = APIRouter()

    @router.post("/admin/keys", response_model=None)
    @documented(record({"id": TEXT, "key": TEXT}), body=NewKeyBody)
    async def create_key(request: Request) -> dict[str, Any]:
        actor = require_admin(request).key_id
        body = await read_json(request, NewKeyBody)
        _check_expiry(body.expires_at)
        wanted = NewKey(
            body.tenant or DEFAULT_TENANT,
            requests_per_minute=body.rpm,
            is_admin=bool(body.is_admin),
            policy=policy_of(body.policy),
            name=body.name or "",
            metadata=body.metadata or {},
            expires_unix_s=body.expires_at,
        )
        key_id, key = await administration.create_key(actor, wanted)
        return {"id": key_id, "key": key}

    @router.get("/admin/keys", response_model=None)
    @documented(record({"object": one_of("list"), "data": array(_KEY)}))
    async def list_keys(request: Request) -> dict[str, Any]:
        require_admin(request)
        return {"object": "list", "data": [key_shape(row) for row in await administration.keys()]}

    @router.get("/admin/keys/{key_id}", response_model=None)
    @documented(_KEY)
    async def get_key(request: Request, key_id: str) -> dict[str, Any]:
        require_admin(request)
        return key_shape(await administration.key(key_id))

    @router.patch("/admin/keys/{key_id}", response_model=None)
    @documented(_KEY, body=KeyBody)
    async def change_key(request: Request, key_id: str) -> dict[str, Any]:
        actor = require_admin(request).key_id
        body = await read_json(request, KeyBody)
        _check_expiry(body.expires_at)
        return key_shape(await administration.change_key(actor, key_id, lambda row: _changed(row, body)))

    @router.post("/admin/keys/{key_id}/rotate", response_model=None)
    @documented(
        record({"id": TEXT, "key": TEXT, "former_secret_until": nullable(TIME)}), body=RotationBody, needs_body=False
    )
    async def rotate_key(request: Request, key_id: str) -> dict[str, Any]:
        actor = require_admin(request).key_id
        body = await read_json(request, RotationBody) if await request.body() else RotationBody()
        overlap_s = _DEFAULT_OVERLAP_S if body.overlap_s is None else body.overlap_s
        key, row = await administration.rotate_key(actor, key_id, overlap_s=overlap_s)
        return {"id": key_id, "key": key, "former_secret_until": row.former_until_unix_s}

    @router.delete("/admin/keys/{key_id}", response_model=None)
    @documented(record({"id": TEXT, "revoked": FLAG}))
    async def revoke_key(request: Request, key_id: str) -> dict[str, Any]:
        await administration.revoke_key(require_admin(request).key_id, key_id)
        return {"id": key_id, "revoked": True}

    return router


def key_shape(row: KeyRow) -> dict[str, Any]:
    """A key as it is read: all but its secret."""
    return {
        "id": row.key_id,
        "tenant": row.tenant,
        "rpm": row.requests_per_minute,
        "is_admin": row.is_admin,
        "name": row.name,
        "metadata": row.metadata,
        "created_at": row.created_unix_s,
        "expires_at": row.expires_unix_s,
        "revoked_at": row.revoked_unix_s,
        "former_secret_until": row.former_until_unix_s,
        "policy": policy_shape(row.policy),
    }


def _changed(row: KeyRow, body: KeyBody) -> KeyRow:
    said: dict[str, Any] = {}
    for name in body.model_fields_set:
        match name:
            case "rpm":
                said["requests_per_minute"] = body.rpm
            case "is_admin":
                said["is_admin"] = bool(body.is_admin)
            case "name":
                said["name"] = body.name or ""
            case "metadata":
                said["metadata"] = body.metadata or {}
            case "expires_at":
                said["expires_unix_s"] = body.expires_at
            case "policy":
                said["policy"] = body.policy.apply(row.policy) if body.policy else policy_of(None)
    return replace(row, **said)


def _check_expiry(expires_unix_s: int | None) -> None:
    if expires_unix_s is not None and expires_unix_s <= time.time():
        raise PlatformError(
            Code.FAILED_PRECONDITION,
            "expires_at: must be a Unix time in seconds that is still to come; to end a key now, DELETE it",
            param="expires_at",
        )
