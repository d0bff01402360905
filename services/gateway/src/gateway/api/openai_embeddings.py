"""POST /v1/embeddings: OpenAI's embeddings, by the embedder."""

import asyncio
import base64
from array import array
from collections.abc import Sequence
from typing import Annotated, Literal

import orjson
from fastapi import APIRouter
from pydantic import Discriminator, Field, Tag
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from chassis.errors import Code, PlatformError
from gateway.api.identity import principal_of
from gateway.api.inference import account_of, deadline_of, finished_before_client_left
from gateway.api.json_body import Body, read_json
from gateway.api.openai_completions import prompt_kind, prompts_of
from gateway.api.openai_params import ModelName, TokenId
from gateway.core.catalog import model_not_found
from gateway.core.graph import Deadline
from gateway.core.services import Embedded, Embedder, Usage
from gateway.core.serving import Ask, Serving

_MAX_INPUTS = 2048  # OpenAI's
_THREAD_FROM_VECTORS = 64  # more take over 5 ms to write and would hold up the event loop
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


class _EmbeddingsResponse(Response):
    """Asks the embedder while it answers, so that a client that leaves is noticed."""

    def __init__(self, body: EmbeddingsBody, embedder: Embedder, serving: Serving, ask: Ask) -> None:
        super().__init__()
        self._body = body
        self._embedder = embedder
        self._serving = serving
        self._ask = ask

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Works until everything was sent or the client left."""
        if not await finished_before_client_left(self._answer(scope, receive, send), receive):
            self._ask.account.finish_reason = "cancelled"

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        body, account = self._body, self._ask.account
        async with self._serving.hold(self._ask):
            embedded = await _embed(self._embedder, body, self._ask.deadline)
            account.model = body.model
            account.done(Usage(prompt_tokens=embedded.num_tokens))
            account.finish_reason = "stop"
        if len(embedded.vectors) > _THREAD_FROM_VECTORS:
            content = await asyncio.to_thread(_json, body, embedded)
        else:
            content = _json(body, embedded)
        await Response(content, media_type="application/json")(scope, receive, send)


async def _embed(embedder: Embedder, body: EmbeddingsBody, deadline: Deadline) -> Embedded:
    try:
        return await embedder.embed(
            body.model,
            prompts_of(body.input),  # type: ignore[arg-type]  # all texts or all token lists: the body's type says so
            truncate=False,
            dimensions=body.dimensions or 0,
            timeout_s=deadline.remaining_s(),
        )
    except PlatformError as error:
        if error.code is Code.NOT_FOUND:
            raise model_not_found(body.model) from None
        raise


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
    async def embeddings(request: Request) -> Response:
        """Embeds texts."""
        body = await read_json(request, EmbeddingsBody)
        inputs = tuple(prompts_of(body.input))
        ask = Ask(principal_of(request), account_of(request), deadline_of(request), body.model, inputs=inputs)
        return _EmbeddingsResponse(body, embedder, serving, ask)

    return router
