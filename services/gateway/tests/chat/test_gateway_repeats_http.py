"""Repeats as clients see them over HTTP."""

import asyncio
import json

import openai
import pytest

from testkit import eventually

URL = "/v1/chat/completions"
BODY = {
    "model": "smollm2-135m-instruct",
    "messages": [{"role": "user", "content": "hello there"}],
    "max_tokens": 4,
    "temperature": 0,
}
ON = {"x-pressroom-cache": "on"}


def chunks_of(response):
    return [json.loads(line[6:]) for line in response.text.splitlines() if line.startswith("data: {")]


def deltas_of(response):
    return [choice["delta"] for chunk in chunks_of(response) for choice in chunk["choices"]]


async def test_stream_is_replayed_as_the_same_stream(world, cache):
    body = BODY | {"stream": True, "stream_options": {"include_usage": True}}
    async with world.client() as client:
        fresh = await client.post(URL, json=body, headers=ON)
        repeated = await client.post(URL, json=body, headers=ON)
    assert (fresh.headers["x-pressroom-cache"], repeated.headers["x-pressroom-cache"]) == ("miss", "hit")
    assert len(world.generator.calls) == 1
    assert deltas_of(repeated) == deltas_of(fresh) and len(deltas_of(repeated)) == 6
    assert repeated.text.endswith("data: [DONE]\n\n")
    assert chunks_of(repeated)[0]["id"] != chunks_of(fresh)[0]["id"]
    assert chunks_of(repeated)[-1]["usage"] == {
        "prompt_tokens": 2,
        "completion_tokens": 4,
        "total_tokens": 6,
        "prompt_tokens_details": {"cached_tokens": 2},
    }


@pytest.mark.parametrize("first_streams", [True, False])
async def test_stream_and_answer_in_one_piece_serve_each_other(world, cache, first_streams):
    async with world.client() as client:
        for streams in (first_streams, not first_streams):
            response = await client.post(URL, json=BODY | {"stream": streams}, headers=ON)
            if streams:
                assert "".join(delta.get("content", "") for delta in deltas_of(response)) == "w0 w1 w2 w3"
            else:
                assert response.json()["choices"][0]["message"]["content"] == "w0 w1 w2 w3"
    assert len(world.generator.calls) == 1


async def test_ledger_has_a_row_for_a_hit_and_no_tokens_in_it(world, cache):
    async with world.client() as client:
        for _ in range(2):
            await client.post(URL, json=BODY, headers=ON)
    fresh, hit = world.ledger.records
    assert (fresh.repeat, fresh.prompt_tokens, fresh.completion_tokens) == ("", 2, 4)
    assert (hit.repeat, hit.prompt_tokens, hit.completion_tokens, hit.cached_tokens) == ("hit", 0, 0, 0)
    assert (hit.repeated_prompt_tokens, hit.repeated_completion_tokens) == (2, 4)
    assert (hit.finish_reason, hit.http_status, hit.error_code) == ("length", 200, "")


@pytest.mark.parametrize(
    "change",
    [
        {"messages": [{"role": "user", "content": "hello  there"}]},
        {"max_tokens": 5},
        {"seed": 1},
        {"stop": ["w9"]},
        {"n": 2},
        {"logprobs": True},
        {"top_p": 0.5},
        {"logit_bias": {"1": 1}},
        {"presence_penalty": 0.5},
        {"model": "smollm2-135m-instruct:other"},
    ],
)
async def test_whatever_changes_the_answer_is_another_request(world, cache, change):
    async with world.client() as client:
        await client.post(URL, json=BODY, headers=ON)
        other = await client.post(URL, json=BODY | change, headers=ON)
    assert other.headers.get("x-pressroom-cache") != "hit"


async def test_what_changes_nothing_is_the_same_request(world, cache):
    async with world.client() as client:
        await client.post(URL, json=BODY, headers=ON)
        other = await client.post(
            URL,
            json=dict(reversed(BODY.items())) | {"user": "somebody", "metadata": {"a": "b"}, "top_p": None},
            headers=ON | {"x-request-id": "another"},
        )
    assert other.headers["x-pressroom-cache"] == "hit"


async def test_tenants_have_caches_of_their_own(world, cache, limited_key):
    async with world.client() as mine, world.client(limited_key) as theirs:
        await mine.post(URL, json=BODY, headers=ON)
        assert (await theirs.post(URL, json=BODY, headers=ON)).headers["x-pressroom-cache"] == "miss"
    assert {key.partition(":")[0] for key in cache.entries} == {"acme", "other"}


async def test_new_version_of_the_model_answers_anew(world, cache):
    async with world.client() as client:
        await client.post(URL, json=BODY, headers=ON)
        world.generator.version = "v2"
        again = await client.post(URL, json=BODY, headers=ON)
        assert (again.headers["x-pressroom-cache"], again.json()["system_fingerprint"]) == ("miss", "v2")
        assert (await client.post(URL, json=BODY, headers=ON)).headers["x-pressroom-cache"] == "hit"


@pytest.mark.parametrize(
    ("headers", "said"),
    [
        ({"x-pressroom-cache": "OFF"}, None),
        ({"x-pressroom-cache": "refresh"}, "miss"),
        ({"cache-control": "no-store"}, None),
        ({"cache-control": "max-age=0, No-Cache"}, None),
        ({"x-pressroom-cache": "on", "cache-control": "no-store"}, "hit"),
        ({}, None),
    ],
)
async def test_headers_decide(world, cache, headers, said):
    async with world.client() as client:
        await client.post(URL, json=BODY, headers=ON)
        assert (await client.post(URL, json=BODY, headers=headers)).headers.get("x-pressroom-cache") == said


@pytest.mark.parametrize("word", ["yes", "", "on, off", "hit", "o" * 5000])
async def test_unknown_word_is_refused_by_name(world, word):
    async with world.client() as client:
        response = await client.post(URL, json=BODY, headers={"x-pressroom-cache": word})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "x-pressroom-cache"
    assert not world.generator.calls and world.ledger.records[0].error_code == "invalid_value"


async def test_grounded_answers_are_never_kept(world, cache):
    async with world.client() as client:
        for _ in range(2):
            response = await client.post(URL, json=BODY | {"model": "rag"}, headers=ON)
            assert response.status_code == 200 and "x-pressroom-cache" not in response.headers
    assert not cache.entries


async def test_concurrent_clients_share_a_run_and_one_that_leaves_harms_nobody(world, base_url, key):
    world.generator.token_s = 0.6  # followers have time to come while it speaks, on a busy machine too
    client = openai.AsyncOpenAI(base_url=base_url, api_key=key, max_retries=0)
    leader = await client.chat.completions.create(**BODY, stream=True)
    await anext(leader)
    followers = [asyncio.create_task(client.chat.completions.create(**BODY)) for _ in range(5)]
    await asyncio.sleep(1.0)
    await leader.close()
    answers = await asyncio.gather(*followers)
    assert {answer.choices[0].message.content for answer in answers} == {"w0 w1 w2 w3"}
    assert {answer.usage.prompt_tokens_details.cached_tokens for answer in answers} == {2}
    await eventually(lambda: len(world.ledger.records) == 6)
    assert len(world.generator.calls) == 1 and world.generator.num_finished == 1
    used = [(one.finish_reason, one.prompt_tokens, one.completion_tokens) for one in world.ledger.records]
    assert sorted(used) == [("cancelled", 2, 4)] + [("length", 0, 0)] * 5
