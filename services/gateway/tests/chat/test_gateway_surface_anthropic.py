"""The official Anthropic client against the application behind a real server."""

import anthropic
import pytest
from anthropic import AsyncAnthropic

from chassis.errors import Code, PlatformError
from gateway.core.services import Source
from testkit import eventually

MODEL = "smollm2-135m-instruct"
HI = [{"role": "user", "content": "hello there"}]
WEATHER = {
    "name": "get_weather",
    "description": "Tells the weather.",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'


@pytest.fixture
async def client(base_url, key):
    async with AsyncAnthropic(base_url=base_url.removesuffix("/v1"), api_key=key, max_retries=0) as client:
        yield client


async def test_a_message_in_one_piece(client, world):
    answer = await client.messages.create(model=MODEL, messages=HI, max_tokens=3)
    assert (answer.type, answer.role, answer.model) == ("message", "assistant", MODEL)
    assert answer.id.startswith("msg_") and answer._request_id
    assert [block.type for block in answer.content] == ["text"] and answer.content[0].text == "w0 w1 w2"
    assert (answer.stop_reason, answer.stop_sequence) == ("max_tokens", None)
    # One of the two tokens of the prompt was cached, and Anthropic counts those apart.
    assert (answer.usage.input_tokens, answer.usage.cache_read_input_tokens) == (1, 1)
    assert (answer.usage.output_tokens, answer.usage.cache_creation_input_tokens) == (3, 0)
    await eventually(lambda: len(world.ledger.records) == 1)
    record = world.ledger.records[0]
    assert (record.route, record.model, record.tenant) == ("/v1/messages", MODEL, "acme")
    assert (record.prompt_tokens, record.completion_tokens, record.cached_tokens) == (2, 3, 1)
    assert (record.finish_reason, record.http_status, record.stream) == ("length", 200, False)
    assert (record.prompt_text, record.completion_text) == ("hello there", "w0 w1 w2")


async def test_a_message_as_a_stream(client, world):
    async with client.messages.stream(model=MODEL, messages=HI, max_tokens=3) as stream:
        texts = [text async for text in stream.text_stream]
        answer = await stream.get_final_message()
    assert texts == ["w0", " w1", " w2"] and answer.content[0].text == "w0 w1 w2"
    assert answer.stop_reason == "max_tokens"
    assert (answer.usage.input_tokens, answer.usage.cache_read_input_tokens, answer.usage.output_tokens) == (1, 1, 3)
    await eventually(lambda: len(world.ledger.records) == 1)
    assert world.ledger.records[0].stream and world.ledger.records[0].completion_tokens == 3


async def test_the_raw_events_come_in_anthropics_order(client):
    stream = await client.messages.create(model=MODEL, messages=HI, max_tokens=2, stream=True)
    kinds = [event.type async for event in stream]
    assert kinds == [
        "message_start",
        "content_block_start",
        "content_block_delta",
        "content_block_delta",
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]


async def test_every_parameter_reaches_the_generator(client, world):
    await client.messages.create(
        model=MODEL,
        system=[
            {"type": "text", "text": "be brief", "cache_control": {"type": "ephemeral"}},
            {"type": "text", "text": "ok"},
        ],
        messages=[
            {"role": "user", "content": "one"},
            {"role": "user", "content": [{"type": "text", "text": "two"}]},
            {"role": "assistant", "content": "three"},
            {"role": "user", "content": "four"},
        ],
        max_tokens=4,
        stop_sequences=["x", "y"],
        metadata={"user_id": "u"},
        service_tier="auto",
        # This version of the client has left them out of its signature.
        extra_body={"temperature": 0.5, "top_p": 0.9, "top_k": 3},
    )
    (call,) = world.generator.calls
    turns = [(message.role, message.content) for message in call.prompt.messages]
    assert turns == [("system", "be brief\nok"), ("user", "one\ntwo"), ("assistant", "three"), ("user", "four")]
    assert (call.sampling.temperature, call.sampling.top_p, call.sampling.top_k) == (0.5, 0.9, 3)
    assert (call.stopping.max_tokens, call.stopping.stop, call.tenant) == (4, ("x", "y"), "acme")


@pytest.mark.parametrize(
    ("stop_match", "reason", "sequence"),
    [("END", "stop_sequence", "END"), ("<|im_end|>", "end_turn", None), ("", "end_turn", None)],
)
async def test_the_stop_sequence_that_ended_the_answer_is_told(client, world, stop_match, reason, sequence):
    world.generator.script, world.generator.stop_match = "so it is ", stop_match
    answer = await client.messages.create(model=MODEL, messages=HI, max_tokens=9, stop_sequences=["STOP", "END"])
    assert (answer.stop_reason, answer.stop_sequence) == (reason, sequence)
    async with client.messages.stream(model=MODEL, messages=HI, max_tokens=9, stop_sequences=["END"]) as stream:
        streamed = await stream.get_final_message()
    assert (streamed.stop_reason, streamed.stop_sequence) == (reason, sequence)


async def test_a_tool_is_called(client, world):
    world.generator.script = "Let me see. " + CALL
    answer = await client.messages.create(model=MODEL, messages=HI, max_tokens=99, tools=[WEATHER])
    assert [block.type for block in answer.content] == ["text", "tool_use"]
    assert answer.content[0].text == "Let me see."
    call = answer.content[1]
    assert (call.name, call.input) == ("get_weather", {"city": "Paris"}) and call.id.startswith("toolu_")
    assert answer.stop_reason == "tool_use"
    (asked,) = world.generator.calls
    assert not asked.grammar.is_required and asked.grammar.is_parallel and '"get_weather"' in asked.prompt.tools_json


async def test_tools_are_called_in_a_stream(client, world):
    world.generator.script = CALL + "\n" + CALL.replace("Paris", "Rome")
    async with client.messages.stream(model=MODEL, messages=HI, max_tokens=99, tools=[WEATHER]) as stream:
        pieces = [event.partial_json async for event in stream if event.type == "input_json"]
        answer = await stream.get_final_message()
    assert [block.input for block in answer.content] == [{"city": "Paris"}, {"city": "Rome"}]
    assert "".join(pieces) == '{"city": "Paris"}{"city": "Rome"}' and len(pieces) > 4
    assert answer.stop_reason == "tool_use"


async def test_a_call_that_is_cut_has_what_was_written(client, world):
    world.generator.script = CALL
    answer = await client.messages.create(model=MODEL, messages=HI, max_tokens=22, tools=[WEATHER])
    assert answer.stop_reason == "max_tokens"
    assert answer.content[0].type == "tool_use" and set(answer.content[0].input) <= {"city"}


@pytest.mark.parametrize(
    ("choice", "is_required", "is_parallel"),
    [
        ({"type": "auto", "disable_parallel_tool_use": True}, False, False),
        ({"type": "any"}, True, True),
        ({"type": "tool", "name": "get_weather"}, True, False),
    ],
)
async def test_the_choice_of_tools_is_kept_to(client, world, choice, is_required, is_parallel):
    world.generator.script = CALL
    await client.messages.create(model=MODEL, messages=HI, max_tokens=99, tools=[WEATHER], tool_choice=choice)
    grammar = world.generator.calls[0].grammar
    assert (grammar.is_required, grammar.is_parallel) == (is_required, is_parallel)


async def test_no_tool_is_called_where_none_is_chosen(client, world):
    world.generator.script = "Hello."
    answer = await client.messages.create(
        model=MODEL, messages=HI, max_tokens=9, tools=[WEATHER], tool_choice={"type": "none"}
    )
    assert answer.content[0].text == "Hello." and world.generator.calls[0].grammar is None


async def test_results_of_tools_go_back_into_the_conversation(client, world):
    messages = [
        *HI,
        {
            "role": "assistant",
            "content": [
                {"type": "text", "text": "I look."},
                {"type": "tool_use", "id": "a", "name": "get_weather", "input": {"city": "Paris"}},
                {"type": "tool_use", "id": "b", "name": "get_weather", "input": {"city": "Rome"}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "b", "content": [{"type": "text", "text": "rain"}]},
                {"type": "tool_result", "tool_use_id": "a", "content": "gone", "is_error": True},
                {"type": "text", "text": "And now?"},
            ],
        },
    ]
    world.generator.script = "Rain."
    await client.messages.create(model=MODEL, messages=messages, max_tokens=9, tools=[WEATHER])
    turns = world.generator.calls[0].prompt.messages
    assert [(turn.role, turn.content, turn.tool_call_id) for turn in turns[1:]] == [
        ("assistant", "I look.", ""),
        ("tool", "rain", "b"),
        ("tool", "Error: gone", "a"),
        ("user", "And now?", ""),
    ]
    assert '"arguments":"{\\"city\\":\\"Paris\\"}"' in turns[1].tool_calls_json


async def test_the_answer_keeps_to_a_schema(client, world):
    world.generator.script = '{"a": 1}'
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    await client.messages.create(
        model=MODEL,
        messages=HI,
        max_tokens=9,
        output_config={"format": {"type": "json_schema", "schema": schema}},
    )
    grammar = world.generator.calls[0].grammar
    assert grammar.kind == "json_schema" and '"integer"' in grammar.source


async def test_tokens_are_counted_without_an_answer(client, world):
    counted = await client.messages.count_tokens(model=MODEL, system="be brief", messages=HI)
    assert counted.input_tokens == 4
    assert world.generator.calls == [] and world.ledger.records == []


async def test_sources_are_told_beside_a_grounded_answer(client, world):
    world.retriever.sources = [Source("doc1", "e1", "doc1-0", "Engines", "Ada made it.", 0.5)]
    world.generator.context_length = 500
    answer = await client.messages.create(model="rag", messages=HI, max_tokens=2)
    assert answer.grounded is True and answer.sources[0]["document_id"] == "doc1"


async def test_errors_are_the_clients_own_classes(client, base_url, limited_key):
    with pytest.raises(anthropic.NotFoundError) as not_found:
        await client.messages.create(model="claude-9", messages=HI, max_tokens=9)
    assert not_found.value.type == "not_found_error" and not_found.value.request_id
    assert not_found.value.body["request_id"] == not_found.value.request_id
    with pytest.raises(anthropic.BadRequestError) as too_long:
        await client.messages.create(model=MODEL, messages=HI, max_tokens=1000)
    assert "exceed the context" in too_long.value.api_message
    url = base_url.removesuffix("/v1")
    async with AsyncAnthropic(base_url=url, auth_token="sk-no-no", max_retries=0) as stranger:
        with pytest.raises(anthropic.AuthenticationError):
            await stranger.messages.create(model=MODEL, messages=HI, max_tokens=9)
    async with AsyncAnthropic(base_url=url, auth_token=limited_key, max_retries=0) as limited:
        for _ in range(2):
            await limited.messages.create(model=MODEL, messages=HI, max_tokens=1)
        with pytest.raises(anthropic.RateLimitError) as too_many:
            await limited.messages.create(model=MODEL, messages=HI, max_tokens=1)
    assert too_many.value.type == "rate_limit_error" and too_many.value.response.headers["retry-after"] == "62"
    with pytest.raises(anthropic.APIStatusError) as too_large:
        await client.messages.create(model=MODEL, messages=[{"role": "user", "content": "x" * 70_000}], max_tokens=9)
    assert (too_large.value.status_code, too_large.value.type) == (413, "request_too_large")


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (PlatformError(Code.UNAVAILABLE, "gone"), "api_error"),
        (PlatformError(Code.OVERLOADED, "full"), "overloaded_error"),
        (RuntimeError("secret"), "api_error"),
    ],
)
async def test_a_failure_in_a_stream_is_an_error_event(client, world, error, kind):
    world.generator.error, world.generator.fail_after = error, 2
    stream = await client.messages.create(model=MODEL, messages=HI, max_tokens=4, stream=True)
    seen = []
    with pytest.raises(anthropic.APIStatusError) as caught:
        async for event in stream:
            seen.append(event.type)
    assert caught.value.type == kind and "secret" not in str(caught.value.body)
    assert seen.count("content_block_delta") == 2 and "message_stop" not in seen
    await eventually(lambda: len(world.ledger.records) == 1)
    assert (world.ledger.records[0].finish_reason, world.ledger.records[0].completion_tokens) == ("error", 2)


