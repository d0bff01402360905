"""POST /v1/chat/completions: OpenAI's chat, over any graph."""

import time
import uuid
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal

import orjson
from fastapi import APIRouter
from pydantic import Discriminator, Field, Tag, ValidationInfo, field_validator, model_validator
from starlette.requests import Request
from starlette.responses import Response

from chassis.errors import Code, PlatformError
from gateway.api.identity import principal_of
from gateway.api.inference import InferenceResponse, JsonObject, account_of, deadline_of
from gateway.api.json_body import Body, read_json
from gateway.api.openai_logprobs import chat_logprobs
from gateway.api.openai_params import MaxTokens, SamplingBody, usage_object
from gateway.core.catalog import Catalog
from gateway.core.graph import GraphEvent, GraphRequest, Grounding
from gateway.core.services import Chat, Delta, Done, Finished, Grammar, Message, Started, TokenLogprob, Usage

_MAX_MESSAGES = 4096
_MAX_TOP_LOGPROBS = 20


class TextPart(Body):
    """A part of a message; this server reads text only."""

    type: Literal["text"]
    text: str


def _content_kind(value: object) -> str | None:
    if isinstance(value, str):
        return "string"
    return "parts" if isinstance(value, list) else None


Content = Annotated[
    Annotated[str, Tag("string")] | Annotated[list[TextPart], Tag("parts"), Field(max_length=1024)],
    Discriminator(
        _content_kind,
        custom_error_type="content_type",
        custom_error_message="must be a string or a list of text parts",
    ),
]


class ChatTurn(Body):
    """One message."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None

    @model_validator(mode="after")
    def _has_content(self) -> "ChatTurn":
        if self.content is None and not (self.role == "assistant" and self.tool_calls):
            raise ValueError("the message has no content")
        return self

    def message(self) -> Message:
        """The turn as the core knows it."""
        text = self.content if isinstance(self.content, str) else "\n".join(part.text for part in self.content or ())
        return Message(
            role="system" if self.role == "developer" else self.role,
            content=text,
            tool_calls_json=orjson.dumps(self.tool_calls).decode() if self.tool_calls else "",
            tool_call_id=self.tool_call_id or "",
        )


class JsonSchema(Body):
    """The schema that an answer must keep to."""

    json_schema: dict[str, Any] = Field(alias="schema")


class ResponseFormat(Body):
    """What form the answer must have."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    def grammar(self) -> Grammar | None:
        """The constraint for the generator."""
        if self.type == "text":
            return None
        if self.json_schema is None:
            return Grammar("json_object")
        return Grammar("json_schema", orjson.dumps(self.json_schema.json_schema).decode())

    @model_validator(mode="after")
    def _has_schema(self) -> "ResponseFormat":
        if self.type == "json_schema" and self.json_schema is None:
            raise ValueError("type json_schema needs the field json_schema with a schema")
        return self


