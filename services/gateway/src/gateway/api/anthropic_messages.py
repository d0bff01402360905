"""POST /v1/messages and /v1/messages/count_tokens: Anthropic's API, over any graph."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Literal

from fastapi import APIRouter
from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from gateway.api.anthropic_rendering import MessageRendering
from gateway.api.anthropic_turns import MessageTurn, TextBlocks, chat_turns, check_turns
from gateway.api.dialects import Dialect
from gateway.api.identity import principal_of
from gateway.api.inference import EVENT_STREAM, InferenceResponse, ask_of, deadline_of, graph_of, json_response
from gateway.api.json_body import Body, invalid, read_json, validate
from gateway.api.openai_answers import MESSAGE
from gateway.api.openai_chat import ChatBody
from gateway.api.openai_params import MAX_STOPS, MaxTokens, ModelName, StopString, TopP
from gateway.api.openai_tools import MAX_TOOLS, Name
from gateway.api.openapi import documented
from gateway.api.openapi_schemas import COUNT, record
from gateway.core.services import Chat, ToolCalls
from gateway.core.serving import Serving

_MAX_MESSAGES = 1024
_ANTHROPIC = Dialect(
    fields={"response_format": "output_config.format", "stop": "stop_sequences"},
    tool_fields={"function.name": "name", "function.parameters": "input_schema"},
)


class MessageTool(Body):
    """A tool that the client runs; those that a server runs are not there."""

    type: Literal["custom"] | None = None
    name: Name
    description: str | None = None
    input_schema: dict[str, Any]
    strict: bool | None = None


class ToolChoice(Body):
    """Whether tools are to be called, and which."""

    type: Literal["auto", "any", "tool", "none"]
    name: Name | None = None
    disable_parallel_tool_use: bool | None = None


class Metadata(Body):
    """What the client says of its user: for its own books."""

    user_id: Annotated[str, Field(max_length=256)] | None = None


class OutputFormat(Body):
    """A schema that the answer keeps to."""

    type: Literal["json_schema"]
    json_schema: dict[str, Any] = Field(alias="schema")


class OutputConfig(Body):
    """How to answer. An effort is tolerated: these models do not think before they answer."""

    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: OutputFormat | None = None


class Thinking(Body):
    """Whether to think before answering: these models cannot."""

    type: Literal["disabled", "adaptive"]


class CountBody(Body):
    """What counting tokens and answering have in common."""

    refused: ClassVar[Mapping[str, str]] = MappingProxyType(
        {
            "container": "there are no containers",
            "context_management": "send the messages that are to be read",
            "inference_geo": "the model runs where this server runs",
            "mcp_servers": "let the client call them, and send their tools",
        }
    )

    model: ModelName
    messages: list[MessageTurn] = Field(min_length=1, max_length=_MAX_MESSAGES)
    system: TextBlocks | None = None
    tools: list[MessageTool] | None = Field(None, max_length=MAX_TOOLS)
    tool_choice: ToolChoice | None = None
    output_config: OutputConfig | None = None
    thinking: Thinking | None = None

    def chat(self) -> ChatBody:
        """The same request in OpenAI's words; raises INVALID_ARGUMENT."""
        check_turns(self.messages)
        return validate(self._chat_fields(), ChatBody)

    def _chat_fields(self) -> dict[str, Any]:
        choice = self.tool_choice
        form = self.output_config.format if self.output_config else None
        fields: dict[str, Any] = {
            "model": self.model,
            "messages": chat_turns(self.system, self.messages),
            "tools": [_openai_tool(tool) for tool in self.tools or ()] or None,
            "tool_choice": _openai_choice(choice),
            "parallel_tool_calls": not (choice and choice.disable_parallel_tool_use),
        }
        if form is not None:
            named = {"name": "answer", "schema": form.json_schema}
            fields["response_format"] = {"type": "json_schema", "json_schema": named}
        return fields


class MessageBody(CountBody):
    """The request."""

    max_tokens: MaxTokens
    metadata: Metadata | None = None
    stop_sequences: list[StopString] | None = Field(None, max_length=MAX_STOPS)
    stream: bool | None = None
    temperature: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    top_p: TopP | None = None

    def _chat_fields(self) -> dict[str, Any]:
        sampling = {"temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p}
        return super()._chat_fields() | sampling | {"max_tokens": self.max_tokens, "stop": self.stop_sequences}


def _openai_tool(tool: MessageTool) -> dict[str, Any]:
    function = {"name": tool.name, "description": tool.description, "parameters": tool.input_schema}
    return {"type": "function", "function": function | {"strict": tool.strict}}


def _openai_choice(choice: ToolChoice | None) -> Any:
    if choice is None:
        return None
    if choice.type == "tool":
        if choice.name is None:
            raise invalid("tool_choice.name", "a choice of the type tool needs the name of the tool")
        return {"type": "function", "function": {"name": choice.name}}
    return "required" if choice.type == "any" else choice.type


def messages_router(serving: Serving) -> APIRouter:
    """The routes."""
    router = APIRouter()

    @router.post("/v1/messages", response_model=None)
    @documented(MESSAGE, body=MessageBody, stream=EVENT_STREAM)
    async def create_message(request: Request) -> Response:
        """Answers a conversation."""
        body = await read_json(request, MessageBody)
        graph = await graph_of(request, serving, body.model)
        with _ANTHROPIC.naming():
            chat = body.chat()
            wanted = chat.request(principal_of(request).tenant)
        ask = ask_of(request, graph, [wanted])
        rendering = MessageRendering(
            model=graph.name,
            stop_sequences=body.stop_sequences or (),
            has_tools=isinstance(wanted.grammar, ToolCalls),
            params=_ANTHROPIC.params(chat),
            request_id=ask.account.request_id,
        )
        return InferenceResponse(serving.run(ask, graph), rendering, ask.account, stream=bool(body.stream))

    @router.post("/v1/messages/count_tokens", response_model=None)
    @documented(record({"input_tokens": COUNT}), body=CountBody)
    async def count_tokens(request: Request) -> Response:
        """Counts the tokens of a conversation without answering it."""
        body = await read_json(request, CountBody)
        principal = principal_of(request)
        graph = await serving.graph(principal, body.model)
        with _ANTHROPIC.naming():
            prompt = body.chat().request(principal.tenant).prompt
        assert isinstance(prompt, Chat)
        tokenized = await serving.tokenize(graph, prompt, deadline_of(request))
        return json_response({"input_tokens": tokenized.num_tokens})

    return router
