"""POST /generate and rerank, and what OpenAI's own routes take beside the plain request."""

import json

import pytest

from chassis.errors import Code, PlatformError
from testkit import eventually

MODEL, ENCODER = "smollm2-135m-instruct", "all-minilm-l6-v2"
HI = [{"role": "user", "content": "hello"}]


async def test_generate_tells_prompt_and_completion_in_one(world):
    sent = {"prompt": "to be", "max_tokens": 2, "n": 2, "temperature": 0.5, "best_of": 1, "use_beam_search": False}
    async with world.client() as client:
        response = await client.post("/generate", json=sent)
    assert response.json() == {"text": ["to bew0 w1", "to bew0 w1"]}
    (call,) = world.generator.calls
    assert (call.model, call.prompt, call.n, call.sampling.temperature) == (MODEL, "to be", 2, 0.5)
    await eventually(lambda: len(world.ledger.records) == 1)
    record = world.ledger.records[0]
    assert (record.route, record.model, record.prompt_tokens, record.completion_tokens) == ("/generate", MODEL, 2, 4)


async def test_generate_streams_a_line_for_every_step(world):
    async with world.client() as client:
        response = await client.post("/generate", json={"prompt": "to be", "max_tokens": 3, "stream": True})
    lines = [json.loads(line) for line in response.text.splitlines()]
    assert lines == [{"text": ["to bew0"]}, {"text": ["to bew0 w1"]}, {"text": ["to bew0 w1 w2"]}]
    assert response.headers["content-type"] == "application/x-ndjson"


async def test_generate_says_a_failure_in_a_line_of_its_own(world):
    world.generator.error, world.generator.fail_after = RuntimeError("secret"), 1
    async with world.client() as client:
        response = await client.post("/generate", json={"prompt": "to be", "stream": True})
    lines = [json.loads(line) for line in response.text.splitlines()]
    assert lines[0] == {"text": ["to bew0"]} and lines[1]["error"]["code"] == "internal_error"
    assert len(lines) == 2 and "secret" not in response.text


@pytest.mark.parametrize(("max_tokens", "told"), [(62, 62), (63, None), (2**31 - 1, None)])
async def test_a_completion_that_does_not_fit_ends_where_the_context_does(world, max_tokens, told):
    async with world.client() as client:
        response = await client.post("/generate", json={"prompt": "to be", "max_tokens": max_tokens})
    assert response.status_code == 200 and world.generator.calls[0].stopping.max_tokens == told


@pytest.mark.parametrize("path", ["/generate", "/rerank"])
async def test_routes_outside_v1_need_a_key_and_count_against_its_limit(world, limited_key, path):
    async with world.client(key=None) as stranger:
        assert (await stranger.post(path, json={"prompt": "x"})).status_code == 401
    async with world.client(limited_key) as client:
        answers = [await client.post(path, json={}) for _ in range(3)]
    assert [answer.status_code for answer in answers] == [400, 400, 429]
    await eventually(lambda: len(world.ledger.records) == 3)


DOCUMENTS = ["a b c d", {"text": "a"}, "a b c d e f g h"]


@pytest.mark.parametrize("path", ["/v1/rerank", "/rerank"])
async def test_documents_are_ordered_by_their_relevance(world, path):
    # The fake's vectors are (words / 8, 0.5, -0.25): more words, a larger product.
    sent = {"model": ENCODER, "query": "a b c d", "documents": DOCUMENTS}
    async with world.client() as client:
        response = await client.post(path, json=sent)
    answer = response.json()
    assert [result["index"] for result in answer["results"]] == [2, 0, 1]
    assert answer["results"][0] == {
        "index": 2,
        "relevance_score": pytest.approx(0.5 * 1.0 + 0.25 + 0.0625),
        "document": {"text": "a b c d e f g h"},
    }
    assert answer["results"][2]["document"] == {"text": "a"}
    assert answer["model"] == ENCODER and answer["usage"] == {"prompt_tokens": 17, "total_tokens": 17}
    await eventually(lambda: len(world.ledger.records) == 1)
    record = world.ledger.records[0]
    assert (record.route, record.model, record.prompt_tokens) == (path, ENCODER, 17)


async def test_rerank_tells_the_best_and_leaves_the_documents_out(world):
    sent = {"model": ENCODER, "query": "a", "documents": DOCUMENTS, "top_n": 1, "return_documents": False}
    async with world.client() as client:
        response = await client.post("/v1/rerank", json=sent)
    assert response.json()["results"] == [{"index": 2, "relevance_score": pytest.approx(0.125 + 0.3125)}]


async def test_of_a_long_document_its_beginning_counts(world):
    sent = {"model": ENCODER, "query": "a", "documents": ["a " * 100] * 100}
    async with world.client() as client:
        response = await client.post("/v1/rerank", json=sent)
    assert response.status_code == 200 and len(response.json()["results"]) == 100


