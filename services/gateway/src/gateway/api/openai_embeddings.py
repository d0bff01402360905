"""POST /v1/embeddings: OpenAI's embeddings, by the embedder."""

import base64
from array import array
from collections.abc import Sequence
from functools import partial
from typing import Annotated, Literal

import orjson
from fastapi import APIRouter
from pydantic import Discriminator, Field, Tag
from starlette.requests import Request
from starlette.responses import Response

from gateway.api.encoders import EncoderResponse, embed
from gateway.api.identity import principal_of
from gateway.api.inference import account_of, deadline_of
from gateway.api.json_body import Body, read_json
from gateway.api.openai_answers import EMBEDDINGS
from gateway.api.openai_completions import prompt_kind, prompts_of
from gateway.api.openai_params import ModelName, TokenId
from gateway.api.openapi import documented
from gateway.core.services import Embedded, Embedder
from gateway.core.serving import Ask, Serving

_MAX_INPUTS = 2048  # OpenAI's
Text = Annotated[str, Field(min_length=1)]
TokenList = Annotated[list[TokenId], Field(min_length=1)]

Input = Annotated[
    Annotated[Text, Tag("text")]
    | Annotated[list[Text], Tag("texts"), Field(min_length=1, max_length=_MAX_INPUTS)]
    | Annotated[TokenList, Tag("token_ids")]
    | Annotated[list[TokenList], Tag("token_lists"), Field(min_length=1, max_length=_MAX_INPUTS)],
    Discriminator(
        prompt_kind,
        custom_error_type="input_type",
        custom_error_message="must be a string, a list of strings, a list of token ids or a list of those",
    ),
]


class EmbeddingsBody(Body):
    """The request."""

    model: ModelName
    input: Input
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Field(ge=1, le=65536)] | None = None


def _json(body: EmbeddingsBody, embedded: Embedded) -> bytes:
    encode = _base64 if body.encoding_format == "base64" else _floats
    data = [
        {"object": "embedding", "index": index, "embedding": encode(vector)}
        for index, vector in enumerate(embedded.vectors)
    ]
    usage = {"prompt_tokens": embedded.num_tokens, "total_tokens": embedded.num_tokens}
    return orjson.dumps({"object": "list", "data": data, "model": body.model, "usage": usage})


def _floats(vector: Sequence[float]) -> orjson.Fragment:
    """Writes one vector at a time: a single call for all of them would keep the interpreter to itself."""
    return orjson.Fragment(orjson.dumps(list(vector)))


def _base64(vector: Sequence[float]) -> str:
    """Little-endian float32, as OpenAI's clients read it; every platform that we run on is little-endian."""
    return base64.b64encode(array("f", vector).tobytes()).decode("ascii")


def embeddings_router(embedder: Embedder, serving: Serving) -> APIRouter:
    """The route."""
    router = APIRouter()

    @router.post("/v1/embeddings", response_model=None)
    @documented(EMBEDDINGS, body=EmbeddingsBody)
    async def embeddings(request: Request) -> Response:
        """Embeds texts."""
        body = await read_json(request, EmbeddingsBody)
        inputs = tuple(prompts_of(body.input))
        ask = Ask(principal_of(request), account_of(request), deadline_of(request), body.model, inputs=inputs)
        encode = partial(embed, embedder, ask, truncate=False, dimensions=body.dimensions or 0)
        return EncoderResponse(serving, ask, encode, partial(_json, body))

    return router
