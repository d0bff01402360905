"""Tools, tool_choice and the form of answers: what the generator is asked, and what the client reads."""

import json
from typing import Any

import httpx
import pytest

from chassis.errors import Code, PlatformError
from gateway.core.services import Chat, Grammar, ToolCalls
from gateway.core.tool_calls import Arguments, CallBegun, Piece, ToolCallReader

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
MODEL = "smollm2-135m-instruct"
WEATHER = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
}
NOW = {"type": "function", "function": {"name": "now"}}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "P}{\\"ris"}}\n</tool_call>'
SECOND = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'


def body(**fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": [{"role": "user", "content": "Weather?"}], **fields}


def read(text: str, size: int) -> list[Piece]:
    reader = ToolCallReader()
    pieces = [p for at in range(0, len(text), size) for p in reader.feed(text[at : at + size])]
    pieces += reader.finish()
    merged: list[Piece] = []
    for piece in pieces:
        last = merged[-1] if merged else None
        if isinstance(piece, str) and isinstance(last, str):
            merged[-1] = last + piece
        elif isinstance(piece, Arguments) and isinstance(last, Arguments):
            merged[-1] = Arguments(piece.number, last.text + piece.text)
        else:
            merged.append(piece)
    return merged


ARGUMENTS = '{"city": "P}{\\"ris"}'


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Hello <b> there. ", ["Hello <b> there. "]),
        (CALL, [CallBegun(0, "weather"), Arguments(0, ARGUMENTS)]),
        (f"Let me see.\n\n{CALL}", ["Let me see.", CallBegun(0, "weather"), Arguments(0, ARGUMENTS)]),
        (
            f"{CALL}\n{SECOND}\n",
            [CallBegun(0, "weather"), Arguments(0, ARGUMENTS), CallBegun(1, "now"), Arguments(1, "{}")],
        ),
        ("a <tool_cal", ["a <tool_cal"]),
        ("<tool_call>hm</tool_call> x", ["<tool_call>hm</tool_call> x"]),
        ("<tool_call>\n{", ["<tool_call>\n{"]),
        (CALL[:60], [CallBegun(0, "weather"), Arguments(0, CALL[:60].partition('"arguments": ')[2])]),
        ("<tool_call>" + "x" * 600, ["<tool_call>" + "x" * 600]),
    ],
)
def test_calls_are_read_however_the_text_comes(text: str, size: int, expected: list[Piece]) -> None:
    assert read(text, size) == expected


def chunks_of(response: httpx.Response) -> list[dict[str, Any]]:
    assert response.status_code == 200, response.text
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line)["choices"][0] for line in lines[:-1]]


async def post(world: Any, path: str = CHAT, **fields: Any) -> httpx.Response:
    async with world.client() as client:
        return await client.post(path, json=body(**fields))


