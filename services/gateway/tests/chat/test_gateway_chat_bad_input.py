"""What strangers send: every case has a status, a code, the field at fault and nothing of the server's inside."""

import json

import pytest

from chassis.errors import Code, PlatformError
from gateway.core.services import Source
from testkit import eventually

CHAT, COMPLETIONS, EMBEDDINGS = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
MODEL = "smollm2-135m-instruct"
HI = [{"role": "user", "content": "hello"}]


def chat(**changes):
    return {"model": MODEL, "messages": HI} | changes


def completion(**changes):
    return {"model": MODEL, "prompt": "hello"} | changes


def embedding(**changes):
    return {"model": "all-minilm-l6-v2", "input": "hello"} | changes


def turn(**changes):
    return chat(messages=[{"role": "user", "content": "x"} | changes])


BODIES = [
    # what is asked
    (CHAT, chat(model="gpt-9"), 404, "model_not_found", "model"),
    (CHAT, chat(model="../../etc/passwd"), 404, "model_not_found", "model"),
    (CHAT, chat(model="rag\x00"), 404, "model_not_found", "model"),
    (CHAT, chat(model="all-minilm-l6-v2"), 404, "model_not_found", "model"),
    (CHAT, chat(model=""), 400, "invalid_value", "model"),
    (CHAT, chat(model=7), 400, "invalid_type", "model"),
    (CHAT, chat(model="x" * 300), 400, "invalid_value", "model"),
    (CHAT, {"messages": HI}, 400, "missing_required_parameter", "model"),
    (CHAT, {"model": MODEL}, 400, "missing_required_parameter", "messages"),
    # messages
    (CHAT, chat(messages=[]), 400, "invalid_value", "messages"),
    (CHAT, chat(messages="hello"), 400, "invalid_type", "messages"),
    (CHAT, chat(messages=[1]), 400, "invalid_type", "messages[0]"),
    (CHAT, chat(messages=[{"content": "x"}]), 400, "missing_required_parameter", "messages[0].role"),
    (CHAT, turn(role="king"), 400, "invalid_value", "messages[0].role"),
    (CHAT, turn(content=None), 400, "invalid_value", "messages[0]"),
    (CHAT, turn(content=5), 400, "invalid_type", "messages[0].content"),
    (CHAT, turn(content=[{"type": "image_url"}]), 400, "invalid_value", "messages[0].content[0].type"),
    (CHAT, turn(content=[{"type": "text"}]), 400, "missing_required_parameter", "messages[0].content[0].text"),
    (CHAT, turn(content=["x"]), 400, "invalid_type", "messages[0].content[0]"),
    # parameters
    (CHAT, chat(max_tokens=-1), 400, "invalid_value", "max_tokens"),
    (CHAT, chat(max_tokens=0), 400, "invalid_value", "max_tokens"),
    (CHAT, chat(max_tokens=1.5), 400, "invalid_type", "max_tokens"),
    (CHAT, chat(max_tokens="9"), 400, "invalid_type", "max_tokens"),
    (CHAT, chat(max_tokens=10**30), 400, "invalid_type", "max_tokens"),
    (CHAT, chat(max_tokens=2**40), 400, "invalid_value", "max_tokens"),
    (CHAT, chat(max_tokens=1000), 400, "context_length_exceeded", "messages"),
    (CHAT, chat(max_completion_tokens=True), 400, "invalid_type", "max_completion_tokens"),
    (CHAT, chat(temperature=-0.1), 400, "invalid_value", "temperature"),
    (CHAT, chat(temperature=99), 400, "invalid_value", "temperature"),
    (CHAT, chat(temperature="hot"), 400, "invalid_type", "temperature"),
    (CHAT, chat(top_p=0), 400, "invalid_value", "top_p"),
    (CHAT, chat(n=0), 400, "invalid_value", "n"),
    (CHAT, chat(n=10**6), 400, "invalid_value", "n"),
    (CHAT, chat(stream="yes"), 400, "invalid_type", "stream"),
    (CHAT, chat(stream_options={"include_usage": True}), 400, "invalid_value", "stream_options"),
    (CHAT, chat(stop=[""]), 400, "invalid_value", "stop[0]"),
    (CHAT, chat(stop=["x"] * 17), 400, "invalid_value", "stop"),
    (CHAT, chat(stop="x" * 2000), 400, "invalid_value", "stop"),
    (CHAT, chat(stop=3), 400, "invalid_type", "stop"),
    (CHAT, chat(seed=1.5), 400, "invalid_type", "seed"),
    (CHAT, chat(seed=-(2**70)), 400, "invalid_type", "seed"),
    (CHAT, chat(presence_penalty=3), 400, "invalid_value", "presence_penalty"),
    (CHAT, chat(logit_bias={"one": 1}), 400, "invalid_value", "logit_bias"),
    (CHAT, chat(logit_bias={"-1": 1}), 400, "invalid_value", "logit_bias"),
    (CHAT, chat(logit_bias={"1": 101}), 400, "invalid_value", "logit_bias.1"),
    (CHAT, chat(logit_bias=[1]), 400, "invalid_type", "logit_bias"),
    (CHAT, chat(top_logprobs=3), 400, "invalid_value", "top_logprobs"),
    (CHAT, chat(logprobs=True, top_logprobs=21), 400, "invalid_value", "top_logprobs"),
    (CHAT, chat(min_p=2), 400, "invalid_value", "min_p"),
    (CHAT, chat(repetition_penalty=0), 400, "invalid_value", "repetition_penalty"),
    (CHAT, chat(response_format={"type": "json_object"}), 501, "unimplemented", "response_format"),
    (CHAT, chat(response_format={"type": "xml"}), 400, "invalid_value", "response_format.type"),
    (CHAT, chat(response_format={"type": "json_schema"}), 400, "invalid_value", "response_format"),
    (CHAT, chat(tools=[{"type": "function", "function": {"name": "f"}}]), 501, "unimplemented", "tools"),
    (CHAT, chat(model="rag", messages=[{"role": "system", "content": "x"}]), 400, "invalid_value", "messages"),
    # completions
    (COMPLETIONS, {"model": MODEL}, 400, "missing_required_parameter", "prompt"),
    (COMPLETIONS, completion(prompt=[]), 400, "invalid_value", "prompt"),
    (COMPLETIONS, completion(prompt=7), 400, "invalid_type", "prompt"),
    (COMPLETIONS, completion(prompt=[1, -1]), 400, "invalid_value", "prompt[1]"),
    (COMPLETIONS, completion(prompt=[1, "x"]), 400, "invalid_type", "prompt[1]"),
    (COMPLETIONS, completion(prompt=[[]]), 400, "invalid_value", "prompt[0]"),
    (COMPLETIONS, completion(prompt=["x"] * 65, n=2), 400, "invalid_value", "prompt"),
    (COMPLETIONS, completion(logprobs=True), 400, "invalid_type", "logprobs"),
    (COMPLETIONS, completion(suffix="end"), 400, "unsupported_parameter", "suffix"),
    (COMPLETIONS, completion(best_of=3), 400, "unsupported_parameter", "best_of"),
    (COMPLETIONS, completion(model="rag"), 400, "model_not_supported", "model"),
    # embeddings
    (EMBEDDINGS, embedding(input="x " * 20), 400, "context_length_exceeded", "input"),
    (EMBEDDINGS, embedding(input=""), 400, "invalid_value", "input"),
    (EMBEDDINGS, embedding(input=[]), 400, "invalid_value", "input"),
    (EMBEDDINGS, embedding(input=["x", ""]), 400, "invalid_value", "input[1]"),
    (EMBEDDINGS, embedding(input={"a": 1}), 400, "invalid_type", "input"),
    (EMBEDDINGS, embedding(input=["x"] * 2049), 400, "invalid_value", "input"),
    (EMBEDDINGS, embedding(model=MODEL), 404, "model_not_found", "model"),
    (EMBEDDINGS, embedding(encoding_format="hex"), 400, "invalid_value", "encoding_format"),
    (EMBEDDINGS, embedding(dimensions=0), 400, "invalid_value", "dimensions"),
]