async def test_a_failure_before_the_first_event_is_a_status(client, world):
    world.generator.error = PlatformError(Code.OVERLOADED, "the queue is full", retry_after_s=3)
    with pytest.raises(anthropic.ServiceUnavailableError) as caught:
        await client.messages.create(model=MODEL, messages=HI, max_tokens=4, stream=True)
    assert caught.value.type == "overloaded_error" and caught.value.response.headers["retry-after"] == "3"


async def test_a_client_that_leaves_stops_the_work(client, world):
    world.generator.token_s, world.generator.context_length = 0.02, 5000
    stream = await client.messages.create(model=MODEL, messages=HI, max_tokens=2000, stream=True)
    async for event in stream:
        if event.type == "content_block_delta":
            break
    await stream.close()
    await eventually(lambda: world.generator.num_cancelled == 1)
    await eventually(lambda: len(world.ledger.records) == 1)
    record = world.ledger.records[0]
    assert record.finish_reason == "cancelled" and record.prompt_tokens == 2 and record.completion_tokens >= 1


async def test_models_are_listed_in_anthropics_shape(client):
    models = [model async for model in client.models.list()]
    assert [model.id for model in models] == ["all-minilm-l6-v2", "rag", MODEL]
    model = await client.models.retrieve("rag")
    assert (model.type, model.display_name, model.created_at.year) == ("model", "rag", 2023)
    with pytest.raises(anthropic.NotFoundError):
        await client.models.retrieve("claude-9")