async def test_calls_come_as_tool_calls_with_null_content(world: Any) -> None:
    world.generator.script = f"{CALL}\n{SECOND}"
    response = await post(world, tools=[WEATHER, NOW])
    choice = response.json()["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    message = choice["message"]
    assert message["role"] == "assistant" and message["content"] is None and message["refusal"] is None
    first, second = message["tool_calls"]
    assert first == {"id": first["id"], "type": "function", "function": {"name": "weather", "arguments": ARGUMENTS}}
    assert second["function"] == {"name": "now", "arguments": "{}"}
    assert first["id"].startswith("call_") and first["id"] != second["id"]
    assert response.json()["usage"]["completion_tokens"] == -(-len(world.generator.script) // 3)
    assert world.ledger.records[-1].completion_tokens == -(-len(world.generator.script) // 3)


async def test_a_stream_tells_name_first_and_arguments_in_pieces(world: Any) -> None:
    world.generator.script = f"Let me see.\n{CALL}"
    chunks = chunks_of(await post(world, tools=[WEATHER], stream=True))
    assert chunks[0]["delta"] == {"role": "assistant", "content": None}
    assert "".join(c["delta"].get("content") or "" for c in chunks) == "Let me see."
    calls = [call for c in chunks for call in c["delta"].get("tool_calls", ())]
    assert calls[0]["function"] == {"name": "weather", "arguments": ""} and calls[0]["type"] == "function"
    assert calls[0]["id"].startswith("call_") and all("id" not in call for call in calls[1:])
    assert {call["index"] for call in calls} == {0} and len(calls) > 4
    assert "".join(call["function"]["arguments"] for call in calls) == ARGUMENTS
    assert [c["finish_reason"] for c in chunks if c["finish_reason"]] == ["tool_calls"]


async def test_a_call_that_max_tokens_cuts_ends_with_length(world: Any) -> None:
    world.generator.script = CALL
    choice = (await post(world, tools=[WEATHER], max_tokens=19)).json()["choices"][0]
    assert choice["finish_reason"] == "length"
    arguments = choice["message"]["tool_calls"][0]["function"]["arguments"]
    assert ARGUMENTS.startswith(arguments) and arguments != ARGUMENTS


async def test_text_is_text_where_a_tool_might_have_been_called(world: Any) -> None:
    world.generator.script = "It <tool> rains. "
    for n in (1, 2):
        answer = (await post(world, tools=[WEATHER], n=n)).json()
        for choice in answer["choices"]:
            assert choice["message"] == {"role": "assistant", "content": "It <tool> rains. ", "refusal": None}
            assert choice["finish_reason"] == "stop"
    streamed = chunks_of(await post(world, tools=[WEATHER], stream=True))
    assert "".join(c["delta"].get("content") or "" for c in streamed) == "It <tool> rains. "


async def test_without_tools_a_tag_is_text(world: Any) -> None:
    world.generator.script = CALL
    for fields in ({}, {"tools": [WEATHER], "tool_choice": "none"}):
        choice = (await post(world, **fields)).json()["choices"][0]
        assert choice["message"]["content"] == CALL and choice["finish_reason"] == "stop"
        assert world.generator.calls[-1].prompt.tools_json == "" and world.generator.calls[-1].grammar is None


async def test_log_probabilities_are_those_of_the_text(world: Any) -> None:
    world.generator.script = f"Yes.  {CALL}"
    choice = (await post(world, tools=[WEATHER], logprobs=True)).json()["choices"][0]
    told = [token["token"] for token in choice["logprobs"]["content"]]
    assert told[0] == "Yes" and "city" not in "".join(told)


@pytest.mark.parametrize(
    ("fields", "required", "parallel", "names"),
    [
        ({}, False, True, ["weather", "now"]),
        ({"tool_choice": "auto", "parallel_tool_calls": False}, False, False, ["weather", "now"]),
        ({"tool_choice": "required"}, True, True, ["weather", "now"]),
        ({"tool_choice": {"type": "function", "function": {"name": "now"}}}, True, False, ["now"]),
        (
            {
                "tool_choice": {
                    "type": "allowed_tools",
                    "allowed_tools": {"mode": "auto", "tools": [{"type": "function", "function": {"name": "now"}}]},
                }
            },
            False,
            True,
            ["now"],
        ),
    ],
)
async def test_a_choice_of_tools_becomes_a_constraint(
    world: Any, fields: dict[str, Any], required: bool, parallel: bool, names: list[str]
) -> None:
    world.generator.script = "x"
    await post(world, tools=[WEATHER, NOW], **fields)
    call = world.generator.calls[-1]
    assert isinstance(call.grammar, ToolCalls) and isinstance(call.prompt, Chat)
    assert (call.grammar.is_required, call.grammar.is_parallel) == (required, parallel)
    assert [tool["function"]["name"] for tool in json.loads(call.grammar.tools_json)] == names
    assert call.prompt.tools_json == call.grammar.tools_json


async def test_turns_with_calls_and_their_answers_reach_the_generator(world: Any) -> None:
    world.generator.script = "x"
    call = {"id": "c1", "type": "function", "function": {"name": "now", "arguments": "{}"}}
    turns = [
        {"role": "user", "content": "Time?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "noon"},
    ]
    assert (await post(world, messages=turns)).status_code == 200
    _, asked, answered = world.generator.calls[-1].prompt.messages
    assert json.loads(asked.tool_calls_json) == [call] and asked.content == ""
    assert (answered.role, answered.content, answered.tool_call_id) == ("tool", "noon", "c1")


def schema_format(**fields: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": fields}}


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}


@pytest.mark.parametrize(
    ("path", "fields", "kind", "source"),
    [
        (CHAT, {"response_format": {"type": "text"}}, None, None),
        (CHAT, {"response_format": {"type": "json_object"}}, "json_object", None),
        (CHAT, schema_format(name="a", strict=True, schema=SCHEMA), "json_schema", SCHEMA),
        (CHAT, {"guided_json": SCHEMA}, "json_schema", SCHEMA),
        (CHAT, {"guided_json": json.dumps(SCHEMA)}, "json_schema", SCHEMA),
        (CHAT, {"guided_choice": ["a", "b"]}, "choice", ["a", "b"]),
        (CHAT, {"guided_regex": "[ab]"}, "regex", "[ab]"),
        (CHAT, {"guided_grammar": "start: X"}, "ebnf", "start: X"),
        (CHAT, {"structured_outputs": {"json": SCHEMA}}, "json_schema", SCHEMA),
        (CHAT, {"structured_outputs": {"json_object": True}}, "json_object", None),
        (COMPLETIONS, {"prompt": "x", "structured_outputs": {"choice": ["a"]}}, "choice", ["a"]),
        (COMPLETIONS, {"prompt": "x", "guided_regex": "a+"}, "regex", "a+"),
    ],
)
async def test_a_form_becomes_a_grammar(
    world: Any, path: str, fields: dict[str, Any], kind: str | None, source: object
) -> None:
    world.generator.script = "x"
    assert (await post(world, path, **fields)).status_code == 200
    grammar = world.generator.calls[-1].grammar
    if kind is None:
        assert grammar is None
        return
    assert isinstance(grammar, Grammar) and grammar.kind == kind
    assert source is None or source in (grammar.source, json.loads(grammar.source) if kind[0] in "jc" else None)


async def test_a_form_beside_tools_holds_for_the_text(world: Any) -> None:
    world.generator.script = "x"
    await post(world, tools=[NOW], response_format={"type": "json_object"})
    assert json.loads(world.generator.calls[-1].grammar.json_schema) == {"type": "object"}


UNKNOWN = {"type": "function", "function": {"name": "rain"}}
TURN = {"role": "user", "content": "x"}
CALLED = {"id": "c", "type": "function", "function": {"name": "f", "arguments": ""}}
ASKED = {"role": "assistant", "tool_calls": [CALLED]}
UNTYPED = {"role": "assistant", "tool_calls": [{"id": "c"}]}
BAD_SCHEMA = {"type": "function", "function": {"name": "a", "parameters": 3}}
FORMAT = "response_format.json_schema"


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"tools": []}, 400, "tools"),
        ({"tools": [{"type": "retrieval"}]}, 400, "tools[0].type"),
        ({"tools": [NOW, {"type": "function", "function": {"name": "a b"}}]}, 400, "tools[1].function.name"),
        ({"tools": [BAD_SCHEMA]}, 400, "tools[0].function.parameters"),
        ({"tools": [NOW], "tool_choice": "always"}, 400, "tool_choice"),
        ({"tools": [NOW], "tool_choice": UNKNOWN}, 400, "tool_choice"),
        ({"tool_choice": "required"}, 400, "tool_choice"),
        ({"tools": [NOW], "parallel_tool_calls": "no"}, 400, "parallel_tool_calls"),
        ({"functions": [{"name": "f"}]}, 400, "functions"),
        ({"messages": [TURN, {"role": "tool", "content": "x"}]}, 400, "messages[1]"),
        ({"messages": [TURN, {"role": "tool", "content": "x", "tool_call_id": "c"}]}, 400, "messages"),
        ({"messages": [TURN, ASKED]}, 400, "messages"),
        ({"messages": [TURN, ASKED, TURN]}, 400, "messages"),
        ({"messages": [TURN, UNTYPED]}, 400, "messages[1].tool_calls[0].type"),
        (schema_format(schema={}), 400, f"{FORMAT}.name"),
        (schema_format(name="a b", schema={}), 400, f"{FORMAT}.name"),
        (schema_format(name="a", schema=1), 400, f"{FORMAT}.schema"),
        ({"response_format": {"type": "json_object"}, "guided_regex": "a"}, 400, "guided_regex"),
        ({"guided_choice": []}, 400, "guided_choice"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, 400, "structured_outputs.choice"),
        ({"tools": [NOW], "guided_regex": "a"}, 400, "guided_regex"),
    ],
)
async def test_what_cannot_be_is_refused_by_name(world: Any, fields: dict[str, Any], status: int, param: str) -> None:
    world.generator.script = "x"
    response = await post(world, **fields)
    assert (response.status_code, response.json()["error"]["param"]) == (status, param), response.text
    assert world.generator.calls == []


