"""Idempotency-Key as clients see it: on everything that creates something, and on answers of models."""

import asyncio
import sqlite3
import uuid
from contextlib import closing

import httpx
import pytest

from gateway.backends import sqlite_idempotency
from gateway.backends.sqlite_idempotency import SqliteIdempotency
from gateway.core import idempotency
from testkit import eventually

BASE = "smollm2-135m-instruct"
LINE = b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'
CHAT = {"model": BASE, "messages": [{"role": "user", "content": "hi"}]}


def key():
    return {"idempotency-key": uuid.uuid4().hex}


async def creators(world):
    """Every route that creates something: what to send, and how to count what is there."""
    file_id = await world.upload()
    return {
        "documents as JSON": ("/documents", {"json": {"text": "some text", "title": "t"}}, "documents"),
        "documents as a form": ("/documents", {"files": {"file": ("a.txt", b"some text")}}, "documents"),
        "files": ("/files", {"files": {"file": ("a.jsonl", LINE)}, "data": {"purpose": "fine-tune"}}, "uploads"),
        "fine_tuning": ("/fine_tuning/jobs", {"json": {"model": BASE, "training_file": file_id}}, "finetunes"),
        "evaluations": ("/evaluations", {"json": {"model": BASE, "task": "facts"}}, "jobs"),
        "batches": (
            "/batches",
            {
                "json": {
                    "input_file_id": await world.upload(purpose="batch"),
                    "endpoint": "/v1/chat/completions",
                    "completion_window": "24h",
                }
            },
            "batches",
        ),
        "keys": ("http://gateway/admin/keys", {"json": {"tenant": "acme"}}, "keys"),
    }


async def count(world, table):
    return await world.database.read(
        lambda connection: connection.execute(f"SELECT count(*) FROM {table}").fetchone()[0]
    )


WHAT = ["documents as JSON", "documents as a form", "files", "fine_tuning", "evaluations", "batches", "keys"]


@pytest.mark.parametrize("what", WHAT)
async def test_second_request_creates_nothing_and_gets_the_first_ones_answer(world, what):
    path, body, table = (await creators(world))[what]
    client, headers = world.http("admin" if what == "keys" else "acme"), key()
    before = await count(world, table)
    first = await client.post(path, headers=headers, **body)
    again = [await client.post(path, headers=headers, **body) for _ in range(3)]
    assert first.status_code in (200, 202), first.text
    assert "idempotent-replayed" not in first.headers
    for one in again:
        assert (one.status_code, one.content) == (first.status_code, first.content)
        assert one.headers["idempotent-replayed"] == "true"
        assert one.headers["content-type"] == first.headers["content-type"]
        assert one.headers["x-request-id"] != first.headers["x-request-id"]
    assert await count(world, table) == before + 1


@pytest.mark.parametrize("what", WHAT)
async def test_of_many_at_once_one_creates_and_the_others_wait_or_get_its_answer(world, what):
    path, body, table = (await creators(world))[what]
    client, headers = world.http("admin" if what == "keys" else "acme"), key()
    before = await count(world, table)
    responses = await asyncio.gather(*(client.post(path, headers=headers, **body) for _ in range(12)))
    assert await count(world, table) == before + 1
    made = [one for one in responses if one.is_success]
    assert len({one.content for one in made}) == 1
    assert sum("idempotent-replayed" not in one.headers for one in made) == 1
    for one in responses:
        if not one.is_success:
            assert one.status_code == 409 and int(one.headers["retry-after"]) >= 1
            assert one.json()["error"]["code"] == "idempotency_in_progress"


