"""Limits as clients meet them: what passes, what a refusal says, what is told of the limits, and what comes back."""

import asyncio
import re

import pytest

from chassis.errors import Code, PlatformError
from gateway.core.policy import Algorithm, Counted, Limit, Policy
from gateway.core.ports import Principal
from testkit import eventually

CHAT = "/v1/chat/completions"
MODEL = "smollm2-135m-instruct"
BODY = {"model": MODEL, "messages": [{"role": "user", "content": "one two three"}], "max_tokens": 5}  # 3 + 5 tokens
NO_LIMIT = str(2**53 - 1)


@pytest.fixture
def limit(world):
    """Gives the key (or its tenant) limits; returns a client of that key."""

    def limited(*limits, of_tenant=(), requests_per_minute=None, key="sk-limited"):
        principal = Principal(
            key,
            "acme",
            requests_per_minute=requests_per_minute,
            policy=Policy(limits=limits),
            tenant_policy=Policy(limits=tuple(of_tenant)),
        )
        world.keys.principals = {**world.keys.principals, key: principal}
        return world.client(key)

    return limited


def tokens(amount, **more):
    return Limit(Counted.TOKENS, amount, **more)


async def test_a_key_without_limits_asks_no_limiter_and_says_so(world, limit, monkeypatch):
    async def asked(*_):
        raise AssertionError("asked")

    monkeypatch.setattr(type(world.limiter), "reserve", asked)
    async with limit() as client:
        answer = await client.post(CHAT, json=BODY)
    assert answer.status_code == 200
    assert answer.headers["x-ratelimit-remaining-tokens"] == NO_LIMIT
    assert "ratelimit" not in answer.headers


async def test_exactly_what_was_used_is_gone_from_the_limit(world, limit):
    async with limit(tokens(1000)) as client:
        first = await client.post(CHAT, json=BODY)
        second = await client.post(CHAT, json=BODY)
    assert first.json()["usage"]["total_tokens"] == 8
    assert first.headers["x-ratelimit-limit-tokens"] == "1000"
    assert first.headers["x-ratelimit-remaining-requests"] == NO_LIMIT
    told = [int(answer.headers["x-ratelimit-remaining-tokens"]) for answer in (first, second)]
    assert told[0] - told[1] == 8  # each holds the same bound while it runs
    assert re.fullmatch(r"\d+s|1m0s", second.headers["x-ratelimit-reset-tokens"])


async def test_streams_at_once_never_use_more_than_the_limit_and_end_at_what_they_used(world, limit):
    world.generator.token_s = 0.005
    async with limit(tokens(206)) as client:
        answers = await asyncio.gather(*(client.post(CHAT, json=BODY | {"stream": True}) for _ in range(50)))
    statuses = [answer.status_code for answer in answers]
    assert set(statuses) == {200, 429}
    await eventually(lambda: len(world.ledger.records) == 50)
    used = sum(one.prompt_tokens + one.completion_tokens for one in world.ledger.records)
    assert used == 8 * statuses.count(200) <= 206
    async with limit(tokens(206)) as client:  # what is left is just what was not used
        left = 206 - used
        assert (await client.post(CHAT, json=BODY | {"max_tokens": left - 3 + 1})).status_code == 429
        assert (await client.post(CHAT, json=BODY | {"max_tokens": left - 3})).status_code == 200


async def test_a_client_that_leaves_gives_back_what_it_did_not_use(world, limit, base_url):
    import httpx

    world.generator.token_s = 0.05
    limit(tokens(100))
    body = BODY | {"stream": True, "max_tokens": 50}
    headers = {"authorization": "Bearer sk-limited"}
    async with (
        httpx.AsyncClient(headers=headers, trust_env=False) as client,
        client.stream("POST", f"{base_url}/chat/completions", json=body) as answer,
    ):
        await anext(answer.aiter_lines())
    await eventually(lambda: len(world.ledger.records) == 1)
    record = world.ledger.records[0]
    used = record.prompt_tokens + record.completion_tokens
    assert record.finish_reason == "cancelled" and 0 < used < 53
    world.generator.token_s = 0
    async with limit(tokens(100)) as client:
        left = min(100 - used, 64)  # the model's context
        assert (await client.post(CHAT, json=BODY | {"max_tokens": left - 3})).status_code == 200


async def test_a_request_that_fails_upstream_costs_no_tokens(world, limit):
    world.generator.error = PlatformError(Code.UNAVAILABLE, "away")
    async with limit(tokens(9)) as client:
        assert [(await client.post(CHAT, json=BODY)).status_code for _ in range(3)] == [503] * 3
        world.generator.error = None
        assert (await client.post(CHAT, json=BODY)).status_code == 200


