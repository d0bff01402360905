"""POST /v1/completions: OpenAI's text completion, over graphs that take a plain prompt."""

import random
import time
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Annotated, ClassVar

from fastapi import APIRouter
from pydantic import Discriminator, Field, Tag
from starlette.requests import Request
from starlette.responses import Response

from gateway.api.identity import principal_of
from gateway.api.inference import EVENT_STREAM, DataEvents, InferenceResponse, JsonObject, ask_of, graph_of
from gateway.api.json_body import invalid, read_json, unsupported
from gateway.api.openai_answers import TEXT_COMPLETION
from gateway.api.openai_constraints import ConstrainedBody
from gateway.api.openai_logprobs import CompletionLogprobs
from gateway.api.openai_params import MAX_CHOICES, MaxTokensOrNone, SamplingBody, TokenId, usage_object
from gateway.api.openapi import documented
from gateway.core.graph import Answering, GraphEvent, GraphRequest
from gateway.core.services import Delta, Done, Finished, Started, Usage
from gateway.core.serving import Serving

_DEFAULT_MAX_TOKENS = 16  # OpenAI's
_MAX_LOGPROBS = 20


def prompt_kind(value: object) -> str | None:
    """Which of the four forms of a prompt this is; None for none of them."""
    if isinstance(value, str):
        return "text"
    if not isinstance(value, list):
        return None
    first = value[0] if value else ""
    if isinstance(first, str):
        return "texts"
    return "token_lists" if isinstance(first, list) else "token_ids"


Prompts = Annotated[
    Annotated[str, Tag("text")]
    | Annotated[list[str], Tag("texts"), Field(min_length=1)]
    | Annotated[list[TokenId], Tag("token_ids"), Field(min_length=1)]
    | Annotated[list[Annotated[list[TokenId], Field(min_length=1)]], Tag("token_lists"), Field(min_length=1)],
    Discriminator(
        prompt_kind,
        custom_error_type="prompt_type",
        custom_error_message="must be a string, a list of strings, a list of token ids or a list of those",
    ),
]


def prompts_of(value: str | Sequence[object]) -> list[str | tuple[int, ...]]:
    """The single prompts of any of the four forms."""
    if isinstance(value, str):
        return [value]
    if value and isinstance(value[0], int):
        return [tuple(one for one in value if isinstance(one, int))]
    return [one if isinstance(one, str) else tuple(one) for one in value if isinstance(one, str | list)]


class CompletionBody(SamplingBody, ConstrainedBody):
    """The request."""

    refused: ClassVar[Mapping[str, str]] = MappingProxyType(
        {
            **SamplingBody.refused,
            "prompt_embeds": "send a text or token ids",
            "suffix": "what comes behind the completion cannot be given",
        }
    )

    prompt: Prompts
    max_tokens: MaxTokensOrNone | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=_MAX_LOGPROBS)] | None = None
    best_of: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None

    def requests(self, tenant: str) -> list[GraphRequest]:
        """What the graph is asked, one for each prompt.

        Raises INVALID_ARGUMENT for fields that do not fit together, and for a best_of that would choose.
        """
        self.check_options()
        prompts = prompts_of(self.prompt)
        if (num_choices := len(prompts) * (self.n or 1)) > MAX_CHOICES:
            raise invalid("prompt", f"prompts times n make {num_choices} completions, at most {MAX_CHOICES} are run")
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise unsupported("best_of", "best_of other than n is not supported")
        max_tokens = _DEFAULT_MAX_TOKENS if self.max_tokens is None else self.max_tokens
        grammar, _ = self.constraint()
        return [
            GraphRequest(
                prompt=prompt,
                tenant=tenant,
                sampling=self.sampling(),
                stopping=self.stopping(max_tokens),
                n=self.n or 1,
                logprobs=self.logprobs,
                prompt_logprobs=self._prompt_logprobs(prompt),
                grammar=grammar,
            )
            for prompt in prompts
        ]

    def _prompt_logprobs(self, prompt: str | tuple[int, ...]) -> int | None:
        if not self.echo:
            return None
        # The text of token ids is known to the generator alone, which tells it with the log probabilities.
        return 0 if self.logprobs is None and not isinstance(prompt, str) else self.logprobs


