"""/admin/audit: what administrators changed, and whether the record of it is whole."""

import json
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request

from gateway.api.identity import require_admin
from gateway.api.openapi import documented
from gateway.api.openapi_schemas import COUNT, FLAG, TEXT, nullable, page, record
from gateway.core.audit import START, AuditFilter, AuditLog, AuditRow, read_anchor

Anchored = Annotated[str | None, Query(json_schema_extra={"pattern": "^[0-9]{1,18}:[0-9a-f]{64}$"})]
Filter = Annotated[str | None, Query(max_length=128)]

_CHANGE = record(
    {
        "sequence": COUNT,
        "at_unix_ms": COUNT,
        "actor": TEXT,
        "action": TEXT,
        "subject": TEXT,
        "details": {},
        "previous_hash": TEXT,
        "hash": TEXT,
    }
)


def audit_router(log: AuditLog) -> APIRouter:
    """Makes GET /admin/audit and GET /admin/audit/verify."""
    router = APIRouter()

    @router.get("/admin/audit", response_model=None)
    @documented(page(_CHANGE))
    async def list_changes(
        request: Request,
        actor: Filter = None,
        action: Filter = None,
        subject: Filter = None,
        limit: Annotated[int, Query(ge=1, le=1000)] = 100,
        before: Annotated[int | None, Query(ge=1, le=2**62)] = None,
    ) -> dict[str, Any]:
        """Changes, newest first; `before` takes the last sequence of one page to give the next."""
        require_admin(request)
        found = await log.newest(AuditFilter(actor, action, subject), limit=limit + 1, before=before)
        return {"object": "list", "data": [shape(row) for row in found[:limit]], "has_more": len(found) > limit}

    @router.get("/admin/audit/verify", response_model=None)
    @documented(record({"ok": FLAG, "broken_at": nullable(COUNT), "problem": nullable(TEXT), "anchor": TEXT}))
    async def verify(request: Request, anchor: Anchored = None) -> dict[str, Any]:
        """Walks the chain; with the anchor of an earlier day it also finds a chain that was cut or written anew."""
        require_admin(request)
        chain = await log.verify(read_anchor(anchor) if anchor is not None else START)
        return {
            "ok": chain.broken_at is None,
            "broken_at": chain.broken_at,
            "problem": chain.problem or None,
            "anchor": str(chain.head),  # up to the break, if there is one
        }

    return router


def shape(row: AuditRow) -> dict[str, Any]:
    """A change as it is read."""
    return {
        "sequence": row.sequence,
        "at_unix_ms": row.at_unix_ms,
        "actor": row.actor,
        "action": row.action,
        "subject": row.subject,
        "details": _details(row.details_json),
        "previous_hash": row.previous_hash,
        "hash": row.hash,
    }


def _details(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:  # somebody changed the file: verify says where, and the rest is to be read all the same
        return text
