"""/v1/responses through the official OpenAI client against the application behind a real server."""

import openai
import pytest
from openai import AsyncOpenAI
from pydantic import BaseModel

from chassis.errors import Code, PlatformError
from testkit import eventually

MODEL = "smollm2-135m-instruct"
WEATHER = {
    "type": "function",
    "name": "get_weather",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    "strict": True,
}
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'


@pytest.fixture
async def client(base_url, key):
    async with AsyncOpenAI(base_url=base_url, api_key=key, max_retries=0) as client:
        yield client


async def test_a_response_in_one_piece(client, world):
    answer = await client.responses.create(
        model=MODEL,
        instructions="be brief",
        input="hello there",
        max_output_tokens=3,
        temperature=0.5,
        metadata={"a": "b"},
    )
    assert answer.output_text == "w0 w1 w2" and answer.id.startswith("resp_") and answer.object == "response"
    assert (answer.status, answer.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert (answer.usage.input_tokens, answer.usage.output_tokens, answer.usage.total_tokens) == (4, 3, 7)
    assert answer.usage.input_tokens_details.cached_tokens == 1
    assert (answer.temperature, answer.max_output_tokens, answer.metadata) == (0.5, 3, {"a": "b"})
    assert answer.instructions == "be brief" and answer.store is False
    (call,) = world.generator.calls
    assert [(turn.role, turn.content) for turn in call.prompt.messages] == [
        ("system", "be brief"),
        ("user", "hello there"),
    ]
    assert (call.stopping.max_tokens, call.sampling.temperature) == (3, 0.5)
    await eventually(lambda: len(world.ledger.records) == 1)
    record = world.ledger.records[0]
    assert (record.route, record.prompt_tokens, record.completion_tokens) == ("/v1/responses", 4, 3)


async def test_the_events_of_a_stream(client, world):
    world.generator.script = "so it is"
    stream = await client.responses.create(model=MODEL, input="hello", stream=True)
    events = [event async for event in stream]
    assert [event.type for event in events] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.delta",
        "response.output_text.delta",
        "response.output_text.delta",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert [event.sequence_number for event in events] == list(range(11))
    assert "".join(event.delta for event in events[4:7]) == events[7].text == "so it is"
    assert len({event.item_id for event in events[3:9]}) == 1
    final = events[-1].response
    assert (final.status, final.output_text, final.usage.output_tokens) == ("completed", "so it is", 3)
    assert final.id == events[0].response.id and events[0].response.usage is None


async def test_the_clients_stream_helper_collects_the_answer(client, world):
    world.generator.script = "so it is"
    async with client.responses.stream(model=MODEL, input="hello") as stream:
        async for _ in stream:
            pass
        final = await stream.get_final_response()
    assert final.output_text == "so it is"


async def test_a_stream_that_is_cut_is_incomplete(client):
    stream = await client.responses.create(model=MODEL, input="hello", max_output_tokens=2, stream=True)
    events = [event async for event in stream]
    assert events[-1].type == "response.incomplete"
    assert events[-1].response.incomplete_details.reason == "max_output_tokens"
    assert events[-1].response.output[0].status == events[-2].item.status == "incomplete"


async def test_an_answer_without_a_word_is_a_message(client, world):
    world.generator.script = ""
    answer = await client.responses.create(model=MODEL, input="hello")
    assert (answer.status, answer.output_text, len(answer.output)) == ("completed", "", 1)


async def test_items_of_an_earlier_answer_go_back_into_the_conversation(client, world):
    world.generator.script = "Let me see. " + CALL
    first = await client.responses.create(model=MODEL, input="Rain?", tools=[WEATHER])
    assert [item.type for item in first.output] == ["message", "function_call"]
    call = first.output[1]
    assert (call.name, call.arguments, call.status) == ("get_weather", '{"city": "Paris"}', "completed")
    world.generator.script = "Yes."
    await client.responses.create(
        model=MODEL,
        tools=[WEATHER],
        input=[
            {"role": "developer", "content": [{"type": "input_text", "text": "be brief"}]},
            {"role": "user", "content": "Rain?"},
            *[item.model_dump(exclude_none=True) for item in first.output],
            {"type": "function_call_output", "call_id": call.call_id, "output": "rain"},
        ],
    )
    turns = world.generator.calls[1].prompt.messages
    assert [(turn.role, turn.content, turn.tool_call_id) for turn in turns] == [
        ("system", "be brief", ""),
        ("user", "Rain?", ""),
        ("assistant", "Let me see.", ""),
        ("tool", "rain", call.call_id),
    ]
    assert call.call_id in turns[2].tool_calls_json


async def test_calls_in_a_stream(client, world):
    world.generator.script = CALL + "\n" + CALL.replace("Paris", "Rome")
    stream = await client.responses.create(model=MODEL, input="Rain?", tools=[WEATHER], stream=True)
    events = [event async for event in stream]
    deltas = [event.delta for event in events if event.type == "response.function_call_arguments.delta"]
    assert "".join(deltas) == '{"city": "Paris"}{"city": "Rome"}' and len(deltas) > 4
    done = [event.arguments for event in events if event.type == "response.function_call_arguments.done"]
    assert done == ['{"city": "Paris"}', '{"city": "Rome"}']
    assert [item.type for item in events[-1].response.output] == ["function_call", "function_call"]


@pytest.mark.parametrize(
    ("choice", "is_required"),
    [("auto", False), ("required", True), ({"type": "function", "name": "get_weather"}, True)],
)
async def test_the_choice_of_tools_is_kept_to(client, world, choice, is_required):
    world.generator.script = CALL
    await client.responses.create(model=MODEL, input="Rain?", tools=[WEATHER], tool_choice=choice)
    assert world.generator.calls[0].grammar.is_required is is_required


async def test_the_text_keeps_to_a_schema(client, world):
    class Person(BaseModel):
        name: str

    world.generator.script = '{"name": "Ada"}'
    answer = await client.responses.parse(model=MODEL, input="Who?", text_format=Person)
    assert answer.output_parsed == Person(name="Ada")
    assert world.generator.calls[0].grammar.kind == "json_schema"


async def test_log_probabilities_are_told_when_they_are_asked_for(client):
    answer = await client.responses.create(
        model=MODEL, input="hello", max_output_tokens=2, include=["message.output_text.logprobs"], top_logprobs=2
    )
    logprobs = answer.output[0].content[0].logprobs
    assert [token.token for token in logprobs] == ["w0", " w1"] and len(logprobs[0].top_logprobs) == 2


@pytest.mark.parametrize("error", [PlatformError(Code.UNAVAILABLE, "gone"), RuntimeError("secret")])
async def test_a_failure_in_a_stream_is_a_failed_response(client, world, error):
    world.generator.error, world.generator.fail_after = error, 2
    events = [event async for event in await client.responses.create(model=MODEL, input="hello", stream=True)]
    last = events[-1]
    assert (last.type, last.response.status) == ("response.failed", "failed")
    assert last.response.error.code in ("unavailable", "internal_error") and "secret" not in last.model_dump_json()
    await eventually(lambda: len(world.ledger.records) == 1)
    assert world.ledger.records[0].completion_tokens == 2


async def test_nothing_is_kept(client):
    answer = await client.responses.create(model=MODEL, input="hello", max_output_tokens=1, store=False)
    with pytest.raises(openai.NotFoundError) as caught:
        await client.responses.retrieve(answer.id)
    assert caught.value.code == "response_not_found"
    with pytest.raises(openai.BadRequestError) as caught:
        await client.responses.create(model=MODEL, input="hello", previous_response_id=answer.id)
    assert caught.value.param == "previous_response_id"


def body(**changes):
    return {"model": MODEL, "input": "hello"} | changes


def items(*given):
    return body(input=list(given))


USER = {"role": "user", "content": "x"}
CALLED = {"type": "function_call", "call_id": "a", "name": "f", "arguments": ""}

BODIES = [
    ({"input": "x"}, 400, "missing_required_parameter", "model"),
    ({"model": MODEL}, 400, "missing_required_parameter", "input"),
    (body(model="gpt-9"), 404, "model_not_found", "model"),
    (body(input=""), 400, "invalid_value", "input"),
    (body(input=[]), 400, "invalid_value", "input"),
    (body(input=5), 400, "invalid_type", "input"),
    (items("x"), 400, "invalid_value", "input[0]"),
    (items({"type": "item_reference", "id": "x"}), 400, "invalid_value", "input[0]"),
    (items({"type": "reasoning", "summary": []}), 400, "invalid_value", "input[0]"),
    (items({"role": "king", "content": "x"}), 400, "invalid_value", "input[0].role"),
    (items({"role": "user"}), 400, "missing_required_parameter", "input[0].content"),
    (items({"role": "user", "content": [{"type": "input_image"}]}), 400, "invalid_value", "input[0].content[0].type"),
    (items(USER, {"type": "function_call_output", "call_id": "a", "output": "x"}), 400, "invalid_value", "input"),
    (
        items(USER, {"type": "function_call", "call_id": "a", "name": "f", "arguments": ""}),
        400,
        "invalid_value",
        "input",
    ),
    (body(max_output_tokens=0), 400, "invalid_value", "max_output_tokens"),
    (body(max_output_tokens=1000), 400, "context_length_exceeded", "input"),
    (body(temperature=3), 400, "invalid_value", "temperature"),
    (body(top_p=0), 400, "invalid_value", "top_p"),
    (body(top_logprobs=21), 400, "invalid_value", "top_logprobs"),
    (body(stream="yes"), 400, "invalid_type", "stream"),
    (body(store=True), 400, "unsupported_parameter", "store"),
    (body(background=True), 400, "unsupported_parameter", "background"),
    (body(conversation="conv_1"), 400, "unsupported_parameter", "conversation"),
    (body(prompt={"id": "p"}), 400, "unsupported_parameter", "prompt"),
    (body(truncation="auto"), 400, "invalid_value", "truncation"),
    (body(text={"format": {"type": "xml"}}), 400, "invalid_value", "text.format.type"),
    (body(text={"format": {"type": "json_schema", "name": "x"}}), 400, "invalid_value", "text.format.schema"),
    (body(text={"format": {"type": "json_schema", "schema": {}}}), 400, "invalid_value", "text.format.name"),
    (
        body(text={"format": {"type": "json_schema", "name": "a b", "schema": {}}}),
        400,
        "invalid_value",
        "text.format.name",
    ),
    (body(tools=[{"type": "web_search"}]), 400, "invalid_value", "tools[0].type"),
    (body(tools=[{"type": "function"}]), 400, "missing_required_parameter", "tools[0].name"),
    (body(tool_choice="required"), 400, "invalid_value", "tool_choice"),
    (body(tools=[WEATHER], tool_choice={"type": "function", "name": "g"}), 400, "invalid_value", "tool_choice"),
]


@pytest.mark.parametrize(("sent", "status", "code", "param"), BODIES)
async def test_bad_body_names_the_field(world, sent, status, code, param):
    async with world.client() as client:
        response = await client.post("/v1/responses", json=sent)
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert (error["code"], error["param"]) == (code, param), error
    await eventually(lambda: len(world.ledger.records) == 1)
    assert world.ledger.records[0].http_status == status and world.generator.num_finished == 0
