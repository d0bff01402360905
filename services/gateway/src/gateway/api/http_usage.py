"""What was used and what it cost: /admin/usage, /admin/usage/rows, /admin/prices, and GET /v1/usage for a key's own."""

import asyncio
import re
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from datetime import UTC, date, datetime
from typing import Annotated, Any, Literal

import orjson
from fastapi import APIRouter, Query, Request
from pydantic import BeforeValidator, ConfigDict, Field
from starlette.responses import Response, StreamingResponse

from chassis.errors import Code, PlatformError
from gateway.api.csv_stream import csv_page
from gateway.api.identity import principal_of, require_admin
from gateway.api.inference import json_response
from gateway.api.json_body import Body, read_json
from gateway.api.openapi import documented
from gateway.api.openapi_schemas import COUNT, NUMBER, TEXT, array, one_of, record
from gateway.core.money import Price, PriceEntry, PriceList
from gateway.core.usage_reports import FIGURES, MAX_GROUPS, ROW, TOTALS, Group, Selection, UsageReports

_PAGE_ROWS = 2_000  # some 10 ms to read and to write, in threads; between two pages others have their turn
_THREAD_FROM_SUMS = 2_000  # more take over 5 ms to write and would hold up the event loop
_CSV = "text/csv; charset=utf-8; header=present"
_DAY = re.compile(r"\d{4}-\d\d-\d\d")
_EPOCH = date(1970, 1, 1)
_MOST_MICROS = 10**15

Micros = Annotated[int, Field(ge=0, le=_MOST_MICROS)]
Filter = Annotated[str | None, Query(max_length=256)]


def _written_as_a_day(value: str) -> str:
    if not _DAY.fullmatch(value):
        raise ValueError("must be a day, written as 2026-01-31")
    return value


Day = Annotated[date, BeforeValidator(_written_as_a_day)]


def _groups_schema(*groups: str) -> dict[str, Any]:
    one = f"({'|'.join(groups)})"
    return {"pattern": f"^({one}(,{one})*)?$"}


Format = Annotated[Literal["json", "csv"], Query()]


class NewPrice(Body):
    """A model's price in micros for a million tokens; a cached token costs as any other where nothing is said."""

    model_config = ConfigDict(extra="forbid")

    model: Annotated[str, Field(min_length=1, max_length=256)]
    input_micros: Micros
    cached_input_micros: Micros | None = None
    output_micros: Micros
    effective_from: Annotated[int, Field(ge=0, le=253_402_300_799)] | None = None  # Unix seconds; default: now


_SUMS = record({"object": one_of("list"), "data": array(record(dict.fromkeys(FIGURES, COUNT)))})
_PRICE = record(
    {
        "model": TEXT,
        "input_micros": COUNT,
        "cached_input_micros": COUNT,
        "output_micros": COUNT,
        "effective_from": NUMBER,
    }
)


def usage_router(usage: UsageReports, prices: PriceList) -> APIRouter:
    """The routes."""
    router = APIRouter()

    @router.get("/admin/usage", response_model=None)
    @documented(_SUMS, stream="text/csv")
    async def sums(
        request: Request,
        group_by: Annotated[str, Query(max_length=64, json_schema_extra=_groups_schema(*Group))] = "",
        tenant: Filter = None,
        key: Filter = None,
        model: Filter = None,
        first: Annotated[Day | None, Query(alias="from")] = None,
        last: Annotated[Day | None, Query(alias="to")] = None,
        wanted: Annotated[Literal["json", "csv"], Query(alias="format")] = "json",
    ) -> Response:
        """Sums by tenant, key and model, or as group_by says."""
        require_admin(request)
        groups = _groups(group_by, Group) or TOTALS
        return await _sums(usage, groups, _selection(tenant, key, model, first, last), wanted)

    @router.get("/admin/usage/rows", response_model=None)
    @documented(media_type="text/csv")
    async def rows(
        request: Request,
        tenant: Filter = None,
        key: Filter = None,
        model: Filter = None,
        first: Annotated[Day | None, Query(alias="from")] = None,
        last: Annotated[Day | None, Query(alias="to")] = None,
    ) -> Response:
        """Every request as a line of CSV."""
        require_admin(request)
        lines = _row_pages(usage, _selection(tenant, key, model, first, last))
        return StreamingResponse(lines, media_type=_CSV, headers=_attachment("usage-rows"))

    @router.get("/v1/usage", response_model=None)
    @documented(_SUMS, stream="text/csv")
    async def own(
        request: Request,
        group_by: Annotated[str, Query(max_length=64, json_schema_extra=_groups_schema("day", "model"))] = "",
        model: Filter = None,
        first: Annotated[Day | None, Query(alias="from")] = None,
        last: Annotated[Day | None, Query(alias="to")] = None,
        wanted: Annotated[Literal["json", "csv"], Query(alias="format")] = "json",
    ) -> Response:
        """What the sender's own key used, by model or as group_by says: day, model or both."""
        principal = principal_of(request)
        groups = _groups(group_by, (Group.DAY, Group.MODEL)) or (Group.MODEL,)
        selection = _selection(principal.tenant, principal.key_id, model, first, last)
        return await _sums(usage, groups, selection, wanted)

    @router.get("/admin/prices", response_model=None)
    @documented(record({"object": one_of("list"), "data": array(_PRICE)}))
    async def list_prices(request: Request) -> dict[str, Any]:
        require_admin(request)
        return {"object": "list", "data": [_price_shape(entry) for entry in await prices.all()]}

    @router.put("/admin/prices", response_model=None)
    @documented(_PRICE, body=NewPrice)
    async def put_price(request: Request) -> dict[str, Any]:
        actor = require_admin(request).key_id
        body = await read_json(request, NewPrice)
        now_ms = int(time.time() * 1000)
        since_ms = now_ms if body.effective_from is None else body.effective_from * 1000
        cached = body.input_micros if body.cached_input_micros is None else body.cached_input_micros
        entry = PriceEntry(body.model, since_ms, Price(body.input_micros, cached, body.output_micros))
        await prices.put(entry, actor, now_ms)
        return _price_shape(entry)

    return router


