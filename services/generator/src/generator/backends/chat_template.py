"""Renders a chat with the template that came with a model, in jinja2's sandbox and with nothing else in reach.

The sandbox is the model store's: what was probed when a model was added is what runs here. Tools are rendered by a
template that writes calls in our form (core.tool_calls), and by tool_prompt for every other one.
"""

import contextlib
import json
from collections.abc import Callable, Sequence
from typing import Any

import jinja2

from chassis.errors import Code, PlatformError
from generator.backends.tool_prompt import with_tools
from generator.core import tool_calls
from generator.core.text import ChatMessage
from modelstore.chat_sandbox import make_environment


class ChatTemplate:
    """A compiled template. Raises PlatformError(DATA_LOSS) when the model's file is no template."""

    def __init__(self, source: str, special_tokens: dict[str, str]) -> None:
        environment = make_environment()
        self._special_tokens = special_tokens
        self._knows_tools = "tools" in source and tool_calls.BEGIN in source
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise PlatformError(Code.DATA_LOSS, f"the model's chat template is broken: {error}") from error

    def render(self, messages: Sequence[ChatMessage], tools_json: str, guard: Callable[[str], str] = str) -> str:
        """Returns the prompt, open for the assistant's turn. Raises PlatformError for turns it does not allow.

        `guard` is applied to every string that comes from the client, before the template sees it.
        """
        tools = _guarded(_load_list("tools", tools_json), guard)
        turns = [_guarded(_as_dict(place, message), guard) for place, message in enumerate(messages)]
        if not self._knows_tools:
            turns, tools = with_tools(turns, tools), []
        try:
            return self._template.render(
                messages=turns,
                tools=tools or None,
                documents=None,
                add_generation_prompt=True,
                **self._special_tokens,
            )
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise PlatformError(
                Code.INVALID_ARGUMENT, f"the model's chat template refused the messages: {error}", param="messages"
            ) from error


def _as_dict(place: int, message: ChatMessage) -> dict[str, Any]:
    turn: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.tool_calls_json:
        param = f"messages[{place}].tool_calls"
        calls = _load_list(param, message.tool_calls_json)
        turn["tool_calls"] = [_with_arguments(f"{param}[{number}]", call) for number, call in enumerate(calls)]
    if message.tool_call_id:
        turn["tool_call_id"] = message.tool_call_id
    return turn


def _with_arguments(param: str, call: Any) -> dict[str, Any]:
    """Returns a call whose arguments are an object, as templates want them: on the wire they are its JSON text."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise PlatformError(Code.INVALID_ARGUMENT, f"{param} must have a function with a name", param=param)
    arguments = function.get("arguments", "")
    if isinstance(arguments, str):
        with contextlib.suppress(ValueError, RecursionError):  # what was cut off once is shown as it was
            arguments = json.loads(arguments) if arguments else {}
    return {**call, "function": {**function, "arguments": arguments}}


def _guarded(value: Any, guard: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return guard(value)
    if isinstance(value, list):
        return [_guarded(item, guard) for item in value]
    if isinstance(value, dict):
        return {guard(key): _guarded(item, guard) for key, item in value.items()}
    return value


def _load_list(param: str, text: str) -> list[Any]:
    if not text:
        return []
    try:
        value = json.loads(text)
    except ValueError as error:
        raise PlatformError(Code.INVALID_ARGUMENT, f"{param} is not valid JSON: {error}", param=param) from error
    if not isinstance(value, list):
        raise PlatformError(Code.INVALID_ARGUMENT, f"{param} must be a JSON list", param=param)
    return value