PATH = "/v1/messages"


def body(**changes):
    return {"model": MODEL, "messages": HI, "max_tokens": 4} | changes


def user(*blocks):
    return body(messages=[{"role": "user", "content": list(blocks)}])


TEXT = {"type": "text", "text": "x"}
USE = {"type": "tool_use", "id": "a", "name": "f", "input": {}}
RESULT = {"type": "tool_result", "tool_use_id": "a", "content": "x"}
ASKS = {"role": "assistant", "content": [USE]}

BODIES = [
    ({"messages": HI, "max_tokens": 4}, 400, "model"),
    ({"model": MODEL, "max_tokens": 4}, 400, "messages"),
    ({"model": MODEL, "messages": HI}, 400, "max_tokens"),
    (body(model="claude-9"), 404, "claude-9"),
    (body(model=7), 400, "model"),
    (body(max_tokens=0), 400, "max_tokens"),
    (body(max_tokens=-1), 400, "max_tokens"),
    (body(max_tokens="9"), 400, "max_tokens"),
    (body(max_tokens=2**40), 400, "max_tokens"),
    (body(max_tokens=1000), 400, "context"),
    (body(temperature=1.1), 400, "temperature"),
    (body(temperature=-0.1), 400, "temperature"),
    (body(top_p=0), 400, "top_p"),
    (body(top_k=-1), 400, "top_k"),
    (body(stop_sequences="x"), 400, "stop_sequences"),
    (body(stop_sequences=[""]), 400, "stop_sequences[0]"),
    (body(stop_sequences=["x"] * 17), 400, "stop_sequences"),
    (body(stream="yes"), 400, "stream"),
    (body(system=5), 400, "system"),
    (body(system=[{"type": "image"}]), 400, "system[0].type"),
    (body(metadata={"user_id": "x" * 300}), 400, "metadata.user_id"),
    (body(thinking={"type": "enabled", "budget_tokens": 1024}), 400, "thinking.type"),
    (body(mcp_servers=[{"type": "url", "url": "https://x"}]), 400, "mcp_servers"),
    (body(container="c"), 400, "container"),
    (body(output_config={"format": {"type": "xml"}}), 400, "output_config.format.type"),
    (body(messages=[]), 400, "messages"),
    (body(messages="hi"), 400, "messages"),
    (body(messages=[{"role": "king", "content": "x"}]), 400, "messages[0].role"),
    (body(messages=[{"role": "user"}]), 400, "messages[0].content"),
    (body(messages=[{"role": "user", "content": ""}]), 400, "messages[0].content"),
    (body(messages=[{"role": "user", "content": []}]), 400, "messages[0].content"),
    (body(messages=[*HI, {"role": "assistant", "content": "The"}]), 400, "messages[1]"),
    (user({"type": "text", "text": ""}), 400, "messages[0].content[0].text"),
    (user({"type": "image", "source": {"type": "url", "url": "https://x"}}), 400, "no images"),
    (user({"type": "document", "source": {}}), 400, "messages[0].content[0]"),
    (user("x"), 400, "messages[0].content[0]"),
    (user(USE), 400, "messages[0]"),
    (user(RESULT), 400, "messages[0]"),
    (user({"type": "tool_result", "tool_use_id": "a", "content": [{"type": "image"}]}), 400, "content[0].type"),
    (body(messages=[*HI, ASKS, *HI]), 400, "messages[2]"),
    (body(messages=[*HI, ASKS, {"role": "user", "content": [TEXT, RESULT]}]), 400, "messages[2]"),
    (body(messages=[*HI, ASKS, {"role": "user", "content": [RESULT, RESULT]}]), 400, "messages[2]"),
    (body(messages=[*HI, {"role": "assistant", "content": [RESULT]}, *HI]), 400, "messages[1]"),
    (body(tools=[{"name": "f"}]), 400, "tools[0].input_schema"),
    (body(tools=[{"name": "a b", "input_schema": {}}]), 400, "tools[0].name"),
    (body(tools=[{"type": "web_search_20250305", "name": "web_search"}]), 400, "tools[0].type"),
    (body(tools=[WEATHER], tool_choice={"type": "tool"}), 400, "tool_choice.name"),
    (body(tools=[WEATHER], tool_choice={"type": "tool", "name": "g"}), 400, "tool_choice"),
    (body(tools=[WEATHER], tool_choice={"type": "some"}), 400, "tool_choice.type"),
    (body(tool_choice={"type": "any"}), 400, "tool_choice"),
]