async def _sums(usage: UsageReports, groups: Sequence[Group], selection: Selection, wanted: str) -> Response:
    found = await usage.sums(groups, selection, MAX_GROUPS + 1)
    if len(found) > MAX_GROUPS:
        raise PlatformError(
            Code.INVALID_ARGUMENT,
            f"these are more than {MAX_GROUPS} sums: narrow them with from, to, tenant, key or model",
            param="group_by",
            reason="invalid_value",
        )
    if wanted == "csv":
        return StreamingResponse(_sum_pages(groups, found), media_type=_CSV, headers=_attachment("usage"))
    content = {"object": "list", "data": found}
    if len(found) <= _THREAD_FROM_SUMS:
        return json_response(content)
    return Response(await asyncio.to_thread(orjson.dumps, content), media_type="application/json")


async def _sum_pages(groups: Sequence[Group], found: Sequence[Mapping[str, object]]) -> AsyncIterator[bytes]:
    names = [*(group.column for group in groups), *FIGURES]
    for start in range(0, max(1, len(found)), _PAGE_ROWS):
        page = found[start : start + _PAGE_ROWS]
        yield await asyncio.to_thread(csv_page, names, page, with_header=start == 0)


async def _row_pages(usage: UsageReports, selection: Selection) -> AsyncIterator[bytes]:
    yield csv_page(ROW, (), with_header=True)
    place = (0, 0)
    while True:
        page, place = await usage.rows(selection, place, _PAGE_ROWS)
        if not page:
            return
        yield await asyncio.to_thread(csv_page, ROW, page, with_header=False)


def _groups(text: str, allowed: Sequence[Group] | type[Group]) -> tuple[Group, ...]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    known = {group.value: group for group in allowed}
    if unknown := [name for name in names if name not in known]:
        raise PlatformError(
            Code.INVALID_ARGUMENT,
            f"group_by: {unknown[0][:64]!r} is none of {', '.join(known)}",
            param="group_by",
            reason="invalid_value",
        )
    return tuple(known[name] for name in dict.fromkeys(names))


def _selection(
    tenant: str | None, key: str | None, model: str | None, first: date | None, last: date | None
) -> Selection:
    return Selection(tenant, key, model, _day(first), _day(last))


def _day(day: date | None) -> int | None:
    return None if day is None else (day - _EPOCH).days


def _attachment(name: str) -> dict[str, str]:
    stamp = datetime.now(UTC).strftime("%Y-%m-%d")
    return {"content-disposition": f'attachment; filename="{name}-{stamp}.csv"', "cache-control": "no-store"}


def _price_shape(entry: PriceEntry) -> dict[str, Any]:
    return {
        "model": entry.model,
        "input_micros": entry.price.input_micros,
        "cached_input_micros": entry.price.cached_input_micros,
        "output_micros": entry.price.output_micros,
        "effective_from": entry.effective_unix_ms / 1000,
    }
