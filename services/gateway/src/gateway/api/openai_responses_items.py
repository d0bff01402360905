"""The input of /v1/responses, and the same turns in the words of chat completions."""

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from gateway.api.json_body import Body
from gateway.api.openai_tools import Name

_MAX_ITEMS = 4096
_MAX_PARTS = 1024
CallId = Annotated[str, Field(min_length=1, max_length=256)]


class TextItemPart(Body):
    """Text; output_text is what an earlier answer said."""

    type: Literal["input_text", "output_text"]
    text: str


def _kind(value: object) -> str | None:
    if isinstance(value, str):
        return "string"
    return "list" if isinstance(value, list) else None


Parts = Annotated[
    Annotated[str, Tag("string")] | Annotated[list[TextItemPart], Tag("list"), Field(max_length=_MAX_PARTS)],
    Discriminator(
        _kind, custom_error_type="content_type", custom_error_message="must be a string or a list of text parts"
    ),
]


class MessageItem(Body):
    """A message, of the client or of an earlier answer."""

    type: Literal["message"] | None = None
    role: Literal["user", "assistant", "system", "developer"]
    content: Parts


class CallItem(Body):
    """A call that an earlier answer made."""

    type: Literal["function_call"]
    call_id: CallId
    name: Name
    arguments: str


class CallOutputItem(Body):
    """What came of a call."""

    type: Literal["function_call_output"]
    call_id: CallId
    output: Parts


_ITEMS = ("message", "function_call", "function_call_output")


def _item_kind(value: object) -> str | None:
    if not isinstance(value, dict):
        return None
    kind = value.get("type") or "message"
    return kind if kind in _ITEMS else None


Item = Annotated[
    Annotated[MessageItem, Tag("message")]
    | Annotated[CallItem, Tag("function_call")]
    | Annotated[CallOutputItem, Tag("function_call_output")],
    Discriminator(
        _item_kind,
        custom_error_type="item_value",
        custom_error_message="must be an item of the type message, function_call or function_call_output: "
        "others are not read, and items are not kept",
    ),
]

Input = Annotated[
    Annotated[str, Tag("string"), Field(min_length=1)]
    | Annotated[list[Item], Tag("list"), Field(min_length=1, max_length=_MAX_ITEMS)],
    Discriminator(_kind, custom_error_type="input_type", custom_error_message="must be a string or a list of items"),
]


def chat_turns(instructions: str | None, given: str | list[MessageItem | CallItem | CallOutputItem]) -> list[Any]:
    """The messages of a chat. Calls belong to the assistant's message before them."""
    said: list[dict[str, Any]] = [{"role": "system", "content": instructions}] if instructions else []
    if isinstance(given, str):
        return [*said, {"role": "user", "content": given}]
    for item in given:
        match item:
            case MessageItem():
                said.append({"role": item.role, "content": _text(item.content)})
            case CallOutputItem():
                said.append({"role": "tool", "tool_call_id": item.call_id, "content": _text(item.output)})
            case CallItem():
                if not said or said[-1]["role"] != "assistant":
                    said.append({"role": "assistant", "content": ""})
                function = {"name": item.name, "arguments": item.arguments}
                calls = said[-1].setdefault("tool_calls", [])
                calls.append({"id": item.call_id, "type": "function", "function": function})
    return said


def _text(parts: str | list[TextItemPart]) -> str:
    return parts if isinstance(parts, str) else "\n".join(part.text for part in parts)
