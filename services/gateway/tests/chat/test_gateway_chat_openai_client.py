"""The official OpenAI client against the application behind a real server."""

import threading

import openai
import pytest
from openai import AsyncOpenAI

from gateway.api import openai_embeddings
from testkit import eventually

MODEL = "smollm2-135m-instruct"
HI = [{"role": "user", "content": "hello there"}]


@pytest.fixture
async def client(base_url, key):
    async with AsyncOpenAI(base_url=base_url, api_key=key, max_retries=0) as client:
        yield client


async def test_chat_in_one_piece(client, world):
    answer = await client.chat.completions.create(model=MODEL, messages=HI, max_tokens=3)
    assert answer.choices[0].message.content == "w0 w1 w2"
    assert answer.choices[0].finish_reason == "length"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (2, 3, 5)
    assert answer.usage.prompt_tokens_details.cached_tokens == 1
    assert answer.object == "chat.completion" and answer.model == MODEL
    await eventually(lambda: len(world.ledger.records) == 1)
    record = world.ledger.records[0]
    assert (record.tenant, record.key_id, record.model) == ("acme", "one", MODEL)
    assert (record.prompt_tokens, record.completion_tokens, record.cached_tokens) == (2, 3, 1)
    assert (record.finish_reason, record.http_status, record.stream) == ("length", 200, False)
    assert (record.prompt_text, record.completion_text) == ("hello there", "w0 w1 w2")
    assert record.duration_s >= record.ttft_s > 0


async def test_chat_as_a_stream(client, world):
    stream = await client.chat.completions.create(
        model=MODEL, messages=HI, max_tokens=3, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].delta.content for chunk in chunks[1:4]] == ["w0", " w1", " w2"]
    assert chunks[4].choices[0].finish_reason == "length"
    assert chunks[5].choices == [] and chunks[5].usage.total_tokens == 5
    assert len({chunk.id for chunk in chunks}) == 1 and len(chunks) == 6
    await eventually(lambda: len(world.ledger.records) == 1)
    assert world.ledger.records[0].stream


async def test_every_parameter_reaches_the_generator(client, world):
    await client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "developer", "content": "be brief"}, *HI],
        max_completion_tokens=4,
        temperature=0.5,
        top_p=0.9,
        n=2,
        stop=["x", "y"],
        seed=-1,
        frequency_penalty=0.25,
        presence_penalty=-0.5,
        logit_bias={"17": 5},
        user="u",
        extra_body={"top_k": 3, "min_p": 0.125, "repetition_penalty": 1.5, "min_tokens": 2, "ignore_eos": True},
    )
    (call,) = world.generator.calls
    assert [message.role for message in call.prompt.messages] == ["system", "user"]
    assert (call.sampling.temperature, call.sampling.top_p, call.sampling.top_k) == (0.5, 0.9, 3)
    assert (call.sampling.min_p, call.sampling.repetition_penalty) == (0.125, 1.5)
    assert (call.sampling.frequency_penalty, call.sampling.presence_penalty) == (0.25, -0.5)
    assert call.sampling.logit_bias == {17: 5.0} and call.sampling.seed == 2**64 - 1
    assert (call.stopping.max_tokens, call.stopping.min_tokens) == (4, 2)
    assert call.stopping.stop == ("x", "y") and call.stopping.ignore_eos
    assert (call.n, call.tenant) == (2, "acme")


async def test_choices_and_logprobs(client):
    answer = await client.chat.completions.create(
        model=MODEL, messages=HI, max_tokens=2, n=2, logprobs=True, top_logprobs=2
    )
    assert [choice.index for choice in answer.choices] == [0, 1]
    content = answer.choices[1].logprobs.content
    assert [token.token for token in content] == ["w0", " w1"]
    assert len(content[0].top_logprobs) == 2 and content[0].bytes == [119, 48]


async def test_parts_of_text_are_joined(client, world):
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    await client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": parts}], max_tokens=1)
    assert world.generator.calls[0].prompt.messages[0].content == "one\ntwo"


