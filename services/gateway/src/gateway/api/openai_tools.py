"""Tools as OpenAI's clients send them, and their calls as those clients read them."""

import uuid
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal

import orjson
from pydantic import Field

from chassis.errors import Code, PlatformError
from gateway.api.json_body import Body
from gateway.core.services import Delta, ToolCallDelta, ToolCalls
from gateway.core.tool_calls import Arguments, CallBegun, Piece, ToolCallReader

MAX_TOOLS = 128
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]


class FunctionSpec(Body):
    """A function that may be called."""

    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Body):
    """A tool; functions are the only kind."""

    type: Literal["function"]
    function: FunctionSpec

    def json_object(self) -> dict[str, Any]:
        """The tool as the generator and its prompts read it."""
        return {"type": self.type, "function": self.function.model_dump(exclude_none=True)}


class NamedFunction(Body):
    """A function by its name."""

    name: Name


class NamedTool(Body):
    """A tool by its name."""

    type: Literal["function"]
    function: NamedFunction


class AllowedTools(Body):
    """Some of the tools."""

    mode: Literal["auto", "required"]
    tools: list[NamedTool] = Field(min_length=1, max_length=MAX_TOOLS)


class AllowedToolsChoice(Body):
    """The choice of some of the tools."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


ToolChoice = Literal["none", "auto", "required"] | NamedTool | AllowedToolsChoice


class CalledFunction(Body):
    """A function with the arguments of one call."""

    name: Name
    arguments: str


class CalledTool(Body):
    """A call that an earlier answer made."""

    id: Annotated[str, Field(min_length=1, max_length=256)]
    type: Literal["function"]
    function: CalledFunction


def callable_tools(tools: Sequence[Tool], choice: ToolChoice | None) -> list[int]:
    """Places of the tools that the answer may call. Raises INVALID_ARGUMENT for a choice of what is not there."""
    if choice == "none" or (choice in (None, "auto") and not tools):
        return []
    if not tools:
        raise _bad_choice("tool_choice is only allowed when tools are given")
    names = {tool.function.name for tool in tools}
    if isinstance(choice, NamedTool):
        names = _known([choice], names)
    elif isinstance(choice, AllowedToolsChoice):
        names = _known(choice.allowed_tools.tools, names)
    return [place for place, tool in enumerate(tools) if tool.function.name in names]


def wanted_calls(tools: Sequence[Tool], choice: ToolChoice | None, *, is_parallel: bool, json_schema: str) -> ToolCalls:
    """What is asked of an answer that may call these tools."""
    is_named = isinstance(choice, NamedTool)
    is_required = choice == "required" or is_named
    if isinstance(choice, AllowedToolsChoice):
        is_required = choice.allowed_tools.mode == "required"
    tools_json = orjson.dumps([tool.json_object() for tool in tools]).decode()
    return ToolCalls(tools_json, is_required, is_parallel and not is_named, json_schema)


def _known(chosen: Iterable[NamedTool], names: set[str]) -> set[str]:
    wanted = {tool.function.name for tool in chosen}
    for name in sorted(wanted - names):
        raise _bad_choice(f"tool_choice names the function {name!r}, which is none of the tools")
    return wanted


def _bad_choice(message: str) -> PlatformError:
    return PlatformError(Code.INVALID_ARGUMENT, message, param="tool_choice", reason="invalid_value")


class ToolCallRendering:
    """The calls of one completion as they grow."""

    def __init__(self) -> None:
        self._reader = ToolCallReader()
        self._calls: list[dict[str, Any]] = []
        self._text: list[str] = []

    @property
    def has_calls(self) -> bool:
        """Whether there is a call."""
        return bool(self._calls)

    def take(self, delta: Delta) -> Iterable[tuple[dict[str, object], bool]]:
        """The deltas for a piece of the answer, each with whether it is text, which log probabilities are told of."""
        was_in_call = self._reader.is_in_call
        shown = [self._render(piece) for piece in self._reader.feed(delta.text)]
        if delta.logprobs and not was_in_call and not shown:
            shown = [({"content": ""}, True)]  # of text that is held back
        return shown

    def take_call(self, piece: ToolCallDelta) -> dict[str, object]:
        """The delta for a piece of a call that needs not be read out of the text."""
        if piece.number == len(self._calls):
            self._reader.num_calls += 1
            return self._begin(piece.number, piece.call_id, piece.name, piece.arguments)
        return self._grow(piece.number, piece.arguments)

    def finish(self) -> Iterable[tuple[dict[str, object], bool]]:
        """The deltas for the end of the answer."""
        return [self._render(piece) for piece in self._reader.finish()]

    def message(self) -> Mapping[str, object]:
        """The fields of the whole message."""
        text = "".join(self._text)
        if not self._calls:
            return {"content": text}
        return {"content": text or None, "tool_calls": self._calls}

    def _render(self, piece: Piece) -> tuple[dict[str, object], bool]:
        match piece:
            case CallBegun():
                return self._begin(piece.number, f"call_{uuid.uuid4().hex[:24]}", piece.name, ""), False
            case Arguments():
                return self._grow(piece.number, piece.text), False
            case str():
                self._text.append(piece)
                return {"content": piece}, True

    def _begin(self, number: int, call_id: str, name: str, arguments: str) -> dict[str, object]:
        head = {"id": call_id, "type": "function"}
        self._calls.append({**head, "function": {"name": name, "arguments": arguments}})
        return {"tool_calls": [{"index": number, **head, "function": {"name": name, "arguments": arguments}}]}

    def _grow(self, number: int, arguments: str) -> dict[str, object]:
        self._calls[number]["function"]["arguments"] += arguments
        return {"tool_calls": [{"index": number, "function": {"arguments": arguments}}]}