async def test_every_chunk_tells_the_usage_so_far_when_it_is_asked_to(world):
    options = {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}
    for path, prompt in (("/v1/chat/completions", {"messages": HI}), ("/v1/completions", {"prompt": "hello"})):
        async with world.client() as client:
            response = await client.post(path, json={"model": MODEL, "max_tokens": 2, **prompt, **options})
        chunks = [json.loads(event[6:]) for event in response.text.split("\n\n") if event.startswith("data: {")]
        told = [chunk["usage"]["completion_tokens"] for chunk in chunks]
        assert told == sorted(told) and told[-1] == 2 and {0, 1, 2} >= set(told) >= {1, 2}
        assert {chunk["usage"]["prompt_tokens"] for chunk in chunks} == {1}


async def test_a_refusal_of_an_assistant_is_what_it_said(world):
    messages = [
        *HI,
        {"role": "assistant", "content": None, "refusal": "No."},
        {"role": "user", "content": "and now?"},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "Never."}]},
        *HI,
    ]
    async with world.client() as client:
        response = await client.post("/v1/chat/completions", json={"model": MODEL, "messages": messages})
    assert response.status_code == 200
    turns = [turn.content for turn in world.generator.calls[0].prompt.messages]
    assert turns == ["hello", "No.", "and now?", "Never.", "hello"]


async def test_stop_tokens_reach_the_generator(world):
    async with world.client() as client:
        await client.post("/v1/completions", json={"model": MODEL, "prompt": "x", "stop_token_ids": [2, 7]})
    assert world.generator.calls[0].stopping.stop_token_ids == (2, 7)


TOLERATED = {
    "user": "u",
    "metadata": {"a": "b"},
    "service_tier": "auto",
    "store": True,
    "safety_identifier": "s",
    "prompt_cache_key": "k",
    "prompt_cache_retention": "24h",
    "reasoning_effort": "low",
    "verbosity": "low",
    "modalities": ["text"],
    "prediction": {"type": "content", "content": "x"},
    "functions": [],
    "web_search_options": None,
}


async def test_what_does_not_change_the_answer_is_tolerated(world):
    async with world.client() as client:
        response = await client.post("/v1/chat/completions", json={"model": MODEL, "messages": HI} | TOLERATED)
    assert response.status_code == 200


CHAT, COMPLETIONS = ("/v1/chat/completions", {"messages": HI}), ("/v1/completions", {"prompt": "x"})
REFUSED = [
    (CHAT, {"functions": [{"name": "f"}]}),
    (CHAT, {"audio": {"voice": "x"}}),
    (CHAT, {"web_search_options": {"search_context_size": "low"}}),
    (CHAT, {"chat_template": "{{ messages }}"}),
    (CHAT, {"chat_template_kwargs": {"a": 1}}),
    (CHAT, {"continue_final_message": True}),
    (CHAT, {"documents": [{"text": "x"}]}),
    (CHAT, {"bad_words": ["x"]}),
    (CHAT, {"use_beam_search": True}),
    (COMPLETIONS, {"suffix": "x"}),
    (COMPLETIONS, {"best_of": 2}),
    (COMPLETIONS, {"prompt_embeds": "x"}),
    (COMPLETIONS, {"truncate_prompt_tokens": 3}),
    (COMPLETIONS, {"allowed_token_ids": [1]}),
]


@pytest.mark.parametrize(("route", "changes"), REFUSED, ids=lambda value: str(value)[:60])
async def test_what_would_change_the_answer_and_is_not_there_is_refused(world, route, changes):
    path, plain = route
    async with world.client() as client:
        response = await client.post(path, json={"model": MODEL} | plain | changes)
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (400, "unsupported_parameter")
    assert error["param"] == next(iter(changes))
    assert world.generator.calls == []


GENERATE, RERANK = "/generate", "/v1/rerank"


def rerank(**changes):
    return {"model": ENCODER, "query": "x", "documents": ["x"]} | changes


