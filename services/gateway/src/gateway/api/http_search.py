"""The route of the document search."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from pydantic import AfterValidator, ConfigDict, Field

from chassis.errors import Code, PlatformError
from gateway.api.identity import principal_of
from gateway.api.json_body import Body, read_json
from gateway.api.openapi import documented
from gateway.api.openapi_schemas import NUMBER, TEXT, array, nullable, record
from gateway.core.documents import DEFAULT_COLLECTION
from gateway.core.search import Condition, Hit, Mode, Operator, Question, Scalar, Searcher

_TOP_K = 5
_MAX_CONDITIONS = 32
_MAX_VALUE_CHARS = 1024

Collection = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$")]
MetadataKey = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,63}$")]


def _bounded(value: Scalar) -> Scalar:
    if isinstance(value, str) and len(value) > _MAX_VALUE_CHARS:
        raise ValueError(f"a text may have {_MAX_VALUE_CHARS} characters at most")
    # Beyond 53 bits a number would not come back as it was sent.
    if isinstance(value, int) and abs(value) > 2**53:
        raise ValueError("an integer must lie within 2^53")
    return value


MetadataValue = Annotated[str | bool | int | float, AfterValidator(_bounded)]
MetadataList = Annotated[list[MetadataValue], Field(min_length=1, max_length=100)]


class Comparisons(Body):
    """Comparisons of one metadata value, all of which must hold."""

    model_config = ConfigDict(extra="forbid")

    eq: MetadataValue | None = Field(None, alias="$eq")
    ne: MetadataValue | None = Field(None, alias="$ne")
    lt: MetadataValue | None = Field(None, alias="$lt")
    lte: MetadataValue | None = Field(None, alias="$lte")
    gt: MetadataValue | None = Field(None, alias="$gt")
    gte: MetadataValue | None = Field(None, alias="$gte")
    among: MetadataList | None = Field(None, alias="$in")


class SearchBody(Body):
    """A search. A filter maps metadata keys to a value, a list of values (any of them), or comparisons.

    Null means the default.
    """

    model_config = ConfigDict(extra="forbid")

    query: Annotated[str, Field(min_length=1, max_length=8192)]
    collection: Collection | None = None
    mode: Literal["dense", "keyword", "hybrid"] | None = None
    top_k: Annotated[int, Field(ge=1, le=100)] | None = None
    filter: (
        Annotated[dict[MetadataKey, MetadataValue | MetadataList | Comparisons], Field(max_length=_MAX_CONDITIONS)]
        | None
    ) = None
    group_by: Literal["document"] | None = None


_HIT = record(
    {
        "document_id": TEXT,
        "external_id": nullable(TEXT),
        "chunk_id": TEXT,
        "title": TEXT,
        "text": TEXT,
        "score": NUMBER,
    }
)


def search_router(searcher: Searcher) -> APIRouter:
    """Makes POST /v1/search."""
    router = APIRouter()

    @router.post("/v1/search", response_model=None)
    @documented(record({"hits": array(_HIT)}), body=SearchBody)
    async def search(request: Request) -> dict[str, Any]:
        body = await read_json(request, SearchBody)
        if not body.query.strip():
            raise PlatformError(Code.INVALID_ARGUMENT, "query is blank", param="query")
        question = Question(
            tenant=principal_of(request).tenant,
            query=body.query,
            collection=body.collection or DEFAULT_COLLECTION,
            mode=Mode(body.mode or Mode.DENSE),
            top_k=body.top_k or _TOP_K,
            conditions=conditions_of(body.filter or {}),
            group_by_document=body.group_by == "document",
        )
        return {"hits": [_hit_shape(hit) for hit in await searcher.search(question)]}

    return router


def conditions_of(filter_: Mapping[str, Scalar | Sequence[Scalar] | Comparisons]) -> list[Condition]:
    """Returns the typed conditions of a filter; raises INVALID_ARGUMENT for comparisons without any."""
    conditions: list[Condition] = []
    for key, wanted in filter_.items():
        if isinstance(wanted, Comparisons):
            conditions += _compared(key, wanted)
        elif isinstance(wanted, list):
            conditions.append(Condition(key, Operator.IN, tuple(wanted)))
        else:
            assert isinstance(wanted, Scalar)
            conditions.append(Condition(key, Operator.EQ, (wanted,)))
    return conditions


def _compared(key: str, comparisons: Comparisons) -> list[Condition]:
    given = comparisons.model_dump(by_alias=True, exclude_none=True)
    if not given:
        raise PlatformError(Code.INVALID_ARGUMENT, f"filter.{key} compares with nothing", param=f"filter.{key}")
    return [
        Condition(key, Operator(name), tuple(value) if isinstance(value, list) else (value,))
        for name, value in given.items()
    ]


def _hit_shape(hit: Hit) -> dict[str, Any]:
    return {
        "document_id": hit.document_id,
        "external_id": hit.external_id or None,
        "chunk_id": hit.chunk_id,
        "title": hit.title,
        "text": hit.text,
        "score": hit.score,
    }