def well_formed_error(response, status, code, param=None):
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["code"], error["param"]) == (code, param)
    assert error["message"] and "Traceback" not in response.text and "pydantic" not in response.text
    assert len(response.headers["x-trace-id"]) == 32 and response.headers["x-request-id"]


@pytest.mark.parametrize(("path", "body", "status", "code", "param"), BODIES)
async def test_bad_body_names_the_field(world, path, body, status, code, param):
    async with world.client() as client:
        response = await client.post(path, json=body)
    well_formed_error(response, status, code, param)
    await eventually(lambda: len(world.ledger.records) == 1)
    record = world.ledger.records[0]
    assert (record.http_status, record.finish_reason, record.error_code) == (status, "error", code)
    assert (record.prompt_tokens, record.completion_tokens) == (0, 0)


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
async def test_too_many_tokens_name_the_field_that_was_sent(world, name):
    world.generator.error = PlatformError(Code.OUT_OF_RANGE, "too many", param="max_tokens")
    async with world.client() as client:
        response = await client.post(CHAT, json=chat(**{name: 9000}))
    well_formed_error(response, 400, "out_of_range", name)


@pytest.mark.parametrize(("changes", "param"), [({"max_tokens": 9000}, "max_tokens"), ({}, "messages")])
async def test_rag_names_what_is_too_long(world, changes, param):
    world.retriever.sources = [Source("doc1", "", "doc1-0", "Engines", "Ada made it.", 0.5)]
    world.generator.context_length = 64 if param == "messages" else 500
    async with world.client() as client:
        response = await client.post(CHAT, json=chat(model="rag", **changes))
    well_formed_error(response, 400, "context_length_exceeded", param)


