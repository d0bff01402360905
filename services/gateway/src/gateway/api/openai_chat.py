"""POST /v1/chat/completions: OpenAI's chat, over any graph."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, ClassVar, Literal

import orjson
from fastapi import APIRouter
from pydantic import Discriminator, Field, Tag, ValidationInfo, field_validator, model_validator
from starlette.requests import Request
from starlette.responses import Response

from chassis.errors import Code, PlatformError
from gateway.api.inference import InferenceResponse, open_ask
from gateway.api.json_body import Body, read_json
from gateway.api.openai_chat_rendering import ChatRendering
from gateway.api.openai_constraints import ConstrainedBody, ResponseFormat
from gateway.api.openai_params import MaxTokens, SamplingBody
from gateway.api.openai_tools import (
    MAX_TOOLS,
    CalledTool,
    Tool,
    ToolChoice,
    callable_tools,
    wanted_calls,
)
from gateway.core.graph import GraphRequest
from gateway.core.services import (
    Chat,
    Grammar,
    Message,
    ToolCalls,
)
from gateway.core.serving import Serving

_MAX_MESSAGES = 4096
MAX_TOP_LOGPROBS = 20


class TextPart(Body):
    """A part of a message; this server reads text only."""

    type: Literal["text"]
    text: str


class RefusalPart(Body):
    """What an assistant said in place of an answer; it is read as what it said."""

    type: Literal["refusal"]
    text: str = Field(alias="refusal")


def _part_kind(value: object) -> str:
    return "refusal" if isinstance(value, dict) and value.get("type") == "refusal" else "text"


Part = Annotated[Annotated[TextPart, Tag("text")] | Annotated[RefusalPart, Tag("refusal")], Discriminator(_part_kind)]


def _content_kind(value: object) -> str | None:
    if isinstance(value, str):
        return "string"
    return "parts" if isinstance(value, list) else None


Content = Annotated[
    Annotated[str, Tag("string")] | Annotated[list[Part], Tag("parts"), Field(max_length=1024)],
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
    refusal: str | None = None  # of an assistant, in place of content
    tool_calls: list[CalledTool] | None = Field(None, max_length=MAX_TOOLS)
    tool_call_id: Annotated[str, Field(min_length=1, max_length=256)] | None = None

    @model_validator(mode="after")
    def _has_content(self) -> "ChatTurn":
        if self.content is None and not (self.role == "assistant" and (self.tool_calls or self.refusal)):
            raise ValueError("the message has no content")
        if self.role == "tool" and self.tool_call_id is None:
            raise ValueError("a message of the role tool needs the tool_call_id that it answers")
        return self

    def message(self) -> Message:
        """The turn as the core knows it."""
        content = self.refusal if self.content is None else self.content
        text = content if isinstance(content, str) else "\n".join(part.text for part in content or ())
        return Message(
            role="system" if self.role == "developer" else self.role,
            content=text,
            tool_calls_json=_dump([call.model_dump() for call in self.tool_calls]) if self.tool_calls else "",
            tool_call_id=self.tool_call_id or "",
        )


class ChatBody(SamplingBody, ConstrainedBody):
    """The request."""

    refused: ClassVar[Mapping[str, str]] = MappingProxyType(
        {
            **SamplingBody.refused,
            "add_special_tokens": "the model's template says which there are",
            "audio": "this server writes text",
            "chat_template": "the model's own is used",
            "chat_template_kwargs": "the model's own template is used as it is",
            "continue_final_message": "POST /v1/completions continues a text",
            "documents": "hand them in with POST /v1/documents, and ask the model rag",
            "function_call": "send tool_choice",
            "functions": "send tools",
            "moderation": "nothing is moderated here",
            "web_search_options": "nothing is sought in the web",
        }
    )

    messages: list[ChatTurn] = Field(min_length=1, max_length=_MAX_MESSAGES)
    max_tokens: MaxTokens | None = None
    max_completion_tokens: MaxTokens | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    response_format: ResponseFormat | None = None
    tools: list[Tool] | None = Field(None, min_length=1, max_length=MAX_TOOLS)
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    collection: Annotated[str, Field(min_length=1, max_length=64)] | None = None

    @field_validator("top_logprobs")
    @classmethod
    def _top_needs_logprobs(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value is not None and not info.data.get("logprobs"):
            raise ValueError("needs logprobs: true")
        return value

    @field_validator("messages")
    @classmethod
    def _tools_answer_calls(cls, value: list[ChatTurn]) -> list[ChatTurn]:
        open_ids: set[str] = set()
        for number, turn in enumerate(value):
            if turn.role == "tool":
                if turn.tool_call_id not in open_ids:
                    raise ValueError(f"message {number} of the role tool answers no tool_calls of a message before it")
                open_ids.discard(turn.tool_call_id or "")
                continue
            if open_ids:
                raise ValueError(f"the tool_calls {sorted(open_ids)} are not answered before message {number}")
            open_ids = {call.id for call in turn.tool_calls or ()}
        if open_ids:
            raise ValueError(f"the tool_calls {sorted(open_ids)} are not answered by messages of the role tool")
        return value

    def callable_places(self) -> list[int]:
        """Places of the tools that the answer may call."""
        return callable_tools(self.tools or (), self.tool_choice)

    def params(self) -> Mapping[str, str]:
        """What this request calls the fields that the generator names in its errors, where the names differ."""
        places = self.callable_places()
        _, name = self.constraint(self.response_format)
        # "input" is what the encoder of a graph calls the question.
        names = {"prompt": "messages", "input": "messages", "grammar": name}
        if self.max_completion_tokens is not None:
            names["max_tokens"] = "max_completion_tokens"
        if places and name == "response_format" and self.response_format is None:
            names["grammar"] = "tools"
        fields = ("function.parameters", "function.name")
        return names | {f"tools[{i}].{x}": f"tools[{place}].{x}" for i, place in enumerate(places) for x in fields}

    def _wanted(self) -> tuple[Grammar | ToolCalls | None, str]:
        """The constraint for the generator, and the tools for its prompt."""
        grammar, name = self.constraint(self.response_format)
        places = self.callable_places()
        if not places:
            return grammar, ""
        schema = ""
        if grammar is not None:
            if grammar.kind not in ("json_object", "json_schema"):
                raise PlatformError(Code.UNIMPLEMENTED, f"{name} is not supported beside tools", param=name)
            schema = grammar.source or '{"type": "object"}'
        tools = [(self.tools or [])[place] for place in places]
        is_parallel = self.parallel_tool_calls is not False
        calls = wanted_calls(tools, self.tool_choice, is_parallel=is_parallel, json_schema=schema)
        return calls, calls.tools_json

    def request(self, tenant: str, *, priority: int = 0) -> GraphRequest:
        """What the graph is asked."""
        grammar, tools_json = self._wanted()
        return GraphRequest(
            prompt=Chat(tuple(turn.message() for turn in self.messages), tools_json),
            tenant=tenant,
            sampling=self.sampling(),
            stopping=self.stopping(self.max_completion_tokens or self.max_tokens),
            n=self.n or 1,
            logprobs=(self.top_logprobs or 0) if self.logprobs else None,
            grammar=grammar,
            collection=self.collection,
            priority=priority,
        )


def _dump(value: object) -> str:
    return orjson.dumps(value).decode()


def chat_router(serving: Serving) -> APIRouter:
    """The route."""
    router = APIRouter()

    @router.post("/v1/chat/completions", response_model=None)
    async def chat_completions(request: Request) -> Response:
        """Answers a chat."""
        body = await read_json(request, ChatBody)
        ask, graph = await open_ask(request, serving, body.model, lambda tenant: [body.request(tenant)])
        wanted = ask.requests[0]
        rendering = ChatRendering(
            model=graph.name,
            n=wanted.n,
            logprobs=bool(body.logprobs),
            include_usage=body.include_usage,
            continuous_usage=body.continuous_usage,
            has_tools=isinstance(wanted.grammar, ToolCalls),
            params=body.params(),
        )
        return InferenceResponse(serving.run(ask, graph), rendering, ask.account, stream=bool(body.stream))

    return router