@pytest.mark.parametrize("what", WHAT)
async def test_process_that_dies_before_it_answers_creates_once(world, what):
    """The first try writes, and ends before its answer is kept; the next process carries the second one out."""
    path, body, table = (await creators(world))[what]
    headers, tenant = key(), "admin" if what == "keys" else "acme"
    before = await count(world, table)
    original = SqliteIdempotency.keep
    SqliteIdempotency.keep = _dies
    try:
        first = await world.http(tenant).post(path, headers=headers, **body)
        assert (await world.http(tenant).post(path, headers=headers, **body)).status_code == 409
    finally:
        SqliteIdempotency.keep = original
    assert first.is_success and await count(world, table) == before + 1

    await SqliteIdempotency(world.database).open()  # as the next process does
    second = await world.http(tenant).post(path, headers=headers, **body)
    assert await count(world, table) == before + 1
    if what == "keys":
        assert second.status_code == 409 and first.json()["id"] in second.json()["error"]["message"]
        return
    assert second.status_code == first.status_code, second.text
    assert second.json() == first.json()
    third = await world.http(tenant).post(path, headers=headers, **body)
    assert third.content == second.content and third.headers["idempotent-replayed"] == "true"


async def _dies(self, claim, fingerprint, answer):
    pass


@pytest.mark.parametrize("what", WHAT)
async def test_other_request_under_a_used_key_is_refused(world, what):
    path, body, table = (await creators(world))[what]
    client, headers = world.http("admin" if what == "keys" else "acme"), key()
    first = await client.post(path, headers=headers, **body)
    before = await count(world, table)
    if "json" in body:
        other = {"json": body["json"] | {"metadata": {"a": "b"}}}
    else:
        name, content = body["files"]["file"]
        other = body | {"files": {"file": (name, content + b" ")}}
    refused = await client.post(path, headers=headers, **other)
    assert refused.status_code == 422
    assert refused.json()["error"]["code"] == "idempotency_key_reused"
    assert await count(world, table) == before
    assert (await client.post(path, headers=headers, **body)).content == first.content


async def test_same_form_with_another_boundary_is_the_same_request(world):
    client, headers = world.http(), key()
    answers = []
    for boundary in ("one", "another-boundary"):
        form = (
            f'--{boundary}\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n'
            f'--{boundary}\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\nabc\r\n'
            f"--{boundary}--\r\n"
        )
        content_type = {"content-type": f"multipart/form-data; boundary={boundary}"}
        answers.append(await client.post("/files", headers=headers | content_type, content=form.encode()))
    assert answers[0].content == answers[1].content and "idempotent-replayed" in answers[1].headers


@pytest.mark.parametrize("content_type", ["multipart/form-data", "multipart/form-data; boundary=" + "x" * 300])
async def test_form_without_a_boundary_is_refused_before_it_is_read(world, content_type):
    response = await world.http().post("/files", headers=key() | {"content-type": content_type}, content=b"x")
    assert response.status_code == 400


@pytest.mark.parametrize("stream", [False, True])
async def test_answer_of_a_model_is_replayed_and_costs_nothing(world, stream):
    client, headers = world.http(), key()
    body = CHAT | {"stream": stream}
    first = await client.post("/chat/completions", json=body, headers=headers)
    again = await client.post("/chat/completions", json=body, headers=headers)
    assert again.content == first.content and again.headers["content-type"] == first.headers["content-type"]
    assert again.headers["idempotent-replayed"] == "true"
    assert len(world.generator.calls) == 1
    assert [row[4:] for row in await world.usage()] == [(3, 3, "stop", 200, ""), (0, 0, "stop", 200, "")]


async def test_keys_belong_to_their_access_key(world):
    headers = key()
    ours = await world.http("acme").post("/chat/completions", json=CHAT, headers=headers)
    theirs = await world.http("other").post("/chat/completions", json=CHAT, headers=headers)
    assert "idempotent-replayed" not in theirs.headers and ours.json()["id"] != theirs.json()["id"]


async def test_failed_request_may_be_sent_again(world):
    client, headers = world.http(), key()
    world.generator.error = RuntimeError("broken")
    assert (await client.post("/chat/completions", json=CHAT, headers=headers)).status_code == 500
    world.generator.error = None
    again = await client.post("/chat/completions", json=CHAT, headers=headers)
    assert again.status_code == 200 and "idempotent-replayed" not in again.headers


async def test_refused_request_gives_its_key_back(world):
    client, headers = world.http(), key()
    refused = await client.post("/fine_tuning/jobs", json={"model": BASE, "training_file": "file-x"}, headers=headers)
    assert refused.status_code == 404
    body = {"model": BASE, "training_file": await world.upload()}
    assert (await client.post("/fine_tuning/jobs", json=body, headers=headers)).status_code == 200