async def test_rag_calls_the_question_by_the_name_it_was_sent_under(world, monkeypatch):
    async def too_long(*_, **__):
        raise PlatformError(Code.OUT_OF_RANGE, "input 0 is too long", param="input")

    monkeypatch.setattr(world.embedder, "embed", too_long)
    async with world.client() as client:
        response = await client.post(CHAT, json=chat(model="rag"))
    well_formed_error(response, 400, "out_of_range", "messages")


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, EMBEDDINGS])
@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b'{"model": NaN}',
        b'{"model": Infinity}',
        b'{"model": 1e999}',
        b'{"model": "a", "model": "b"}',
        b'{"model": "\\ud800"}',
        b'{"model": "\xff"}',
        b"\xef\xbb\xbf{}",
        b"[" * 30_000,
        b"[" * 900 + b"]" * 900,
        b'{"a":' * 5_000 + b"1" + b"}" * 5_000,
    ],
    ids=lambda raw: repr(raw[:28]),
)
async def test_what_is_no_json_is_refused(world, path, raw):
    async with world.client() as client:
        response = await client.post(path, content=raw, headers={"content-type": "application/json"})
    well_formed_error(response, 400, "invalid_json")


@pytest.mark.parametrize("raw", [b"[]", b'"x"', b"null", b"1"])
async def test_what_is_no_object_is_refused(world, raw):
    async with world.client() as client:
        response = await client.post(CHAT, content=raw, headers={"content-type": "application/json"})
    well_formed_error(response, 400, "invalid_type")


async def test_deep_but_tolerated_fields_do_no_harm(world):
    deep = json.loads("[" * 60 + "]" * 60)
    async with world.client() as client:
        response = await client.post(CHAT, json=chat(metadata=deep, unknown_field=1, user="u"))
    assert response.status_code == 200


async def test_null_means_the_default(world):
    nulls = dict.fromkeys(["temperature", "stop", "seed", "n", "stream", "stream_options", "tools", "logit_bias"])
    async with world.client() as client:
        response = await client.post(CHAT, json=chat(**nulls))
    assert response.status_code == 200


async def test_oversize_body_is_refused_by_its_word_and_by_its_bytes(world):
    big = b'{"model": "' + b"x" * 70_000 + b'"}'
    headers = {"content-type": "application/json"}

    async def in_chunks():
        for start in range(0, len(big), 1000):
            yield big[start : start + 1000]

    async with world.client() as client:
        by_word = await client.post(CHAT, content=big, headers=headers)
        by_bytes = await client.post(CHAT, content=in_chunks(), headers=headers)
    for response in (by_word, by_bytes):
        well_formed_error(response, 413, "payload_too_large")
        assert response.headers["connection"] == "close"


@pytest.mark.parametrize(
    ("headers", "param"),
    [
        ({"content-type": "text/xml"}, "content-type"),
        ({"content-type": "application/json", "content-encoding": "gzip"}, "content-encoding"),
    ],
)
async def test_other_media_are_refused(world, headers, param):
    async with world.client() as client:
        response = await client.post(CHAT, content=b"{}", headers=headers)
    well_formed_error(response, 415, "unsupported_media_type", param)


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/v1/nothing", 404, "unknown_url"),
        ("GET", "/nothing", 404, "unknown_url"),
        ("GET", "/v1/chat/completions/", 404, "unknown_url"),
        ("GET", "/v1/../admin", 404, "unknown_url"),
        ("GET", CHAT, 405, "method_not_allowed"),
        ("DELETE", "/v1/models", 405, "method_not_allowed"),
    ],
)
async def test_unknown_routes_and_methods(world, method, path, status, code):
    async with world.client() as client:
        response = await client.request(method, path)
    well_formed_error(response, status, code)


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [("authorization", "Bearer sk-no-no")],
        [("authorization", "Bearer ")],
        [("authorization", "Basic sk-one-secret")],
        [("authorization", "sk-one-secret")],
        [("authorization", "Bearer " + "x" * 5000)],
        [("authorization", "Bearer sk-one-secret"), ("authorization", "Bearer sk-one-secret")],
        [("authorization", "Bearer schl\u00fcssel".encode().decode("latin-1"))],
    ],
)
@pytest.mark.parametrize("path", ["/v1/models", CHAT, "/v1/nothing", "/admin/keys"])
async def test_without_a_valid_key_nothing_is_told(world, headers, path):
    async with world.client(key=None) as client:
        response = await client.post(path, headers=[(n, v.encode("latin-1")) for n, v in headers], json=chat())
    well_formed_error(response, 401, "invalid_api_key")
    assert response.headers["www-authenticate"] == "Bearer"
    assert world.ledger.records == [] and world.generator.calls == []


async def test_an_unexpected_failure_tells_nothing_of_the_inside(world):
    world.generator.error = RuntimeError("the password is hunter2")
    async with world.client() as client:
        response = await client.post(CHAT, json=chat())
    well_formed_error(response, 500, "internal_error")
    assert "hunter2" not in response.text
    await eventually(lambda: len(world.ledger.records) == 1)
    assert world.ledger.records[0].error_code == "internal_error"
