"""Structured output and tool calls through the official client, on the real model."""

import json
import re
import time

import openai
import pytest

CHAT, RAG = "smollm2-135m-instruct", "rag"
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "colour": {"enum": ["red", "green", "blue"]},
    },
    "required": ["name", "age", "colour"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "person", "strict": True, "schema": PERSON}}
ASK = {"model": CHAT, "messages": [{"role": "user", "content": "Invent a person."}], "temperature": 0}
CITY = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 20}, "unit": {"enum": ["celsius", "fahrenheit"]}},
    "required": ["city", "unit"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": "get_weather", "description": "The weather.", "parameters": CITY}},
    {"type": "function", "function": {"name": "now", "description": "The time."}},
]
WEATHER = {"model": CHAT, "messages": [{"role": "user", "content": "How is the weather in Paris?"}], "temperature": 0}


def _is_person(text: str) -> None:
    person = json.loads(text)
    assert set(person) == set(PERSON["properties"]) and len(person["name"]) <= 20
    assert 0 <= person["age"] <= 120 and person["colour"] in ("red", "green", "blue")


def test_an_answer_keeps_to_its_schema(system):
    answer = system.client().chat.completions.create(**ASK, response_format=FORMAT, max_tokens=120)
    _is_person(answer.choices[0].message.content)
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_a_stream_keeps_to_its_schema_whatever_is_drawn(system):
    stream = system.client().chat.completions.create(
        **ASK | {"temperature": 1.5}, n=2, seed=3, response_format=FORMAT, max_tokens=120, stream=True
    )
    texts = ["", ""]
    for chunk in stream:
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    for text in texts:
        _is_person(text)


def test_json_that_max_tokens_cuts_ends_with_length(system):
    answer = system.client().chat.completions.create(**ASK, response_format={"type": "json_object"}, max_tokens=3)
    assert answer.choices[0].finish_reason == "length" and answer.choices[0].message.content.startswith("{")


@pytest.mark.parametrize(
    ("form", "pattern"),
    [
        ({"guided_choice": ["left", "right"]}, "left|right"),
        ({"guided_regex": r"\d{3}-[A-F]{2}"}, r"[0-9]{3}-[A-F]{2}"),
        ({"structured_outputs": {"grammar": 'root ::= "yes" | "no"'}}, "yes|no"),
    ],
)
def test_choices_patterns_and_grammars_hold(system, form, pattern):
    answer = system.client().chat.completions.create(**ASK, extra_body=form, max_tokens=20)
    assert re.fullmatch(pattern, answer.choices[0].message.content)


def test_a_required_tool_is_called_and_its_answer_is_read(system):
    client = system.client()
    answer = client.chat.completions.create(
        **WEATHER, tools=TOOLS, tool_choice="required", parallel_tool_calls=False, max_tokens=120
    )
    message = answer.choices[0].message
    assert answer.choices[0].finish_reason == "tool_calls" and message.content is None
    (call,) = message.tool_calls
    assert call.type == "function" and call.id.startswith("call_") and call.function.name in ("get_weather", "now")
    json.loads(call.function.arguments)
    turns = [
        *WEATHER["messages"],
        message.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": call.id, "content": "Sunny, 20 degrees."},
    ]
    after = client.chat.completions.create(**WEATHER | {"messages": turns}, tools=TOOLS, max_tokens=40)
    assert after.usage.prompt_tokens > answer.usage.prompt_tokens
    assert after.choices[0].message.content or after.choices[0].message.tool_calls


def test_a_named_tool_streams_its_name_first_and_then_its_arguments(system):
    chosen = {"type": "function", "function": {"name": "get_weather"}}
    stream = system.client().chat.completions.create(
        **WEATHER, tools=TOOLS, tool_choice=chosen, max_tokens=120, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    deltas = [call for chunk in chunks for choice in chunk.choices for call in choice.delta.tool_calls or ()]
    assert deltas[0].function.name == "get_weather" and deltas[0].id and deltas[0].function.arguments == ""
    assert len(deltas) > 2 and all(delta.id is None and delta.index == 0 for delta in deltas[1:])
    arguments = json.loads("".join(delta.function.arguments for delta in deltas))
    assert set(arguments) == {"city", "unit"} and arguments["unit"] in ("celsius", "fahrenheit")
    assert [c.finish_reason for chunk in chunks for c in chunk.choices if c.finish_reason] == ["tool_calls"]
    assert chunks[-1].usage.completion_tokens > 10


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": FORMAT | {"json_schema": {"name": "x", "schema": {"type": "person"}}}}, "response_format"),
        ({"extra_body": {"guided_regex": "("}}, "guided_regex"),
        (
            {"tools": [*TOOLS, {"type": "function", "function": {"name": "x", "parameters": {"properties": 1}}}]},
            "tools[2].function.parameters",
        ),
    ],
)
def test_a_bad_schema_is_named(system, fields, param):
    with pytest.raises(openai.BadRequestError) as raised:
        system.client().chat.completions.create(**ASK, **fields)
    assert raised.value.param == param


def test_a_schema_that_explodes_is_refused_while_others_stream(system):
    letters = "abcdefghijklmnopqrst"
    bomb = {"patternProperties": {f"^{a}{b}": {} for a in letters for b in letters}}
    form = {"type": "json_schema", "json_schema": {"name": "bomb", "schema": bomb}}
    stream = system.client().chat.completions.create(
        model=CHAT, messages=[{"role": "user", "content": "Count to fifty."}], max_tokens=40, stream=True
    )
    next(iter(stream))
    began_s = time.monotonic()
    with pytest.raises(openai.BadRequestError) as raised:
        system.client().chat.completions.create(**ASK, response_format=form)
    took_s = time.monotonic() - began_s
    assert raised.value.param == "response_format" and took_s < 15, took_s  # within one on a quiet machine
    assert any(chunk.choices and chunk.choices[0].finish_reason for chunk in stream)
