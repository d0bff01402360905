"""Tool calls as a model writes them: the one form that prompts show, grammars enforce and clients of ours parse.

    <tool_call>
    {"name": "get_weather", "arguments": {"city": "Paris"}}
    </tool_call>

It is the form of Hermes, Qwen and SmolLM2's larger siblings. As Grammar(KIND, source) the source is the JSON text of
{"tools": [...], "is_required": bool, "is_parallel": bool}, the tools as OpenAI's clients send them.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from chassis.errors import Code, PlatformError
from generator.core.grammar import Grammar

KIND = "tool_calls"
BEGIN, END = "<tool_call>", "</tool_call>"
MAX_TOOLS = 128
MAX_CALLS = 16  # of one answer
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_NO_PARAMETERS: Mapping[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the model may call. Where it is not `is_strict`, keywords that cannot be enforced are ignored."""

    name: str
    parameters: Mapping[str, Any]
    is_strict: bool


def tool_grammar(tools_json: str, is_required: bool, is_parallel: bool) -> Grammar:
    """Makes the constraint: free text or calls, or calls alone where they are required; one, or as many as MAX_CALLS.

    Raises PlatformError(INVALID_ARGUMENT) that names the tool at fault.
    """
    tools = read_tools(tools_json)
    if not tools:
        raise _invalid("tools", "tools must not be empty")
    source = {"tools": json.loads(tools_json), "is_required": is_required, "is_parallel": is_parallel}
    return Grammar(KIND, json.dumps(source, ensure_ascii=False))


def read_tools(tools_json: str) -> list[Tool]:
    """Reads a list of tools. Raises PlatformError(INVALID_ARGUMENT) that names the tool at fault."""
    try:
        raw = json.loads(tools_json)
    except (ValueError, RecursionError) as error:
        raise _invalid("tools", f"tools is not valid JSON: {error}") from None
    if not isinstance(raw, list) or len(raw) > MAX_TOOLS:
        raise _invalid("tools", f"tools must be a list of at most {MAX_TOOLS}")
    return [_read_tool(place, tool) for place, tool in enumerate(raw)]


def schema_param(place: int) -> str:
    """Returns what the public API calls the schema of the tool at this place."""
    return f"tools[{place}].function.parameters"


def to_lark(grammar: Grammar, json_options: Mapping[str, object]) -> str:
    """Returns the constraint in llguidance's Lark; `json_options` hold for all schemas."""
    source = json.loads(grammar.source)
    tools = read_tools(json.dumps(source["tools"]))
    most = MAX_CALLS - 1 if source["is_parallel"] else 0
    more = f' ("\\n" call){{0,{most}}}' if most else ""
    lines = [f"start: call{more}"]
    if not source["is_required"]:
        # `begin` is lazy, it ends with the first tag: from there on the text is a call.
        lines = [
            f"start: TEXT | first{more}",
            f"TEXT: /(?s:.*)/ & ~/(?s:.*){BEGIN}(?s:.*)/",
            f'begin[lazy]: ANY "{BEGIN}"',
            "ANY: /(?s:.*)/",
            f'first: begin "\\n" body "\\n{END}"',
        ]
    lines.append(f'call: "{BEGIN}\\n" body "\\n{END}"')
    lines.append("body: " + " | ".join(f"body_{place}" for place in range(len(tools))))
    for place, tool in enumerate(tools):
        options = {**json_options, "lenient": not tool.is_strict}
        schema = json.dumps({**tool.parameters, "x-guidance": options})
        head = json.dumps(f'{{"name": "{tool.name}", "arguments": ')
        lines.append(f'body_{place}: {head} arguments_{place} "}}"')
        lines.append(f"arguments_{place}: %json {schema}")
    return "\n".join(lines)


def _read_tool(place: int, raw: object) -> Tool:
    function = raw.get("function") if isinstance(raw, dict) and raw.get("type") == "function" else None
    if not isinstance(function, dict):
        raise _invalid(f"tools[{place}]", f'tools[{place}] must be of type "function" and have a function')
    name = function.get("name")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        param = f"tools[{place}].function.name"
        raise _invalid(param, f"{param} must match {_NAME.pattern}")
    parameters = function.get("parameters")
    if parameters is None:
        parameters = _NO_PARAMETERS
    if not isinstance(parameters, dict) or parameters.get("type", "object") != "object":
        message = f'{schema_param(place)} must be a JSON Schema of type "object"'
        raise _invalid(schema_param(place), message)
    return Tool(name, {"type": "object", **parameters}, function.get("strict") is True)


def _invalid(param: str, message: str) -> PlatformError:
    return PlatformError(Code.INVALID_ARGUMENT, message, param=param, reason="invalid_value")
