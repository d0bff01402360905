"""What an OpenAI-compatible upstream is asked, and what its answers become."""

import json

import pytest

from chassis.errors import Code, PlatformError
from gateway.backends.openai_request import Dialect, request_of
from gateway.core.services import (
    Chat,
    Delta,
    Done,
    Finished,
    Generation,
    Grammar,
    Message,
    Sampling,
    Started,
    Stopping,
    TokenLogprob,
    ToolCallDelta,
    ToolCalls,
    TopLogprob,
    Usage,
)

from .conftest import HELLO, KEY, chunk, usage

TOOLS = '[{"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}]'


def body_of(call, **dialect):
    path, body = request_of(call, Dialect(**dialect))
    return path, json.loads(body)


async def test_a_stream_comes_out_as_events_with_the_upstreams_own_usage(ask, server):
    server.says(
        chunk(content="", delta={"role": "assistant"}, system_fingerprint="fp_1"),
        chunk(content="Hel"),
        chunk(content="lo"),
        chunk(finish="stop"),
        usage(10, 7, 4),
    )
    assert await ask() == [
        Started(3, "fp_1", is_estimate=True),
        Delta(0, "Hel", 1),
        Delta(0, "lo", 1),
        Finished(0, "stop"),
        Done(Usage(10, 7, 4)),
    ]
    (asked,) = server.asked
    assert asked.path == "/v1/chat/completions"
    assert asked.body == {
        "model": "their-model",
        "messages": [{"role": "user", "content": "hello there"}],
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    assert asked.headers["authorization"] == f"Bearer {KEY}" and asked.headers["accept-encoding"] == "identity"


async def test_usage_on_the_last_chunk_with_a_choice_counts_as_well(ask, server):
    server.says(chunk(content="tok "), {**usage(10, 16), "choices": chunk(finish="length")["choices"]})
    assert (await ask())[-2:] == [Finished(0, "length"), Done(Usage(10, 16))]


async def test_several_choices_keep_their_numbers(ask, server):
    server.says(
        *(chunk(content=f"c{index}", index=index) for index in (1, 0, 1)),
        *(chunk(finish="stop", index=index) for index in (0, 1)),
        usage(5, 3),
    )
    events = await ask(n=2)
    assert [(event.index, event.text) for event in events if isinstance(event, Delta)] == [
        (1, "c1"),
        (0, "c0"),
        (1, "c1"),
    ]
    assert server.asked[0].body["n"] == 2 and events[-1] == Done(Usage(5, 3))


async def test_where_no_usage_is_told_the_count_is_marked_as_an_estimate(ask, server):
    server.says(chunk(content="one "), chunk(content="two"), chunk(finish="stop"))
    assert (await ask())[-1] == Done(Usage(3, 2, is_estimate=True))


async def test_running_usage_gives_exact_counts_before_the_end(ask, server, upstream):
    def counted(prompt, completion):
        return {"usage": usage(prompt, completion)["usage"]}

    server.says(
        chunk(content="", **counted(11, 0)),
        chunk(content="two tokens", **counted(11, 2)),
        chunk(content="!", finish="stop", **counted(11, 3)),
        usage(11, 3),
    )
    events = await ask(made=upstream(extensions=True))
    assert events[0] == Started(11, "") and [e.num_tokens for e in events if isinstance(e, Delta)] == [2, 1]
    assert server.asked[0].body["stream_options"]["continuous_usage_stats"] is True


async def test_tool_calls_come_as_calls_and_not_as_text(ask, server):
    def call(**fields):
        return chunk(delta={"tool_calls": [fields]})

    server.says(
        call(index=0, id="call_a", type="function", function={"name": "get_weather", "arguments": ""}),
        call(index=0, function={"arguments": '{"city": '}),
        call(index=0, function={"arguments": '"Paris"}'}),
        call(index=1, id="call_b", type="function", function={"name": "get_weather", "arguments": "{}"}),
        chunk(finish="tool_calls"),
        usage(20, 9),
    )
    events = await ask(grammar=ToolCalls(TOOLS, is_required=True, is_parallel=False))
    assert events[1:-2] == [
        ToolCallDelta(0, 0, "", 1, "call_a", "get_weather"),
        ToolCallDelta(0, 0, '{"city": ', 1),
        ToolCallDelta(0, 0, '"Paris"}', 1),
        ToolCallDelta(0, 1, "{}", 1, "call_b", "get_weather"),
    ]
    assert events[-2] == Finished(0, "tool_calls")
    body = server.asked[0].body
    assert body["tools"] == json.loads(TOOLS)
    assert (body["tool_choice"], body["parallel_tool_calls"]) == ("required", False)


async def test_log_probabilities_of_chats_and_completions(ask, server):
    told = {"token": "Hi", "logprob": -0.5, "bytes": [72, 105], "top_logprobs": [{"token": "Ho", "logprob": -2}]}
    answer = chunk(content="Hi", finish="stop")
    answer["choices"][0]["logprobs"] = {"content": [told]}
    server.says(answer, usage(1, 1))
    events = await ask(logprobs=1)
    expected = TokenLogprob(0, -0.5, "Hi", b"Hi", (TopLogprob(0, -2.0, "Ho", b"Ho"),))
    assert events[1] == Delta(0, "Hi", 1, (expected,))
    assert server.asked[0].body["logprobs"] is True and server.asked[0].body["top_logprobs"] == 1

    logprobs = {"tokens": ["Hi"], "token_logprobs": [-0.5], "top_logprobs": [{"Ho": -2}], "text_offset": [0]}
    choice = {"index": 0, "text": "Hi", "logprobs": logprobs, "finish_reason": "length"}
    server.says({"choices": [choice]}, usage(1, 1))
    events = await ask("Say", logprobs=1)
    assert events[1] == Delta(0, "Hi", 1, (expected,))
    assert server.asked[1].path == "/v1/completions" and server.asked[1].body["logprobs"] == 1


@pytest.mark.parametrize("prompt", ["Say it", (5, 6)])
async def test_an_echo_tells_the_prompts_log_probabilities_apart_from_the_completions(ask, server, prompt):
    logprobs = {"tokens": ["Say", " it", " now"], "token_logprobs": [None, -1, -2], "top_logprobs": None}
    choice = {"index": 0, "text": "Say it now", "logprobs": logprobs, "finish_reason": "length"}
    server.sends(json.dumps(usage(2, 1) | {"choices": [choice]}).encode(), kind="application/json")
    started, delta, finished, done = await ask(prompt, logprobs=0, prompt_logprobs=0)
    assert [token.text for token in started.prompt_logprobs] == ["Say", " it"] and started.prompt_tokens == 2
    assert (delta.text, delta.num_tokens, delta.logprobs[0].logprob) == (" now", 1, -2.0)
    assert (finished, done) == (Finished(0, "length"), Done(Usage(2, 1)))
    assert server.asked[0].body["echo"] is True and "stream" not in server.asked[0].body


async def test_a_server_that_knows_no_streams_may_answer_in_one_piece(ask, server):
    call = {"id": "call_a", "type": "function", "function": {"name": "get_weather", "arguments": "{}"}}
    message = {"role": "assistant", "content": "Let me see.", "tool_calls": [call]}
    whole = {**usage(8, 5), "choices": [{"index": 0, "message": message, "finish_reason": "tool_calls"}]}
    server.sends(json.dumps(whole).encode(), kind="application/json")
    events = await ask(grammar=ToolCalls(TOOLS, is_required=False, is_parallel=True))
    assert events[1:] == [
        Delta(0, "Let me see.", 1),
        ToolCallDelta(0, 0, "{}", 0, "call_a", "get_weather"),
        Finished(0, "tool_calls"),
        Done(Usage(8, 5)),
    ]


async def test_a_connection_serves_one_request_after_the_other(ask, server):
    server.says(chunk(content="a", finish="stop"), usage(1, 1))
    for _ in range(3):
        await ask()
    assert (len(server.asked), server.num_connections) == (3, 1)


def test_all_parameters_are_passed_on():
    call = Generation(
        "m",
        HELLO,
        "acme",
        sampling=Sampling(0.5, 0.9, 40, 0.1, 0.2, 0.3, 1.1, {7: -3.0}, 2**64 - 5),
        stopping=Stopping(20, 3, ("END",), True),
        grammar=Grammar("choice", '["yes", "no"]'),
    )
    _, body = body_of(call, has_extensions=True, max_tokens_field="max_completion_tokens")
    del body["messages"], body["stream_options"]
    assert body == {
        "model": "m",
        "stream": True,
        "max_completion_tokens": 20,
        "temperature": 0.5,
        "top_p": 0.9,
        "frequency_penalty": 0.2,
        "presence_penalty": 0.3,
        "logit_bias": {"7": -3.0},
        "stop": ["END"],
        "seed": -5,
        "top_k": 40,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
        "min_tokens": 3,
        "ignore_eos": True,
        "structured_outputs": {"choice": ["yes", "no"]},
    }


def test_tool_turns_are_passed_on():
    calls = '[{"id":"call_a","type":"function","function":{"name":"f","arguments":"{}"}}]'
    chat = Chat((Message("assistant", "", calls), Message("tool", "18 degrees", tool_call_id="call_a")))
    _, body = body_of(Generation("m", chat, "acme"))
    assert body["messages"] == [
        {"role": "assistant", "content": None, "tool_calls": json.loads(calls)},
        {"role": "tool", "content": "18 degrees", "tool_call_id": "call_a"},
    ]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"sampling": Sampling(top_k=5)}, "top_k"),
        ({"stopping": Stopping(ignore_eos=True)}, "ignore_eos"),
        ({"grammar": Grammar("regex", "a+")}, "grammar"),
    ],
)
def test_what_the_server_does_not_understand_is_refused_by_name(fields, param):
    call = Generation("m", HELLO, "acme", **fields)
    with pytest.raises(PlatformError) as caught:
        request_of(call, Dialect())
    assert (caught.value.code, caught.value.param) == (Code.UNIMPLEMENTED, param)
    request_of(call, Dialect(has_extensions=True))


@pytest.mark.parametrize("is_strict", [True, False])
def test_a_schema_is_asked_for_as_strictly_as_the_client_did(is_strict):
    _, body = body_of(Generation("m", HELLO, "acme", grammar=Grammar("json_schema", '{"type": "object"}', is_strict)))
    wanted = {"name": "answer", "schema": {"type": "object"}, "strict": is_strict}
    assert body["response_format"] == {"type": "json_schema", "json_schema": wanted}
