"""POST /generate, in the manner of vLLM's simple server: a prompt and sampling parameters, over any plain graph.

Text is told as prompt and completion in one, and a stream is a line of JSON for every step, each with the whole text
so far.
"""

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Annotated, ClassVar

from fastapi import APIRouter
from pydantic import AfterValidator, ConfigDict, Field, WithJsonSchema
from pydantic.json_schema import SkipJsonSchema
from starlette.requests import Request
from starlette.responses import Response

from chassis.errors import PlatformError
from gateway.api import errors
from gateway.api.identity import principal_of
from gateway.api.inference import JSON_LINES, InferenceResponse, JsonObject, ask_of, deadline_of, graph_of
from gateway.api.json_body import read_json
from gateway.api.openai_params import MAX_STOPS, LogitBias, MaxTokens, ModelName, SamplingBody, TokenId
from gateway.api.openapi import documented
from gateway.api.openapi_schemas import TEXT, array, record
from gateway.core.catalog import Catalog
from gateway.core.graph import Graph, GraphEvent, GraphRequest
from gateway.core.services import Delta
from gateway.core.serving import Serving

_DEFAULT_MAX_TOKENS = 16  # vLLM's
_MAX_CHOICES = 16  # of one prompt, the generator's


def _off(value: bool) -> bool:
    if value:
        raise ValueError("is not supported")
    return value


def _on(value: bool) -> bool:
    if not value:
        raise ValueError("must be true: special tokens are never text")
    return value


class GenerateBody(SamplingBody):
    """The request. Unlike OpenAI's, a field that we do not know is refused, as vLLM's server does."""

    model_config = ConfigDict(extra="forbid")
    refused: ClassVar[Mapping[str, str]] = MappingProxyType({})

    model: ModelName | None = None  # type: ignore[assignment]  # vLLM serves one, and so do we mostly
    stream_options: SkipJsonSchema[None] = None
    n: Annotated[int, Field(ge=1, le=_MAX_CHOICES)] | None = None
    # Which tokens there are, and how many fit, is the model's own: what OpenAI's routes say of these holds here too.
    min_tokens: SkipJsonSchema[Annotated[int, Field(ge=0)] | None] = None
    logit_bias: SkipJsonSchema[LogitBias | None] = None
    stop_token_ids: SkipJsonSchema[Annotated[list[TokenId], Field(max_length=MAX_STOPS)] | None] = None
    prompt: Annotated[str, Field(min_length=1)]
    max_tokens: MaxTokens | None = None
    # What vLLM's clients send although it asks for nothing.
    best_of: Annotated[int, Field(ge=1, le=1)] | None = None
    use_beam_search: Annotated[bool, AfterValidator(_off), WithJsonSchema({"const": False})] | None = None
    skip_special_tokens: Annotated[bool, AfterValidator(_on), WithJsonSchema({"const": True})] | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None  # the answer has no place for them

    def request(self, tenant: str, max_tokens: int | None) -> GraphRequest:
        """What the graph is asked; max_tokens None is up to the end of the context."""
        return GraphRequest(
            prompt=self.prompt,
            tenant=tenant,
            sampling=self.sampling(),
            stopping=self.stopping(max_tokens),
            n=self.n or 1,
        )


async def _fitting(request: Request, serving: Serving, graph: Graph, body: GenerateBody) -> int | None:
    """The completion's length: as vLLM's server has it, one that does not fit ends where the context does."""
    wanted = body.max_tokens or _DEFAULT_MAX_TOKENS
    if wanted <= _DEFAULT_MAX_TOKENS or not graph.uses_generator:
        return wanted
    prompt = await serving.tokenize(graph, body.prompt, deadline_of(request))
    return wanted if prompt.num_tokens + wanted <= prompt.context_length else None


class GenerateRendering:
    """Events as {"text": [...]}, one text for each completion."""

    framing = JSON_LINES
    params: Mapping[str, str] = MappingProxyType({})

    def __init__(self, prompt: str, n: int) -> None:
        self._texts = [[prompt] for _ in range(n)]

    def take(self, event: GraphEvent) -> Iterable[JsonObject]:
        """The lines for one event."""
        if isinstance(event, Delta) and event.text:
            self._texts[event.index].append(event.text)
            yield self.whole()

    def whole(self) -> JsonObject:
        """The texts so far."""
        return {"text": ["".join(text) for text in self._texts]}

    def failure(self, error: PlatformError) -> Iterable[JsonObject]:
        """A line that is no text."""
        yield errors.envelope(error)


def generate_router(serving: Serving, catalog: Catalog) -> APIRouter:
    """The route."""
    router = APIRouter()

    @router.post("/generate", response_model=None)
    @documented(record({"text": array(TEXT)}), body=GenerateBody, stream=JSON_LINES.media_type)
    async def generate(request: Request) -> Response:
        """Completes a prompt."""
        body = await read_json(request, GenerateBody)
        model = body.model or catalog.only_plain()
        graph = await graph_of(request, serving, model)
        max_tokens = await _fitting(request, serving, graph, body)
        wanted = body.request(principal_of(request).tenant, max_tokens)
        ask = ask_of(request, graph, [wanted])
        rendering = GenerateRendering(body.prompt, wanted.n)
        return InferenceResponse(serving.run(ask, graph), rendering, ask.account, stream=bool(body.stream))

    return router
