"""/admin/tenants: tenants, for admins. One is never deleted, since its usage and its files stay; it is disabled."""

import time
from dataclasses import replace
from typing import Annotated, Any

from fastapi import APIRouter, Path, Request
from pydantic import ConfigDict

from chassis.errors import Code, PlatformError
from gateway.api.admin_policies import POLICY, PolicyBody, policy_of, policy_shape
from gateway.api.identity import require_admin
from gateway.api.json_body import Body, read_json
from gateway.api.openapi import documented
from gateway.api.openapi_schemas import FLAG, TEXT, TIME, array, nullable, one_of, record
from gateway.core.administration import Administration
from gateway.core.keys import TenantRow
from gateway.core.ports import Principal

TenantPath = Annotated[str, Path(pattern=r"^[a-z0-9][a-z0-9_-]{0,62}$")]


class TenantBody(Body):
    """What a tenant is told to be; null means the default."""

    model_config = ConfigDict(extra="forbid")

    allows_text: bool | None = None
    disabled: bool | None = None
    policy: PolicyBody | None = None


_TENANT = record(
    {"tenant": TEXT, "allows_text": FLAG, "disabled": FLAG, "disabled_at": nullable(TIME), "policy": POLICY}
)


def tenants_router(administration: Administration) -> APIRouter:
    """Makes the routes."""
    router = APIRouter()

    @router.get("/admin/tenants", response_model=None)
    @documented(record({"object": one_of("list"), "data": array(_TENANT)}))
    async def list_tenants(request: Request) -> dict[str, Any]:
        require_admin(request)
        return {"object": "list", "data": [_shape(row) for row in await administration.tenants()]}

    @router.get("/admin/tenants/{tenant}", response_model=None)
    @documented(_TENANT)
    async def get_tenant(request: Request, tenant: TenantPath) -> dict[str, Any]:
        require_admin(request)
        return _shape(await administration.tenant(tenant))

    @router.put("/admin/tenants/{tenant}", response_model=None)
    @documented(_TENANT, body=TenantBody)
    async def put_tenant(request: Request, tenant: TenantPath) -> dict[str, Any]:
        """Makes the tenant, or makes it exactly what the body says."""
        sender = require_admin(request)
        body = await read_json(request, TenantBody)
        _refuse_own_end(sender, tenant, body)
        wanted = TenantRow(tenant, bool(body.allows_text), policy_of(body.policy), _disabled(body, None))
        return _shape(await administration.put_tenant(sender.key_id, wanted))

    @router.patch("/admin/tenants/{tenant}", response_model=None)
    @documented(_TENANT, body=TenantBody)
    async def change_tenant(request: Request, tenant: TenantPath) -> dict[str, Any]:
        """Changes what the body says."""
        sender = require_admin(request)
        body = await read_json(request, TenantBody)
        _refuse_own_end(sender, tenant, body)
        return _shape(await administration.change_tenant(sender.key_id, tenant, lambda row: _changed(row, body)))

    return router


def _changed(row: TenantRow, body: TenantBody) -> TenantRow:
    said: dict[str, Any] = {}
    if "allows_text" in body.model_fields_set:
        said["allows_text"] = bool(body.allows_text)
    if "disabled" in body.model_fields_set:
        said["disabled_unix_s"] = _disabled(body, row.disabled_unix_s)
    if "policy" in body.model_fields_set:
        said["policy"] = body.policy.apply(row.policy) if body.policy else policy_of(None)
    return replace(row, **said)


def _disabled(body: TenantBody, since_unix_s: int | None) -> int | None:
    return (since_unix_s or int(time.time())) if body.disabled else None


def _refuse_own_end(sender: Principal, tenant: str, body: TenantBody) -> None:
    if body.disabled and tenant == sender.tenant:
        raise PlatformError(Code.FAILED_PRECONDITION, "this would lock out the key that asks for it", param="disabled")


def _shape(row: TenantRow) -> dict[str, Any]:
    return {
        "tenant": row.tenant,
        "allows_text": row.allows_text,
        "disabled": row.disabled_unix_s is not None,
        "disabled_at": row.disabled_unix_s,
        "policy": policy_shape(row.policy),
    }