BODIES = [
    (GENERATE, {}, 400, "missing_required_parameter", "prompt"),
    (GENERATE, {"prompt": 5}, 400, "invalid_type", "prompt"),
    (GENERATE, {"prompt": ["x"]}, 400, "invalid_type", "prompt"),
    (GENERATE, {"prompt": "x", "model": "gpt-9"}, 404, "model_not_found", "model"),
    (GENERATE, {"prompt": "x", "model": "rag"}, 400, "model_not_supported", "model"),
    (GENERATE, {"prompt": "x", "best_of": 2}, 400, "invalid_value", "best_of"),
    (GENERATE, {"prompt": "x", "use_beam_search": True}, 400, "invalid_value", "use_beam_search"),
    (GENERATE, {"prompt": "x", "temprature": 1}, 400, "invalid_value", "temprature"),
    (GENERATE, {"prompt": "x", "max_tokens": -1}, 400, "invalid_value", "max_tokens"),
    (GENERATE, {"prompt": "x", "n": 129}, 400, "invalid_value", "n"),
    (GENERATE, {"prompt": "x", "temperature": 5}, 400, "invalid_value", "temperature"),
    (GENERATE, {"prompt": "x " * 64}, 400, "context_length_exceeded", "prompt"),
    (GENERATE, {"prompt": "x", "n": 17}, 400, "invalid_value", "n"),
    (GENERATE, {"prompt": ""}, 400, "invalid_value", "prompt"),
    (GENERATE, {"prompt": "x", "stream_options": {"include_usage": True}}, 400, "invalid_value", "stream_options"),
    (RERANK, {"query": "x", "documents": ["x"]}, 400, "missing_required_parameter", "model"),
    (RERANK, rerank(query=""), 400, "invalid_value", "query"),
    (RERANK, rerank(query=None), 400, "invalid_type", "query"),
    (RERANK, rerank(documents=[]), 400, "invalid_value", "documents"),
    (RERANK, rerank(documents="x"), 400, "invalid_type", "documents"),
    (RERANK, rerank(documents=[5]), 400, "invalid_type", "documents[0]"),
    (RERANK, rerank(documents=["x", ""]), 400, "invalid_value", "documents[1]"),
    (RERANK, rerank(documents=[{"title": "x"}]), 400, "missing_required_parameter", "documents[0].text"),
    (RERANK, rerank(documents=["x"] * 1001), 400, "invalid_value", "documents"),
    (RERANK, rerank(top_n=0), 400, "invalid_value", "top_n"),
    (RERANK, rerank(return_documents="yes"), 400, "invalid_type", "return_documents"),
    (RERANK, rerank(model=MODEL), 404, "model_not_found", "model"),
    (*CHAT[:1], {"model": MODEL, "messages": HI, "stop_token_ids": [-1]}, 400, "invalid_value", "stop_token_ids[0]"),
    (*CHAT[:1], {"model": MODEL, "messages": [{"role": "user", "refusal": "x"}]}, 400, "invalid_value", "messages[0]"),
]


@pytest.mark.parametrize(("path", "sent", "status", "code", "param"), BODIES)
async def test_bad_body_names_the_field(world, path, sent, status, code, param):
    async with world.client() as client:
        response = await client.post(path, json=sent)
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert (error["code"], error["param"]) == (code, param), error
    await eventually(lambda: len(world.ledger.records) == 1)
    assert world.ledger.records[0].http_status == status and world.generator.num_finished == 0


async def test_an_encoder_that_fails_is_a_status_and_a_record(world, monkeypatch):
    async def gone(*_, **__):
        raise PlatformError(Code.UNAVAILABLE, "the embedder is away", retry_after_s=2)

    monkeypatch.setattr(world.embedder, "embed", gone)
    async with world.client() as client:
        response = await client.post("/v1/rerank", json=rerank())
    assert response.status_code == 503 and response.headers["retry-after"] == "2"
    await eventually(lambda: len(world.ledger.records) == 1)
    assert world.ledger.records[0].finish_reason == "error"


async def test_a_whole_number_may_be_written_with_a_point(world):
    sent = {"model": MODEL, "prompt": [[1.0, 2]], "max_tokens": 2.0, "seed": -1.0, "logprobs": None}
    async with world.client() as client:
        response = await client.post("/v1/completions", json=sent)
        refused = [
            await client.post("/v1/completions", json=sent | changes)
            for changes in ({"max_tokens": 2.5}, {"prompt": [1.0, 2.5]}, {"max_tokens": 1e300}, {"stop": 1.0})
        ]
    assert response.status_code == 200
    (call,) = world.generator.calls
    assert (call.prompt, call.stopping.max_tokens, call.sampling.seed) == ((1, 2), 2, 2**64 - 1)
    assert [(answer.status_code, answer.json()["error"]["param"]) for answer in refused] == [
        (400, "max_tokens"),
        (400, "prompt[1]"),
        (400, "max_tokens"),
        (400, "stop"),
    ]


async def test_405_tells_every_method_of_a_path(world):
    async with world.client() as client:
        response = await client.post("/v1/models")
    assert response.status_code == 405 and response.headers["allow"] == "GET"


async def test_the_document_needs_no_key_and_names_every_route(world):
    async with world.client(key=None) as stranger:
        document = (await stranger.get("/openapi.json")).json()
    chat = document["paths"]["/v1/chat/completions"]["post"]
    assert chat["security"] == [{"bearer": []}]
    assert set(chat["responses"]["200"]["content"]) == {"application/json", "text/event-stream; charset=utf-8"}
    schema = chat["requestBody"]["content"]["application/json"]["schema"]["$ref"].removeprefix("#/components/schemas/")
    assert {"model", "messages"} <= set(document["components"]["schemas"][schema]["required"])
    errors = document["paths"]["/v1/messages"]["post"]["responses"]
    assert errors["429"] == {"$ref": "#/components/responses/AnthropicRateLimited"}
