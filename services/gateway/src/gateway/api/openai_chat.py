"""POST /v1/chat/completions: OpenAI's chat, over any graph."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Annotated, ClassVar, Literal

import orjson
from fastapi import APIRouter
from pydantic import Discriminator, Field, Tag
from starlette.requests import Request
from starlette.responses import Response

from gateway.api.identity import principal_of
from gateway.api.inference import EVENT_STREAM, InferenceResponse, ask_of, graph_of
from gateway.api.json_body import Body, invalid, read_json, unsupported
from gateway.api.openai_answers import CHAT_COMPLETION
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
from gateway.api.openapi import documented
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

    def check(self, number: int) -> None:
        """Raises INVALID_ARGUMENT for fields that do not fit together."""
        if self.content is None and not (self.role == "assistant" and (self.tool_calls or self.refusal)):
            raise invalid(f"messages[{number}]", "the message has no content")
        if self.role == "tool" and self.tool_call_id is None:
            raise invalid(f"messages[{number}]", "a message of the role tool needs the tool_call_id that it answers")

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

    def check(self) -> None:
        """Raises INVALID_ARGUMENT for fields that do not fit together; what each may be was checked before."""
        self.check_options()
        if self.top_logprobs is not None and not self.logprobs:
            raise invalid("top_logprobs", "needs logprobs: true")
        for number, turn in enumerate(self.messages):
            turn.check(number)
        _check_calls_are_answered(self.messages)

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
                raise unsupported(name, f"{name} is not supported beside tools")
            schema = grammar.source or '{"type": "object"}'
        tools = [(self.tools or [])[place] for place in places]
        is_parallel = self.parallel_tool_calls is not False
        calls = wanted_calls(tools, self.tool_choice, is_parallel=is_parallel, json_schema=schema)
        return calls, calls.tools_json

    def request(self, tenant: str, *, priority: int = 0) -> GraphRequest:
        """What the graph is asked; raises INVALID_ARGUMENT for fields that do not fit together."""
        self.check()
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


def _check_calls_are_answered(turns: Sequence[ChatTurn]) -> None:
    open_ids: set[str] = set()
    for number, turn in enumerate(turns):
        if turn.role == "tool":
            if turn.tool_call_id not in open_ids:
                message = f"message {number} of the role tool answers no tool_calls of a message before it"
                raise invalid("messages", message)
            open_ids.discard(turn.tool_call_id or "")
            continue
        if open_ids:
            raise invalid("messages", f"the tool_calls {sorted(open_ids)} are not answered before message {number}")
        open_ids = {call.id for call in turn.tool_calls or ()}
    if open_ids:
        raise invalid("messages", f"the tool_calls {sorted(open_ids)} are not answered by messages of the role tool")


def _dump(value: object) -> str:
    return orjson.dumps(value).decode()


def chat_router(serving: Serving) -> APIRouter:
    """The route."""
    router = APIRouter()

    @router.post("/v1/chat/completions", response_model=None)
    @documented(CHAT_COMPLETION, body=ChatBody, stream=EVENT_STREAM)
    async def chat_completions(request: Request) -> Response:
        """Answers a chat."""
        body = await read_json(request, ChatBody)
        graph = await graph_of(request, serving, body.model)
        wanted = body.request(principal_of(request).tenant)
        ask = ask_of(request, graph, [wanted])
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