async def test_refusal_names_the_limit_what_it_has_and_what_is_needed(world, limit):
    async with limit(tokens(10)) as client:
        assert (await client.post(CHAT, json=BODY)).status_code == 200
        refused = await client.post(CHAT, json=BODY)
    assert refused.status_code == 429
    error = refused.json()["error"]
    assert error["code"] == "rate_limit_exceeded" and error["type"] == "rate_limit_error"
    assert error["param"] == "max_tokens"
    assert error["message"].startswith(
        "this key may use 10 tokens per 60 s (fixed window); 2 are left, and this request may need 8; try again in "
    )
    assert 1 <= int(refused.headers["retry-after"]) <= 60
    assert refused.headers["x-ratelimit-remaining-tokens"] == "2"
    assert refused.headers["ratelimit-policy"] == '"key-tokens-60s";q=10;w=60'
    assert refused.headers["ratelimit"].startswith('"key-tokens-60s";r=2;t=')


async def test_what_can_never_pass_is_told_so_and_costs_nothing(world, limit):
    async with limit(tokens(7), Limit(Counted.REQUESTS, 1)) as client:
        refused = await client.post(CHAT, json=BODY)
        fitting = await client.post(CHAT, json=BODY | {"max_tokens": 4})
    assert refused.status_code == 400 and "retry-after" not in refused.headers
    error = refused.json()["error"]
    assert (error["code"], error["param"]) == ("request_too_large_for_limit", "max_tokens")
    assert "this request needs 8: it can never pass" in error["message"]
    assert fitting.status_code == 200  # the limit on requests was not touched


async def test_without_max_tokens_the_answer_ends_where_the_limit_does(world, limit):
    body = {key: value for key, value in BODY.items() if key != "max_tokens"}
    world.generator.script = "abc" * 100  # as long as it is let
    async with limit(tokens(30)) as client:
        answer = await client.post(CHAT, json=body)
        after = await client.post(CHAT, json=body)
    assert answer.json()["usage"]["total_tokens"] == 30
    assert answer.json()["choices"][0]["finish_reason"] == "length"
    assert after.status_code == 429
    assert "0 are left, and this request may need 19" in after.json()["error"]["message"]


async def test_without_max_tokens_and_with_room_for_the_whole_context_nothing_is_cut(world, limit):
    body = {key: value for key, value in BODY.items() if key != "max_tokens"}
    async with limit(tokens(64)) as client:  # the fake's context
        answer = await client.post(CHAT, json=body)
    assert answer.status_code == 200
    assert world.generator.calls[0].stopping.max_tokens is None


async def test_every_choice_and_every_prompt_counts(world, limit):
    async with limit(tokens(1000)) as client:
        chat = await client.post(CHAT, json=BODY | {"n": 3})
        texts = await client.post("/v1/completions", json={"model": MODEL, "prompt": [[1, 2], [3]], "max_tokens": 4})
    assert chat.json()["usage"]["total_tokens"] == 3 + 3 * 5
    assert texts.json()["usage"]["total_tokens"] == 3 + 2 * 4
    assert int(texts.headers["x-ratelimit-remaining-tokens"]) == 1000 - 18 - 11  # token ids are counted exactly


async def test_token_ids_are_sized_without_asking_the_tokenizer(world, limit):
    body = {"model": MODEL, "prompt": [1, 2, 3], "max_tokens": 4}
    async with limit(tokens(7)) as client:
        assert (await client.post("/v1/completions", json=body)).status_code == 200
        assert (await client.post("/v1/completions", json=body)).status_code == 429


async def test_embeddings_count_and_a_bound_in_bytes_refuses_nothing_that_fits(world, limit):
    body = {"model": "all-minilm-l6-v2", "input": "internationalization of everything"}  # 3 tokens, 34 bytes
    async with limit(tokens(6)) as client:
        statuses = [(await client.post("/v1/embeddings", json=body)).status_code for _ in range(3)]
    assert statuses == [200, 200, 429]


async def test_what_a_grounded_answer_may_use_is_the_whole_context(world, limit):
    async with limit(tokens(63)) as client:
        refused = await client.post(CHAT, json=BODY | {"model": "rag"})
    async with limit(tokens(64), key="sk-wide") as client:
        answers = [await client.post(CHAT, json=BODY | {"model": "rag"}) for _ in range(3)]
    assert refused.json()["error"]["code"] == "request_too_large_for_limit"
    assert [one.status_code for one in answers] == [200] * 3  # nothing was found, so nothing was used


async def test_a_tokenizer_that_is_away_does_not_stop_requests_that_surely_fit(world, limit, monkeypatch):
    async def away(*_, **__):
        raise PlatformError(Code.UNAVAILABLE, "away")

    monkeypatch.setattr(world.generator, "tokenize", away)
    async with limit(tokens(1000)) as client:
        assert (await client.post(CHAT, json=BODY)).status_code == 200


