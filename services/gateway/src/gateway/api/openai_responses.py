"""POST /v1/responses: OpenAI's newer API, over any graph. Answers are not kept: nothing can refer to an earlier one."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Literal, NoReturn

from fastapi import APIRouter
from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from chassis.errors import Code, PlatformError
from gateway.api.dialects import Dialect
from gateway.api.identity import principal_of
from gateway.api.inference import EVENT_STREAM, InferenceResponse, ask_of, graph_of
from gateway.api.json_body import Body, invalid, read_json, validate
from gateway.api.openai_answers import RESPONSE
from gateway.api.openai_chat import MAX_TOP_LOGPROBS, ChatBody
from gateway.api.openai_params import MaxTokens, ModelName, TopP
from gateway.api.openai_responses_items import Input, chat_turns
from gateway.api.openai_responses_rendering import ResponseRendering
from gateway.api.openai_tools import MAX_TOOLS, Name
from gateway.api.openapi import documented
from gateway.core.services import ToolCalls
from gateway.core.serving import Serving

_LOGPROBS = "message.output_text.logprobs"
_RESPONSES = Dialect(
    fields={
        "messages": "input",
        "response_format": "text.format",
        "response_format.json_schema.name": "text.format.name",
        "response_format.json_schema.schema": "text.format.schema",
        "max_completion_tokens": "max_output_tokens",
    },
    tool_fields={"function.name": "name", "function.parameters": "parameters"},
)


class TextFormat(Body):
    """What form the text must have."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    json_schema: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class TextConfig(Body):
    """How the text is to be."""

    format: TextFormat | None = None
    verbosity: Literal["low", "medium", "high"] | None = None  # tolerated: there is one way that a model talks


class FunctionTool(Body):
    """A function that may be called; the tools that OpenAI runs itself are not there."""

    type: Literal["function"]
    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class NamedTool(Body):
    """A function by its name."""

    type: Literal["function"]
    name: Name


class AllowedTools(Body):
    """Some of the tools."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: list[NamedTool] = Field(min_length=1, max_length=MAX_TOOLS)


class ResponseBody(Body):
    """The request."""

    refused: ClassVar[Mapping[str, str]] = MappingProxyType(
        {
            "background": "wait for the answer, or stream it",
            "context_management": "send the input that is to be read",
            "conversation": "answers are not kept: send the whole conversation as input",
            "moderation": "nothing is moderated here",
            "previous_response_id": "answers are not kept: send the whole conversation as input",
            "prompt": "prompts are not kept: send instructions and input",
            "store": "answers are not kept: send store: false, or leave it out",
        }
    )

    model: ModelName
    input: Input
    instructions: str | None = None
    max_output_tokens: MaxTokens | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: TopP | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    include: list[str] | None = Field(None, max_length=16)
    text: TextConfig | None = None
    tools: list[FunctionTool] | None = Field(None, max_length=MAX_TOOLS)
    tool_choice: Literal["none", "auto", "required"] | NamedTool | AllowedTools | None = None
    parallel_tool_calls: bool | None = None
    stream: bool | None = None
    truncation: Literal["disabled"] | None = None
    metadata: Annotated[dict[str, str], Field(max_length=16)] | None = None
    user: str | None = None

    @property
    def wants_logprobs(self) -> bool:
        """Whether log probabilities are told."""
        return _LOGPROBS in (self.include or ()) or bool(self.top_logprobs)

    def chat(self) -> ChatBody:
        """The same request in the words of chat completions; raises INVALID_ARGUMENT."""
        return validate(
            {
                "model": self.model,
                "messages": chat_turns(self.instructions, self.input),
                "max_completion_tokens": self.max_output_tokens,
                "temperature": self.temperature,
                "top_p": self.top_p,
                "logprobs": self.wants_logprobs,
                "top_logprobs": self.top_logprobs if self.wants_logprobs else None,
                "response_format": self._response_format(),
                "tools": [_chat_tool(tool) for tool in self.tools or ()] or None,
                "tool_choice": _chat_choice(self.tool_choice),
                "parallel_tool_calls": self.parallel_tool_calls,
            },
            ChatBody,
        )

    def _response_format(self) -> dict[str, Any] | None:
        form = self.text.format if self.text else None
        if form is None or form.type != "json_schema":
            return {"type": form.type} if form else None
        if form.json_schema is None or form.name is None:
            missing = "schema" if form.json_schema is None else "name"
            raise invalid(f"text.format.{missing}", f"a format of the type json_schema needs a {missing}")
        return {"type": form.type, "json_schema": {"name": form.name, "schema": form.json_schema}}

    def echoed(self) -> dict[str, object]:
        """What the answer repeats of the request."""
        said = self.model_dump(by_alias=True, exclude_none=True, include={"tools", "tool_choice", "text", "metadata"})
        return {
            "instructions": self.instructions,
            "max_output_tokens": self.max_output_tokens,
            "metadata": said.get("metadata", {}),
            "parallel_tool_calls": self.parallel_tool_calls is not False,
            "previous_response_id": None,
            "store": False,
            "temperature": self.temperature,
            "text": {"format": {"type": "text"}} | said.get("text", {}),
            "tool_choice": said.get("tool_choice", "auto"),
            "tools": said.get("tools", []),
            "top_logprobs": self.top_logprobs or 0,
            "top_p": self.top_p,
            "truncation": "disabled",
            "user": self.user,
        }


def _chat_tool(tool: FunctionTool) -> dict[str, Any]:
    return {"type": "function", "function": tool.model_dump(exclude={"type"})}


def _chat_choice(choice: str | NamedTool | AllowedTools | None) -> Any:
    if isinstance(choice, NamedTool):
        return {"type": "function", "function": {"name": choice.name}}
    if isinstance(choice, AllowedTools):
        tools = [_chat_choice(tool) for tool in choice.tools]
        return {"type": "allowed_tools", "allowed_tools": {"mode": choice.mode, "tools": tools}}
    return choice


def responses_router(serving: Serving) -> APIRouter:
    """The routes."""
    router = APIRouter()

    @router.post("/v1/responses", response_model=None)
    @documented(RESPONSE, body=ResponseBody, stream=EVENT_STREAM)
    async def create_response(request: Request) -> Response:
        """Answers an input."""
        body = await read_json(request, ResponseBody)
        graph = await graph_of(request, serving, body.model)
        with _RESPONSES.naming():
            chat = body.chat()
            wanted = chat.request(principal_of(request).tenant)
        ask = ask_of(request, graph, [wanted])
        rendering = ResponseRendering(
            model=graph.name,
            echoed=body.echoed(),
            has_tools=isinstance(wanted.grammar, ToolCalls),
            logprobs=body.wants_logprobs,
            params=_RESPONSES.params(chat),
        )
        return InferenceResponse(serving.run(ask, graph), rendering, ask.account, stream=bool(body.stream))

    async def not_kept(request: Request, response_id: str) -> NoReturn:
        """Answers are not kept."""
        principal_of(request)
        message = f"there is no response {response_id[:100]!r}: this server keeps none"
        raise PlatformError(Code.NOT_FOUND, message, param="response_id", reason="response_not_found")

    kept = "/v1/responses/{response_id}"
    for path, methods in ((kept, ["GET", "DELETE"]), (f"{kept}/cancel", ["POST"]), (f"{kept}/input_items", ["GET"])):
        router.add_api_route(path, not_kept, methods=methods, response_model=None, include_in_schema=False)
    return router
