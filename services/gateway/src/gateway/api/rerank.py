"""POST /v1/rerank and /rerank: documents by their relevance to a query, in the shape of Jina's and Cohere's APIs.

The score is the cosine of query and document as an encoder sees each of them by itself (a bi-encoder): it orders
documents, and is not the probability that a cross-encoder gives.
"""

import uuid
from collections.abc import Iterable
from functools import partial
from operator import mul
from typing import Annotated

import orjson
from fastapi import APIRouter
from pydantic import Discriminator, Field, Tag
from starlette.requests import Request
from starlette.responses import Response

from gateway.api.encoders import EncoderResponse, embed
from gateway.api.identity import principal_of
from gateway.api.inference import account_of, deadline_of
from gateway.api.json_body import Body, read_json
from gateway.api.openai_answers import RANKING
from gateway.api.openai_params import ModelName
from gateway.api.openapi import documented
from gateway.core.services import Embedded, Embedder
from gateway.core.serving import Ask, Serving

_MAX_DOCUMENTS = 1000  # Cohere's
Text = Annotated[str, Field(min_length=1)]


class TextDocument(Body):
    """A document as an object."""

    text: Text


def _kind(value: object) -> str | None:
    if isinstance(value, str):
        return "string"
    return "object" if isinstance(value, dict) else None


Document = Annotated[
    Annotated[Text, Tag("string")] | Annotated[TextDocument, Tag("object")],
    Discriminator(
        _kind, custom_error_type="document_type", custom_error_message="must be a string or an object with a text"
    ),
]


class RerankBody(Body):
    """The request."""

    model: ModelName
    query: Text
    documents: list[Document] = Field(min_length=1, max_length=_MAX_DOCUMENTS)
    top_n: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    return_documents: bool | None = None  # null: yes

    def texts(self) -> list[str]:
        """The documents' texts."""
        return [one if isinstance(one, str) else one.text for one in self.documents]


def rerank_router(embedder: Embedder, serving: Serving) -> APIRouter:
    """The routes."""
    router = APIRouter()

    @documented(RANKING, body=RerankBody)
    async def rerank(request: Request) -> Response:
        """Orders documents by their relevance to a query."""
        body = await read_json(request, RerankBody)
        inputs = (body.query, *body.texts())
        ask = Ask(principal_of(request), account_of(request), deadline_of(request), body.model, inputs=inputs)
        # As other rerankers do: of a document that is longer than the encoder reads, its beginning counts.
        encode = partial(embed, embedder, ask, truncate=True)
        return EncoderResponse(serving, ask, encode, partial(_json, body))

    for path in ("/v1/rerank", "/rerank"):
        router.add_api_route(path, rerank, methods=["POST"], response_model=None)
    return router


def _json(body: RerankBody, embedded: Embedded) -> bytes:
    query, *documents = embedded.vectors
    scores = [_cosine(query, document) for document in documents]
    order = sorted(range(len(scores)), key=lambda index: -scores[index])
    texts = body.texts() if body.return_documents is not False else None
    results = [
        {"index": index, "relevance_score": scores[index]} | ({"document": {"text": texts[index]}} if texts else {})
        for index in order[: body.top_n]
    ]
    usage = {"prompt_tokens": embedded.num_tokens, "total_tokens": embedded.num_tokens}
    return orjson.dumps({"id": f"rerank-{uuid.uuid4().hex}", "model": body.model, "results": results, "usage": usage})


def _cosine(one: Iterable[float], other: Iterable[float]) -> float:
    """Of vectors whose length is 1, as the embedder's are."""
    return float(sum(map(mul, one, other)))