async def test_a_wide_limit_asks_no_tokenizer_and_ends_at_what_was_used_all_the_same(world, limit, monkeypatch):
    asked = []
    tokenize = world.generator.tokenize

    async def counted(model, prompt, *, timeout_s):
        asked.append(prompt)
        return await tokenize(model, prompt, timeout_s=timeout_s)

    monkeypatch.setattr(world.generator, "tokenize", counted)
    async with limit(tokens(100_000)) as client:
        answers = [await client.post(CHAT, json=BODY) for _ in range(3)]
    assert len(asked) == 1  # for the length of the model's context, and kept
    told = [int(answer.headers["x-ratelimit-remaining-tokens"]) for answer in answers]
    assert told[0] - told[1] == told[1] - told[2] == 8


async def test_running_requests_are_counted_and_their_places_come_back(world, limit):
    world.generator.token_s = 0.02
    async with limit(Limit(Counted.CONCURRENCY, 2)) as client:
        answers = await asyncio.gather(*(client.post(CHAT, json=BODY) for _ in range(5)))
        assert sorted(answer.status_code for answer in answers) == [200, 200, 429, 429, 429]
        refused = next(answer for answer in answers if answer.status_code == 429)
        assert refused.json()["error"]["message"].startswith(
            "this key may have 2 requests running at a time, and they are"
        )
        assert (await client.post(CHAT, json=BODY)).status_code == 200
    assert world.generator.num_finished == 3


async def test_limits_of_a_tenant_hold_over_its_keys_and_not_for_others(world, limit):
    of_tenant = [Limit(Counted.REQUESTS, 2)]
    async with limit(of_tenant=of_tenant, key="sk-a") as a, limit(of_tenant=of_tenant, key="sk-b") as b:
        statuses = [(await client.post(CHAT, json=BODY)).status_code for client in (a, b, a, b)]
        refused = await a.post(CHAT, json=BODY)
    assert statuses == [200, 200, 429, 429]
    assert refused.json()["error"]["message"].startswith(
        "this key's tenant may send 2 requests per 60 s (fixed window)"
    )
    async with world.client() as other:
        assert (await other.post(CHAT, json=BODY)).status_code == 200


async def test_a_request_that_one_limit_refuses_takes_nothing_of_the_others(world, limit):
    async with limit(Limit(Counted.REQUESTS, 2), of_tenant=[tokens(10)], key="sk-a") as client:
        statuses = [(await client.post(CHAT, json=BODY)).status_code for _ in range(3)]
        last = await client.post(CHAT, json=BODY | {"max_tokens": 1, "messages": [{"role": "user", "content": "x"}]})
    assert statuses == [200, 429, 429]
    assert last.status_code == 200
    assert last.headers["x-ratelimit-remaining-requests"] == "0"


async def test_limits_on_a_model_hold_for_that_model(world, limit):
    async with limit(Limit(Counted.REQUESTS, 1, model="rag")) as client:
        statuses = [
            (await client.post(CHAT, json=BODY | {"model": m})).status_code for m in (MODEL, MODEL, "rag", "rag")
        ]
    assert statuses == [200, 200, 200, 429]


async def test_limits_of_the_platform_hold_for_everybody(world, limit):
    await world.platform_limits.replace("admin", [Limit(Counted.REQUESTS, 1, model=MODEL), Limit(Counted.REQUESTS, 2)])
    async with limit() as one, world.client() as other:
        first = await one.post(CHAT, json=BODY)
        of_model = await other.post(CHAT, json=BODY)
        second = await other.post(CHAT, json=BODY | {"model": "rag"})
        of_all = await one.post(CHAT, json=BODY | {"model": "rag"})
    assert [one.status_code for one in (first, of_model, second, of_all)] == [200, 429, 200, 429]
    assert f"all tenants together may send 1 requests per 60 s (fixed window) with the model '{MODEL}'" in of_model.text
    assert "all tenants together may send 2 requests per 60 s (fixed window);" in of_all.text
    assert first.headers["ratelimit-policy"] == '"model-requests-60s";q=1;w=60, "global-requests-60s";q=2;w=60'


async def test_the_tightest_of_the_limits_is_in_the_headers(world, limit):
    wide, narrow = Limit(Counted.REQUESTS, 50), Limit(Counted.REQUESTS, 3, algorithm=Algorithm.SLIDING_LOG)
    async with limit(wide, narrow) as client:
        answer = await client.post(CHAT, json=BODY)
    assert answer.headers["x-ratelimit-limit-requests"] == "3"
    assert answer.headers["x-ratelimit-remaining-requests"] == "2"


async def test_leaky_bucket_makes_the_second_wait(world, limit):
    async with limit(Limit(Counted.REQUESTS, 10, window_s=1.0, algorithm=Algorithm.LEAKY_BUCKET)) as client:
        started = asyncio.get_running_loop().time()
        answers = await asyncio.gather(*(client.post(CHAT, json=BODY) for _ in range(4)))
        took_s = asyncio.get_running_loop().time() - started
    assert [answer.status_code for answer in answers] == [200] * 4
    assert took_s >= 0.29
