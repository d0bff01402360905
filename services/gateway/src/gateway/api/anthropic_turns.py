"""The turns of a conversation as Anthropic's clients send them, and the same turns in OpenAI's words."""

from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Annotated, Any, Literal

import orjson
from pydantic import Discriminator, Field, Tag

from chassis.errors import PlatformError
from gateway.api.json_body import Body, invalid
from gateway.api.openai_tools import Name

_MAX_BLOCKS = 256
BlockId = Annotated[str, Field(min_length=1, max_length=256)]
Text = Annotated[str, Field(min_length=1)]


class TextBlock(Body):
    """Text."""

    type: Literal["text"]
    text: Text


def _kind(value: object) -> str | None:
    if isinstance(value, str):
        return "string"
    return "blocks" if isinstance(value, list) else None


_CONTENT = Discriminator(
    _kind, custom_error_type="content_type", custom_error_message="must be a string or a list of blocks"
)
TextBlocks = Annotated[
    Annotated[str, Tag("string")] | Annotated[list[TextBlock], Tag("blocks"), Field(max_length=_MAX_BLOCKS)],
    _CONTENT,
]


class ToolUseBlock(Body):
    """A call that an earlier answer made."""

    type: Literal["tool_use"]
    id: BlockId
    name: Name
    input: dict[str, Any]


class ToolResultBlock(Body):
    """What came of a call."""

    type: Literal["tool_result"]
    tool_use_id: BlockId
    content: TextBlocks | None = None
    is_error: bool | None = None


_BLOCKS = ("text", "tool_use", "tool_result")


def _block_kind(value: object) -> str | None:
    kind = value.get("type") if isinstance(value, dict) else None
    return kind if kind in _BLOCKS else None


Block = Annotated[
    Annotated[TextBlock, Tag("text")]
    | Annotated[ToolUseBlock, Tag("tool_use")]
    | Annotated[ToolResultBlock, Tag("tool_result")],
    Discriminator(
        _block_kind,
        custom_error_type="block_value",
        custom_error_message="must be a block of the type text, tool_use or tool_result: "
        "this server reads no images, documents or other blocks",
    ),
]


class MessageTurn(Body):
    """One turn."""

    role: Literal["user", "assistant", "system"]
    content: Annotated[
        Annotated[Text, Tag("string")]
        | Annotated[list[Block], Tag("blocks"), Field(min_length=1, max_length=_MAX_BLOCKS)],
        _CONTENT,
    ]

    @property
    def blocks(self) -> Sequence[TextBlock | ToolUseBlock | ToolResultBlock]:
        """The content as blocks."""
        return [TextBlock(type="text", text=self.content)] if isinstance(self.content, str) else self.content


def check_turns(turns: Sequence[MessageTurn]) -> None:
    """Raises INVALID_ARGUMENT unless every call is answered by the turn behind it, and the client has the last word."""
    open_ids: set[str] = set()
    for number, turn in enumerate(turns):
        calls = {block.id for block in turn.blocks if isinstance(block, ToolUseBlock)}
        results = [block.tool_use_id for block in turn.blocks if isinstance(block, ToolResultBlock)]
        if calls and turn.role != "assistant":
            raise _bad(number, "tool_use blocks belong into a turn of the assistant")
        if results and turn.role != "user":
            raise _bad(number, "tool_result blocks belong into a turn of the user")
        if any(isinstance(block, ToolResultBlock) for block in turn.blocks[len(results) :]):
            raise _bad(number, "tool_result blocks must come before the text")
        if set(results) != open_ids or len(results) != len(open_ids):
            raise _bad(number, f"the tool_use blocks before it need one tool_result each: {sorted(open_ids)}")
        open_ids = calls
    if turns[-1].role == "assistant":
        raise _bad(len(turns) - 1, "an answer cannot be begun by the client: the last turn must be the user's")


def _bad(number: int, message: str) -> PlatformError:
    return invalid(f"messages[{number}]", message)


def chat_turns(system: str | list[TextBlock] | None, turns: Iterable[MessageTurn]) -> list[dict[str, Any]]:
    """OpenAI's messages. Turns of one role behind each other are one turn, as Anthropic's API has it."""
    said: list[dict[str, Any]] = [{"role": "system", "content": _text(system)}] if system else []
    for role, group in groupby(turns, key=lambda turn: turn.role):
        blocks = [block for turn in group for block in turn.blocks]
        said += [_tool_turn(block) for block in blocks if isinstance(block, ToolResultBlock)]
        calls = [_call(block) for block in blocks if isinstance(block, ToolUseBlock)]
        text = "\n".join(block.text for block in blocks if isinstance(block, TextBlock))
        if text or calls:
            said.append({"role": role, "content": text} | ({"tool_calls": calls} if calls else {}))
    return said


def _tool_turn(block: ToolResultBlock) -> dict[str, Any]:
    text = _text(block.content)
    return {
        "role": "tool",
        "tool_call_id": block.tool_use_id,
        "content": f"Error: {text}" if block.is_error else text,  # models know of no other way to tell
    }


def _call(block: ToolUseBlock) -> dict[str, Any]:
    function = {"name": block.name, "arguments": orjson.dumps(block.input).decode()}
    return {"id": block.id, "type": "function", "function": function}


def _text(content: str | list[TextBlock] | None) -> str:
    if isinstance(content, str):
        return content
    return "\n".join(block.text for block in content or ())