async def test_client_that_leaves_may_come_back(world):
    world.generator.token_s = 0.2
    client, headers = world.http(), key()
    asking = asyncio.create_task(client.post("/chat/completions", json=CHAT, headers=headers))
    await eventually(lambda: world.generator.calls)
    asking.cancel()
    await asyncio.wait({asking})
    world.generator.token_s = 0

    async def is_answered():
        return (await client.post("/chat/completions", json=CHAT, headers=headers)).status_code == 200

    await eventually(is_answered)
    assert len(world.generator.calls) == 2


@pytest.mark.parametrize("bad", ["", "k" * 256, "k\x7f", "k\t", "café".encode().decode("latin-1")])
async def test_what_is_no_key_is_refused_by_name(world, bad):
    headers = httpx.Headers([(b"idempotency-key", bad.encode("latin-1"))])
    response = await world.http().post("/chat/completions", json=CHAT, headers=headers)
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "invalid_idempotency_key"
    assert not world.generator.calls


async def test_two_keys_are_refused(world):
    headers = httpx.Headers([("idempotency-key", "a"), ("idempotency-key", "a")])
    assert (await world.http().post("/chat/completions", json=CHAT, headers=headers)).status_code == 400


@pytest.mark.parametrize("good", ["k", "k" * 255, 'a key, with: "signs" / ~'])
async def test_printable_text_is_a_key(world, good):
    for _ in range(2):
        response = await world.http().post("/chat/completions", json=CHAT, headers={"idempotency-key": good})
    assert response.headers["idempotent-replayed"] == "true"


async def test_reading_requests_ignore_the_header(world):
    headers = key()
    for _ in range(2):
        response = await world.http().get("/files", headers=headers)
        assert response.status_code == 200 and "idempotent-replayed" not in response.headers


async def test_no_secret_and_no_text_lies_in_the_database(world, tmp_path):
    headers = key()
    made = await world.http("admin").post("http://gateway/admin/keys", json={}, headers=headers)
    again = await world.http("admin").post("http://gateway/admin/keys", json={}, headers=headers)
    assert again.json() == made.json()  # the answer is there
    secret = made.json()["key"].rpartition("-")[2].encode()
    await world.database.write(lambda connection: None)
    with closing(sqlite3.connect(tmp_path / "gateway.db")) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    for file in tmp_path.glob("gateway.db*"):
        content = file.read_bytes()
        assert secret not in content and headers["idempotency-key"].encode() not in content


async def test_answer_that_is_too_large_is_not_done_twice(world, monkeypatch):
    monkeypatch.setattr(sqlite_idempotency, "MAX_ANSWER_BYTES", 10)
    client, headers = world.http(), key()
    assert (await client.post("/chat/completions", json=CHAT, headers=headers)).status_code == 200
    again = await client.post("/chat/completions", json=CHAT, headers=headers)
    assert again.status_code == 409 and again.json()["error"]["code"] == "idempotency_answer_not_kept"
    assert len(world.generator.calls) == 1


async def test_keys_are_forgotten_after_a_day_and_pruned(world):
    clock = [1_000_000.0]
    store = SqliteIdempotency(world.database, max_keys=2, now=lambda: clock[0])
    slots = [idempotency.Slot(uuid.uuid4().bytes, "acme", b"s" * 32) for _ in range(3)]
    claim = await store.claim(slots[0], b"f")
    await store.keep(claim, b"f", idempotency.Answer(200, "text/plain", b"x"))
    await store.claim(slots[1], b"f")
    with pytest.raises(idempotency.PlatformError) as caught:
        await store.claim(slots[2], b"f")
    assert caught.value.reason == "too_many_idempotency_keys"
    clock[0] += 24 * 3600 + 1
    assert await store.prune() == 1  # what is being worked on stays
    await store.claim(slots[2], b"f")
    again = await store.claim(slots[0], b"g") if await count(world, "idempotency") < 2 else None
    assert again is None