@pytest.mark.parametrize(
    ("fields", "told", "param"),
    [
        ({"response_format": {"type": "json_object"}}, "grammar", "response_format"),
        ({"guided_regex": "("}, "grammar", "guided_regex"),
        ({"structured_outputs": {"grammar": "x"}}, "grammar", "structured_outputs.grammar"),
        ({"tools": [NOW]}, "grammar", "tools"),
        ({"tools": [NOW], "response_format": {"type": "json_object"}}, "grammar", "response_format"),
        ({"tools": [WEATHER, NOW]}, "tools[1].function.parameters", "tools[1].function.parameters"),
        # Only the tool that is chosen was sent; the client's list has it elsewhere.
        (
            {"tools": [WEATHER, NOW], "tool_choice": {"type": "function", "function": {"name": "now"}}},
            "tools[0].function.parameters",
            "tools[1].function.parameters",
        ),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_the_generators_refusal_names_the_field_that_the_client_sent(
    world: Any, fields: dict[str, Any], told: str, param: str, stream: bool
) -> None:
    world.generator.script = ""
    world.generator.error = PlatformError(Code.INVALID_ARGUMENT, "no", param=told, reason="invalid_grammar")
    response = await post(world, stream=stream, **fields)
    assert response.status_code == 400
    assert (response.json()["error"]["param"], response.json()["error"]["code"]) == (param, "invalid_grammar")
