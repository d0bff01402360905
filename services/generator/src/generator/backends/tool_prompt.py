"""Tools in the prompt of a model whose chat template knows none, in the form that core.tool_calls documents.

The tools go into the system turn, calls into the assistant's text, and what the tools answered comes back in a user
turn, several answers in one, as the templates of Hermes and Qwen do.
"""

import json
from collections.abc import Sequence
from typing import Any

from generator.core.tool_calls import BEGIN, END

_SYSTEM = """\
You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{tools}
</tools>

For each function call, return a json object with function name and arguments within {begin}{end} XML tags:
{begin}
{{"name": <function-name>, "arguments": <args-json-object>}}
{end}"""


def with_tools(turns: Sequence[dict[str, Any]], tools: Sequence[Any]) -> list[dict[str, Any]]:
    """Returns turns of the roles system, user and assistant with content alone that say the same."""
    plain: list[dict[str, Any]] = []
    last_role = ""
    for turn in turns:
        role, content = turn["role"], turn["content"]
        if role == "tool":
            content = f"<tool_response>\n{content}\n</tool_response>"
            if last_role == "tool":
                plain[-1]["content"] += f"\n{content}"
            else:
                plain.append({"role": "user", "content": content})
        else:
            calls = [write_call(call) for call in turn.get("tool_calls", ())]
            plain.append({"role": role, "content": "\n".join([content, *calls] if content else calls)})
        last_role = role
    if tools:
        shown = "\n".join(_dump(tool) for tool in tools)
        instruction = _SYSTEM.format(tools=shown, begin=BEGIN, end=END)
        if plain and plain[0]["role"] == "system":
            plain[0]["content"] += f"\n\n{instruction}"
        else:
            plain.insert(0, {"role": "system", "content": instruction})
    return plain


def write_call(call: dict[str, Any]) -> str:
    """Returns a call as the model writes one."""
    function = call["function"]
    return f'{BEGIN}\n{{"name": {_dump(function["name"])}, "arguments": {_dump(function["arguments"])}}}\n{END}'


def _dump(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