class ChatBody(SamplingBody):
    """The request."""

    messages: list[ChatTurn] = Field(min_length=1, max_length=_MAX_MESSAGES)
    max_tokens: MaxTokens | None = None
    max_completion_tokens: MaxTokens | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=_MAX_TOP_LOGPROBS)] | None = None
    response_format: ResponseFormat | None = None
    tools: list[dict[str, Any]] | None = Field(None, max_length=128)
    tool_choice: str | dict[str, Any] | None = None
    collection: Annotated[str, Field(min_length=1, max_length=64)] | None = None

    @field_validator("top_logprobs")
    @classmethod
    def _top_needs_logprobs(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value is not None and not info.data.get("logprobs"):
            raise ValueError("needs logprobs: true")
        return value

    def refuse_what_is_missing(self) -> None:
        """Raises UNIMPLEMENTED for parameters that change the answer and are not there yet."""
        if self.tools and self.tool_choice != "none":
            raise PlatformError(Code.UNIMPLEMENTED, "tools are not supported", param="tools")

    def request(self, tenant: str, *, priority: int = 0) -> GraphRequest:
        """What the graph is asked."""
        return GraphRequest(
            prompt=Chat(tuple(turn.message() for turn in self.messages)),
            tenant=tenant,
            sampling=self.sampling(),
            stopping=self.stopping(self.max_completion_tokens or self.max_tokens),
            n=self.n or 1,
            logprobs=(self.top_logprobs or 0) if self.logprobs else None,
            grammar=self.response_format.grammar() if self.response_format else None,
            collection=self.collection,
            priority=priority,
        )


class _Choice:
    """One completion as it grows."""

    def __init__(self) -> None:
        self.text: list[str] = []
        self.logprobs: list[TokenLogprob] = []
        self.finish_reason: str | None = None


class ChatRendering:
    """Events as chat.completion and chat.completion.chunk."""

    def __init__(
        self, *, model: str, n: int, logprobs: bool, include_usage: bool, max_tokens_name: str = "max_tokens"
    ) -> None:
        # "input" is what the encoder of a graph calls the question.
        self.params: Mapping[str, str] = {
            "prompt": "messages",
            "input": "messages",
            "grammar": "response_format",
            "max_tokens": max_tokens_name,
        }
        self._model = model
        self._logprobs = logprobs
        self._include_usage = include_usage
        self._id = f"chatcmpl-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._choices = [_Choice() for _ in range(n)]
        self._fingerprint: str | None = None
        self._grounding: Grounding | None = None
        self._usage = Usage()

    def take(self, event: GraphEvent) -> Iterable[JsonObject]:
        """The chunks for one event."""
        match event:
            case Delta():
                choice = self._choices[event.index]
                choice.text.append(event.text)
                choice.logprobs.extend(event.logprobs)
                if event.text or event.logprobs:
                    logprobs = chat_logprobs(event.logprobs) if self._logprobs else None
                    yield self._chunk(event.index, {"content": event.text}, logprobs)
            case Started():
                self._fingerprint = event.model_version or None
                for index in range(len(self._choices)):
                    yield self._chunk(index, {"role": "assistant", "content": ""}, None)
            case Finished():
                self._choices[event.index].finish_reason = event.reason
                yield self._chunk(event.index, {}, None, event.reason) | self._grounded()
            case Grounding():
                self._grounding = event
            case Done():
                self._usage = event.usage
                if self._include_usage:
                    yield self._head("chat.completion.chunk") | {"choices": [], "usage": usage_object(event.usage)}

    def whole(self) -> JsonObject:
        """The answer in one piece."""
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": "".join(choice.text), "refusal": None},
                "logprobs": chat_logprobs(choice.logprobs) if self._logprobs else None,
                "finish_reason": choice.finish_reason,
            }
            for index, choice in enumerate(self._choices)
        ]
        head = self._head("chat.completion")
        return head | {"choices": choices, "usage": usage_object(self._usage)} | self._grounded()

    def _head(self, kind: str) -> dict[str, object]:
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": self._model,
            "system_fingerprint": self._fingerprint,
        }

    def _chunk(
        self,
        index: int,
        delta: Mapping[str, object],
        logprobs: Mapping[str, object] | None,
        finish_reason: str | None = None,
    ) -> dict[str, object]:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
        chunk = self._head("chat.completion.chunk") | {"choices": [choice]}
        return chunk | {"usage": None} if self._include_usage else chunk

    def _grounded(self) -> dict[str, object]:
        if self._grounding is None:
            return {}
        sources = [
            {
                "document_id": source.document_id,
                "external_id": source.external_id or None,
                "chunk_id": source.chunk_id,
                "title": source.title,
                "score": source.score,
            }
            for source in self._grounding.sources
        ]
        return {"grounded": self._grounding.grounded, "sources": sources}


def chat_router(catalog: Catalog) -> APIRouter:
    """The route."""
    router = APIRouter()

    @router.post("/v1/chat/completions", response_model=None)
    async def chat_completions(request: Request) -> Response:
        """Answers a chat."""
        body = await read_json(request, ChatBody)
        tenant = principal_of(request).tenant
        graph = await catalog.graph(body.model, tenant)
        account = account_of(request)
        account.model = graph.name
        body.refuse_what_is_missing()
        wanted = body.request(tenant)
        assert isinstance(wanted.prompt, Chat)
        account.prompt_text = "\n".join(message.content for message in wanted.prompt.messages)
        rendering = ChatRendering(
            model=graph.name,
            n=wanted.n,
            logprobs=bool(body.logprobs),
            include_usage=body.include_usage,
            max_tokens_name="max_tokens" if body.max_completion_tokens is None else "max_completion_tokens",
        )
        events = graph.run(wanted, deadline_of(request))
        return InferenceResponse(events, rendering, account, stream=bool(body.stream))

    return router