@pytest.mark.parametrize(("sent", "status", "told"), BODIES)
async def test_bad_body_is_told_in_anthropics_envelope(world, sent, status, told):
    async with world.client() as client:
        response = await client.post(PATH, json=sent)
    assert response.status_code == status, response.text
    answer = response.json()
    assert set(answer) == {"type", "error", "request_id"} and set(answer["error"]) == {"type", "message"}
    assert answer["type"] == "error" and told in answer["error"]["message"]
    assert answer["error"]["type"] == {400: "invalid_request_error", 404: "not_found_error"}[status]
    assert answer["request_id"] == response.headers["request-id"] == response.headers["x-request-id"]
    await eventually(lambda: len(world.ledger.records) == 1)
    assert world.ledger.records[0].http_status == status and world.generator.num_finished == 0


@pytest.mark.parametrize(
    ("method", "path", "headers", "status", "kind"),
    [
        ("POST", PATH, {"authorization": "Bearer sk-no-no"}, 401, "authentication_error"),
        ("GET", PATH, {}, 405, "invalid_request_error"),
        ("POST", f"{PATH}/nothing", {}, 404, "not_found_error"),
        ("GET", "/v1/nothing", {"anthropic-version": "2023-06-01"}, 404, "not_found_error"),
        ("POST", PATH, {"content-type": "text/xml"}, 415, "invalid_request_error"),
    ],
)
async def test_every_error_of_these_routes_is_in_the_envelope(world, method, path, headers, status, kind):
    async with world.client() as client:
        response = await client.request(method, path, content=b"{", headers=headers)
    assert response.status_code == status
    assert (response.json()["type"], response.json()["error"]["type"]) == ("error", kind)
    assert response.headers["request-id"]
