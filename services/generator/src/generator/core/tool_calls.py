"""Tool calls as a model writes them: the one form that prompts show, grammars enforce and clients of ours parse.

    <tool_call>
    {"name": "get_weather", "arguments": {"city": "Paris"}}
    </tool_call>

It is the form of Hermes, Qwen and SmolLM2's larger siblings. As Grammar(KIND, source) the source is the JSON text of
{"tools": [...], "is_required": bool, "is_parallel": bool, "json_schema": {...} or null}, the tools as OpenAI's clients
send them.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from chassis.errors import Code, PlatformError
from generator.core.grammar import MAX_SOURCE_CHARS, Grammar

KIND = "tool_calls"
BEGIN, END = "<tool_call>", "</tool_call>"
MAX_TOOLS = 128
MAX_CALLS = 16  # of one answer
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_NO_PARAMETERS: Mapping[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}
# Arguments are written as in the prompt, with no white space of the model's own: they are for programs.
_ARGUMENTS: Mapping[str, Any] = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the model may call. Where it is not `is_strict`, keywords that cannot be enforced are ignored."""

    name: str
    parameters: Mapping[str, Any]
    is_strict: bool


def tool_grammar(tools_json: str, is_required: bool, is_parallel: bool, json_schema: str = "") -> Grammar:
    """Makes the constraint: free text or calls, or calls alone where they are required; one, or as many as MAX_CALLS.

    With a `json_schema` the text, where there is one, keeps to it. Raises PlatformError(INVALID_ARGUMENT) that names
    the tool at fault, or `grammar`.
    """
    tools = read_tools(tools_json)
    if not tools:
        raise _invalid("tools", "tools must not be empty")
    source = {"tools": json.loads(tools_json), "is_required": is_required, "is_parallel": is_parallel}
    source["json_schema"] = _read_schema(json_schema) if json_schema else None
    return Grammar(KIND, json.dumps(source, ensure_ascii=False))


def schemas_of(grammar: Grammar) -> list[tuple[str, Mapping[str, Any], bool]]:
    """Returns every JSON Schema of such a grammar: the name of its field, itself, and whether it is strict."""
    source = json.loads(grammar.source)
    tools = enumerate(read_tools(json.dumps(source["tools"])))
    schemas = [(f"tools[{place}].function.parameters", tool.parameters, tool.is_strict) for place, tool in tools]
    return schemas if source["json_schema"] is None else [*schemas, ("grammar", source["json_schema"], True)]


def read_tools(tools_json: str) -> list[Tool]:
    """Reads a list of tools. Raises PlatformError(INVALID_ARGUMENT) that names the tool at fault."""
    if len(tools_json) > MAX_SOURCE_CHARS:
        raise _invalid("tools", f"tools have {len(tools_json)} characters, of at most {MAX_SOURCE_CHARS}")
    try:
        raw = json.loads(tools_json)
    except (ValueError, RecursionError) as error:
        raise _invalid("tools", f"tools is not valid JSON: {error}") from None
    if not isinstance(raw, list) or len(raw) > MAX_TOOLS:
        raise _invalid("tools", f"tools must be a list of at most {MAX_TOOLS}")
    return [_read_tool(place, tool) for place, tool in enumerate(raw)]


def to_lark(grammar: Grammar, json_options: Mapping[str, object]) -> str:
    """Returns the constraint in llguidance's Lark; `json_options` hold for the schema of the text."""
    source = json.loads(grammar.source)
    tools = read_tools(json.dumps(source["tools"]))
    most = MAX_CALLS - 1 if source["is_parallel"] else 0
    more = f' ("\\n" call){{0,{most}}}' if most else ""
    lines = [f"start: call{more}"]
    schema = source["json_schema"]
    if schema is not None and not source["is_required"]:
        lines = [f"start: text | call{more}", f"text: %json {json.dumps({**schema, 'x-guidance': json_options})}"]
    elif not source["is_required"]:
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
        options = {**_ARGUMENTS, "lenient": not tool.is_strict}
        parameters = json.dumps({**tool.parameters, "x-guidance": options})
        head = json.dumps(f'{{"name": "{tool.name}", "arguments": ')
        lines.append(f'body_{place}: {head} arguments_{place} "}}"')
        lines.append(f"arguments_{place}: %json {parameters}")
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
        param = f"tools[{place}].function.parameters"
        raise _invalid(param, f'{param} must be a JSON Schema of type "object"')
    return Tool(name, {"type": "object", **parameters}, function.get("strict") is True)


def _read_schema(text: str) -> dict[str, Any]:
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _invalid("grammar", f"the JSON Schema is not valid JSON: {error}") from None
    if not isinstance(schema, dict):
        raise _invalid("grammar", "the JSON Schema must be an object")
    return schema


def _invalid(param: str, message: str) -> PlatformError:
    return PlatformError(Code.INVALID_ARGUMENT, message, param=param, reason="invalid_value")