async def test_completion_with_echo_and_logprobs(client):
    answer = await client.completions.create(
        model=MODEL, prompt="to be or", max_tokens=2, echo=True, logprobs=1, temperature=0
    )
    choice = answer.choices[0]
    assert choice.text == "to be orw0 w1"
    assert choice.logprobs.tokens == ["to", "be", "or", "w0", " w1"]
    assert choice.logprobs.token_logprobs == [None, -1.0, -1.0, -0.5, -0.5]
    assert choice.logprobs.text_offset == [0, 2, 4, 6, 8]
    assert choice.logprobs.top_logprobs[0] is None and choice.logprobs.top_logprobs[3]["w0"] == -0.5


async def test_completion_of_several_prompts(client, world):
    answer = await client.completions.create(model=MODEL, prompt=["a", "b c", "d e f"], max_tokens=2, n=2)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3, 4, 5]
    assert all(choice.text == "w0 w1" for choice in answer.choices)
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (6, 12)
    assert len(world.generator.calls) == 3
    await eventually(lambda: len(world.ledger.records) == 1)
    assert world.ledger.records[0].completion_tokens == 12


async def test_completion_of_token_ids_as_a_stream(client):
    stream = await client.completions.create(
        model=MODEL, prompt=[1, 2], max_tokens=2, stream=True, echo=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == "t1t2w0 w1"
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].usage.prompt_tokens == 2


@pytest.mark.parametrize("encoding", ["float", "base64", None])
async def test_embeddings(client, world, encoding):
    extra = {} if encoding is None else {"encoding_format": encoding}
    answer = await client.embeddings.create(model="all-minilm-l6-v2", input=["a b", "c d e f"], **extra)
    vector = answer.data[1].embedding
    if encoding == "base64":  # the client decodes only what it asked for by itself
        assert vector == "AAAAPwAAAD8AAIC+"
    else:
        assert list(vector) == [0.5, 0.5, -0.25]
    assert answer.usage.prompt_tokens == answer.usage.total_tokens == 6
    await eventually(lambda: len(world.ledger.records) == 1)
    record = world.ledger.records[0]
    assert (record.prompt_tokens, record.completion_tokens, record.finish_reason) == (6, 0, "stop")


@pytest.mark.parametrize("encoding", ["float", "base64"])
async def test_many_embeddings_are_written_outside_the_event_loop(client, monkeypatch, encoding):
    threads, write = [], openai_embeddings._json

    def watched(*arguments):
        threads.append(threading.current_thread())
        return write(*arguments)

    monkeypatch.setattr(openai_embeddings, "_json", watched)
    inputs = ["a " * (1 + number % 16) for number in range(2048)]
    response = await client.embeddings.with_raw_response.create(
        model="all-minilm-l6-v2", input=inputs, encoding_format=encoding
    )
    data = response.http_response.json()["data"]
    assert [one["index"] for one in data] == list(range(2048))
    assert data[17]["embedding"] == ("AACAPgAAAD8AAIC+" if encoding == "base64" else [0.25, 0.5, -0.25])
    assert threads and threading.main_thread() not in threads


async def test_embeddings_of_token_ids_with_dimensions(client, world):
    answer = await client.embeddings.create(model="all-minilm-l6-v2", input=[[1, 2], [3]], dimensions=2)
    assert [len(one.embedding) for one in answer.data] == [2, 2]
    assert world.embedder.calls == [[(1, 2), (3,)]]


async def test_models(client):
    models = await client.models.list()
    assert [(model.id, model.created) for model in models.data] == [
        ("all-minilm-l6-v2", 1_600_000_000),
        ("rag", 1_700_000_000),
        ("smollm2-135m-instruct", 1_700_000_000),
    ]
    assert (await client.models.retrieve("rag")).object == "model"
    with pytest.raises(openai.NotFoundError):
        await client.models.retrieve("gpt-9")


async def test_errors_are_the_clients_own_classes(client, base_url):
    with pytest.raises(openai.NotFoundError) as caught:
        await client.chat.completions.create(model="gpt-9", messages=HI)
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError) as caught:
        await client.chat.completions.create(model=MODEL, messages=HI, max_tokens=1000)
    assert caught.value.code == "context_length_exceeded"
    async with AsyncOpenAI(base_url=base_url, api_key="sk-no-no", max_retries=0) as stranger:
        with pytest.raises(openai.AuthenticationError):
            await stranger.models.list()
