"""The layers around the routes: ids, limits, errors from upstream, records."""

import pytest

from chassis.errors import Code, PlatformError
from testkit import eventually

CHAT = "/v1/chat/completions"
BODY = {"model": "smollm2-135m-instruct", "messages": [{"role": "user", "content": "hello"}]}


async def test_a_sane_request_id_is_kept_and_another_replaced(world):
    async with world.client() as client:
        kept = await client.post(CHAT, json=BODY, headers={"x-request-id": "my-id_1"})
        replaced = await client.post(CHAT, json=BODY, headers={"x-request-id": "a b\tc"})
    assert kept.headers["x-request-id"] == "my-id_1"
    assert replaced.headers["x-request-id"].startswith("req_")
    await eventually(lambda: len(world.ledger.records) == 2)
    assert [record.request_id for record in world.ledger.records] == ["my-id_1", replaced.headers["x-request-id"]]


async def test_an_incoming_trace_is_continued(world):
    trace_id = "0af7651916cd43dd8448eb211c80319c"
    async with world.client() as client:
        response = await client.post(CHAT, json=BODY, headers={"traceparent": f"00-{trace_id}-b7ad6b7169203331-01"})
    assert response.headers["x-trace-id"] == trace_id
    await eventually(lambda: len(world.ledger.records) == 1)
    assert world.ledger.records[0].trace_id == trace_id


async def test_a_limited_key_is_told_its_limit_and_then_refused(world, limited_key):
    async with world.client(limited_key) as client:
        answers = [await client.post(CHAT, json=BODY) for _ in range(3)]
    assert [answer.status_code for answer in answers] == [200, 200, 429]
    assert [answer.headers["x-ratelimit-remaining-requests"] for answer in answers] == ["1", "0", "0"]
    assert {answer.headers["x-ratelimit-limit-requests"] for answer in answers} == {"2"}
    assert answers[0].headers["x-ratelimit-reset-requests"] == "1m2s"
    assert answers[2].headers["retry-after"] == "62"
    assert answers[2].json()["error"]["code"] == "rate_limit_exceeded"
    await eventually(lambda: len(world.ledger.records) == 3)
    assert [record.http_status for record in world.ledger.records] == [200, 200, 429]
    assert world.ledger.records[0].prompt_text == ""  # this tenant does not allow text


async def test_a_key_without_a_limit_says_so_in_its_headers(world):
    async with world.client() as client:
        response = await client.get("/v1/models")
    for what in ("requests", "tokens"):
        assert response.headers[f"x-ratelimit-limit-{what}"] == str(2**53 - 1)
        assert response.headers[f"x-ratelimit-remaining-{what}"] == str(2**53 - 1)
        assert response.headers[f"x-ratelimit-reset-{what}"] == "0ms"


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (PlatformError(Code.UNAVAILABLE, "generator is not available", retry_after_s=3), 503),
        (PlatformError(Code.OVERLOADED, "the queue is full", retry_after_s=3), 503),
        (PlatformError(Code.DEADLINE_EXCEEDED, "generator did not answer in time"), 504),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_upstream_failures_before_the_first_event_are_real_statuses(world, error, status, stream):
    world.generator.error = error
    async with world.client() as client:
        response = await client.post(CHAT, json=BODY | {"stream": stream})
    assert response.status_code == status
    assert response.headers["content-type"] == "application/json"
    if status == 503:
        assert response.headers["retry-after"] == "3"
    await eventually(lambda: len(world.ledger.records) == 1)
    assert world.ledger.records[0].http_status == status


@pytest.mark.parametrize("error", [PlatformError(Code.UNAVAILABLE, "gone"), RuntimeError("secret")])
async def test_a_failure_in_a_stream_is_its_last_event(world, error):
    world.generator.error, world.generator.fail_after = error, 2
    async with world.client() as client:
        response = await client.post(CHAT, json=BODY | {"stream": True})
    assert response.status_code == 200
    events = response.text.strip().split("\n\n")
    assert events[-1].startswith('data: {"error":') and "secret" not in response.text
    assert "[DONE]" not in response.text and '"w0"' in response.text
    await eventually(lambda: len(world.ledger.records) == 1)
    record = world.ledger.records[0]
    assert (record.finish_reason, record.prompt_tokens, record.completion_tokens) == ("error", 1, 2)
    assert record.error_code in ("unavailable", "internal_error")


async def test_models_are_listed_while_the_generator_is_away(world):
    world.generator.error = PlatformError(Code.UNAVAILABLE, "generator is not available")
    async with world.client() as client:
        response = await client.get("/v1/models")
    assert [model["id"] for model in response.json()["data"]] == ["all-minilm-l6-v2", "rag", "smollm2-135m-instruct"]


async def test_a_ledger_that_fails_does_not_fail_the_answer(world, caplog):
    world.ledger.error = RuntimeError("disk full")
    async with world.client() as client:
        response = await client.post(CHAT, json=BODY)
    assert response.status_code == 200
    assert "usage was not recorded" in caplog.text