class CompletionRendering(DataEvents):
    """Events as text_completion."""

    def __init__(self, body: CompletionBody, requests: Sequence[GraphRequest], model: str) -> None:
        _, form = body.constraint()
        self.params: Mapping[str, str] = {"prompt_logprobs": "echo", "grammar": form}
        self._model = model
        self._echo = bool(body.echo)
        self._include_usage = body.include_usage
        self._continuous_usage = body.continuous_usage
        self._requests = requests
        self._n = requests[0].n
        self._id = f"cmpl-{random.getrandbits(128):032x}"
        self._created = int(time.time())
        num_choices = self._n * len(requests)
        self._texts: list[list[str]] = [[] for _ in range(num_choices)]
        self._reasons: list[str | None] = [None] * num_choices
        self._shapes = (
            [CompletionLogprobs(body.logprobs) for _ in range(num_choices)] if body.logprobs is not None else []
        )
        self._logprobs: list[dict[str, list[object]]] = [shape.take(()) for shape in self._shapes]
        self._fingerprint: str | None = None
        self._usage = Usage()

    def take(self, event: GraphEvent) -> Iterable[JsonObject]:
        """The chunks for one event."""
        match event:
            case Delta():
                if self._continuous_usage:
                    self._usage += Usage(completion_tokens=event.num_tokens)
                if event.text or event.logprobs:
                    yield self._grow(event.index, event.text, event)
            case Started():
                self._fingerprint = event.model_version or None
                self._usage += Usage(prompt_tokens=event.prompt_tokens)
                if self._echo:
                    text = self._prompt_text(event)
                    for choice in range(event.prompt_index * self._n, (event.prompt_index + 1) * self._n):
                        yield self._grow(choice, text, event)
            case Answering():
                self._model = event.model
            case Finished():
                self._reasons[event.index] = event.reason
                yield self._chunk(event.index, "", None, event.reason)
            case Done():
                self._usage = event.usage
                if self._include_usage:
                    yield self._head() | {"choices": [], "usage": usage_object(event.usage)}

    def _prompt_text(self, started: Started) -> str:
        prompt = self._requests[started.prompt_index].prompt
        return prompt if isinstance(prompt, str) else "".join(token.text for token in started.prompt_logprobs)

    def _grow(self, index: int, text: str, event: Delta | Started) -> dict[str, object]:
        self._texts[index].append(text)
        logprobs = None
        if self._shapes:
            tokens = event.logprobs if isinstance(event, Delta) else event.prompt_logprobs
            logprobs = self._shapes[index].take(tokens)
            for name, values in logprobs.items():
                self._logprobs[index][name].extend(values)
        return self._chunk(index, text, logprobs, None)

    def whole(self) -> JsonObject:
        """The answer in one piece."""
        choices = [
            {
                "index": index,
                "text": "".join(text),
                "logprobs": self._logprobs[index] if self._logprobs else None,
                "finish_reason": self._reasons[index],
            }
            for index, text in enumerate(self._texts)
        ]
        return self._head() | {"choices": choices, "usage": usage_object(self._usage)}

    def _head(self) -> dict[str, object]:
        return {
            "id": self._id,
            "object": "text_completion",
            "created": self._created,
            "model": self._model,
            "system_fingerprint": self._fingerprint,
        }

    def _chunk(
        self, index: int, text: str, logprobs: dict[str, list[object]] | None, finish_reason: str | None
    ) -> dict[str, object]:
        choice = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}
        chunk = self._head() | {"choices": [choice]}
        if not self._include_usage:
            return chunk
        return chunk | {"usage": usage_object(self._usage) if self._continuous_usage else None}


def completions_router(serving: Serving) -> APIRouter:
    """The route."""
    router = APIRouter()

    @router.post("/v1/completions", response_model=None)
    @documented(TEXT_COMPLETION, body=CompletionBody, stream=EVENT_STREAM)
    async def completions(request: Request) -> Response:
        """Completes prompts."""
        body = await read_json(request, CompletionBody)
        graph = await graph_of(request, serving, body.model)
        ask = ask_of(request, graph, body.requests(principal_of(request).tenant))
        rendering = CompletionRendering(body, ask.requests, graph.name)
        return InferenceResponse(serving.run(ask, graph), rendering, ask.account, stream=bool(body.stream))

    return router
