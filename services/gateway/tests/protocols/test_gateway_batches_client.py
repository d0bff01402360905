"""Batches as the official client sees them: shapes, statuses, results, cancelling, resuming."""

import asyncio
import contextlib
import json
import sqlite3

import httpx
import openai
import pytest

from chassis.errors import Code, PlatformError
from testkit.fake_bus import FakeBus
from testkit.waiting import eventually

from .conftest import BASE, CHAT, ENCODER, KEY, MAX_IN_FLIGHT, FakeGenerator, chat_line, ended, order, results, running


async def test_every_line_is_answered_as_over_http(gateway):
    client = gateway.client()
    file = await client.files.create(
        file=(
            "a.jsonl",
            b"\xef\xbb\xbf"
            + json.dumps(chat_line("one", "uno")).encode()
            + b"\r\n\n"
            + json.dumps(chat_line("two", "due")).encode(),
        ),
        purpose="batch",
    )
    made = await client.batches.create(
        input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h", metadata={"for": "test"}
    )
    assert (made.status, made.object, made.input_file_id, made.metadata) == (
        "validating",
        "batch",
        file.id,
        {"for": "test"},
    )
    assert made.expires_at == made.created_at + 86_400

    batch = await ended(client, made.id)
    assert (batch.status, batch.error_file_id, batch.errors) == ("completed", None, None)
    assert batch.request_counts.model_dump() == {"total": 2, "completed": 2, "failed": 0}
    assert batch.created_at <= batch.in_progress_at <= batch.finalizing_at <= batch.completed_at

    output = await results(client, batch.output_file_id)
    assert [line["custom_id"] for line in output] == ["one", "two"]
    over_http = await client.chat.completions.create(model=BASE, messages=[{"role": "user", "content": "uno"}])
    for line, text in zip(output, ("so: uno", "so: due"), strict=True):
        assert (line["error"], line["response"]["status_code"]) == (None, 200)
        body = line["response"]["body"]
        assert body["choices"][0]["message"]["content"] == text
        assert body["usage"] == over_http.usage.model_dump(exclude_none=True)
        assert set(body) == set(over_http.model_dump(exclude_unset=True))
        assert line["response"]["request_id"].startswith("req_") and line["id"].startswith("batch_req_")
    kept = await client.files.retrieve(batch.output_file_id)
    assert (kept.purpose, kept.filename) == ("batch_output", f"{batch.id}_output.jsonl")
    assert (await client.files.delete(file.id)).deleted


async def test_lines_are_accounted_under_the_key_and_stand_behind_people(gateway):
    client = gateway.client()
    batch = await ended(client, await order(client, [chat_line(str(i), f"t{i}") for i in range(7)]))
    assert batch.status == "completed"
    (row,) = await gateway.usage()
    assert row[:3] == ("default", "boot", BASE)
    assert row[3:7] == (7, 0, 21, 14)
    assert all(call.priority == -10 for call in gateway.generator.calls)
    assert gateway.generator.most_running <= MAX_IN_FLIGHT


async def test_other_endpoints(gateway):
    client = gateway.client()
    embed = {
        "custom_id": "e",
        "method": "POST",
        "url": "/v1/embeddings",
        "body": {"model": ENCODER, "input": ["a", "b"]},
    }
    batch = await ended(client, await order(client, [embed], "/v1/embeddings"))
    (line,) = await results(client, batch.output_file_id)
    assert [one["embedding"] for one in line["response"]["body"]["data"]] == [[0.5, 0.25]] * 2

    complete = {"custom_id": "c", "method": "POST", "url": "/v1/completions", "body": {"model": BASE, "prompt": "x"}}
    batch = await ended(client, await order(client, [complete], "/v1/completions"))
    (line,) = await results(client, batch.output_file_id)
    assert line["response"]["body"]["choices"][0]["text"] == "so: x"


BAD_LINES = {
    "no JSON": (b"{", "invalid_json_line"),
    "bad UTF-8": (b'{"custom_id": "\xff"}', "invalid_json_line"),
    "NaN": (b'{"custom_id": NaN}', "invalid_json_line"),
    "key twice": (b'{"custom_id": "a", "custom_id": "b"}', "invalid_json_line"),
    "nested deep": (b"[" * 2000 + b"]" * 2000, "invalid_json_line"),
    "no object": (b"[]", "invalid_json_line"),
    "number too long": (b'{"custom_id": "x", "n": ' + b"9" * 4100 + b"}", "line_too_long"),
    "too long": (b'{"custom_id": "' + b"x" * 5000 + b'"}', "line_too_long"),
    "no custom_id": ({"method": "POST", "url": "/v1/chat/completions", "body": {}}, "missing_required_parameter"),
    "no body": ({"custom_id": "x", "method": "POST", "url": "/v1/chat/completions"}, "missing_required_parameter"),
    "custom_id of a wrong type": (chat_line("x", "t", custom_id=7), "invalid_custom_id"),
    "empty custom_id": (chat_line("", "t"), "invalid_custom_id"),
    "long custom_id": (chat_line("x" * 513, "t"), "invalid_custom_id"),
    "lone surrogate": (
        b'{"custom_id": "\\ud800", "method": "POST", "url": "/v1/chat/completions", "body": {}}',
        "invalid_custom_id",
    ),
    "GET": (chat_line("x", "t", method="GET"), "invalid_method"),
    "another endpoint": (chat_line("x", "t", url="/v1/embeddings"), "mismatched_endpoint"),
    "admin route": (chat_line("x", "t", url="/admin/keys"), "mismatched_endpoint"),
    "whole url": (chat_line("x", "t", url="http://evil/v1/chat/completions"), "mismatched_endpoint"),
    "body is a list": (chat_line("x", "t", body=[]), "invalid_type"),
    "stream": (chat_line("x", "t", body={"stream": True}), "invalid_value"),
    "name taken": (chat_line("good", "t"), "duplicate_custom_id"),
}


async def test_a_bad_line_fails_alone(gateway):
    client = gateway.client()
    lines = [chat_line("good", "g"), *(line for line, _ in BAD_LINES.values()), chat_line("last", "l")]
    batch = await ended(client, await order(client, lines))
    assert batch.status == "completed"
    counts = {"total": len(BAD_LINES) + 2, "completed": 2, "failed": len(BAD_LINES)}
    assert batch.request_counts.model_dump() == counts
    assert [one["custom_id"] for one in await results(client, batch.output_file_id)] == ["good", "last"]
    bad = await results(client, batch.error_file_id)
    assert {one["response"] for one in bad} == {None}
    told = {name: one["error"]["code"] for name, one in zip(BAD_LINES, bad, strict=True)}
    assert told == {name: code for name, (_, code) in BAD_LINES.items()}
    assert [one["error"]["line"] for one in bad] == list(range(2, len(BAD_LINES) + 2))
    assert sorted(gateway.generator.asked()) == ["g", "l"]


REFUSED_BODIES = (
    ({}, 400, "missing_required_parameter"),
    ({"model": "nobody", "messages": [{"role": "user", "content": "x"}]}, 404, "model_not_found"),
    ({"model": BASE, "messages": []}, 400, None),
    ({"model": BASE, "messages": [{"role": "user", "content": "x"}], "temperature": -1}, 400, None),
    ({"model": BASE, "messages": [{"role": "user", "content": "\ud800"}]}, 400, "invalid_json"),
    ({"model": "../x", "messages": [{"role": "user", "content": "x"}]}, 404, "model_not_found"),
)


async def test_what_the_route_refuses_is_the_error_of_its_line(gateway):
    client = gateway.client()
    lines = [chat_line(str(place), "", body=body) for place, (body, _, _) in enumerate(REFUSED_BODIES)]
    batch = await ended(client, await order(client, [*lines, chat_line("good", "g")]))
    counts = {"total": len(lines) + 1, "completed": 1, "failed": len(lines)}
    assert batch.request_counts.model_dump() == counts
    for place, told in enumerate(await results(client, batch.error_file_id)):
        _, status, code = REFUSED_BODIES[place]
        assert (told["custom_id"], told["error"], told["response"]["status_code"]) == (str(place), None, status)
        assert code is None or told["response"]["body"]["error"]["code"] == code


FILES_WITHOUT_A_GOOD_LINE = (
    (b"\n\n \n", ["empty_file"]),
    (b"{\n[]", ["invalid_json_line", "invalid_json_line"]),
    (b"\x00\x01\x02", ["invalid_json_line"]),
    (b"{}\n" * 50_001, ["too_many_requests"]),
)


async def test_a_file_without_a_good_line_fails_as_a_whole(gateway):
    client = gateway.client()
    for content, codes in FILES_WITHOUT_A_GOOD_LINE:
        batch = await ended(client, await order(client, content))
        assert (batch.status, batch.output_file_id, batch.error_file_id) == ("failed", None, None)
        assert batch.failed_at is not None
        assert [one.code for one in batch.errors.data] == codes
    assert gateway.generator.calls == [] and await gateway.usage() == []


BAD_ORDERS = (
    ({"input_file_id": "file-" + "0" * 32}, 404, "input_file_id"),
    ({"input_file_id": "../../etc/passwd"}, 404, "input_file_id"),
    ({"input_file_id": 7}, 400, "input_file_id"),
    ({"input_file_id": None}, 400, "input_file_id"),
    ({"endpoint": "/v1/models"}, 400, "endpoint"),
    ({"endpoint": "/admin/keys"}, 400, "endpoint"),
    ({"endpoint": "http://x/v1/chat/completions"}, 400, "endpoint"),
    ({"completion_window": "1h"}, 400, "completion_window"),
    ({"metadata": {"k": 1}}, 400, "metadata.k"),
    ({"metadata": {str(i): "" for i in range(17)}}, 400, "metadata"),
    ({"metadata": {"k" * 65: "v"}}, 400, None),
    ({"metadata": {"k": "v" * 513}}, 400, "metadata.k"),
    ({"output_expires_after": {"anchor": "created_at", "seconds": 3600}}, 400, "output_expires_after"),
)


async def test_bad_orders_are_refused(gateway):
    client = gateway.client()
    file = await client.files.create(file=("a.jsonl", b"{}"), purpose="batch")
    good = {"input_file_id": file.id, "endpoint": "/v1/chat/completions", "completion_window": "24h"}
    async with httpx.AsyncClient(base_url=gateway.url, headers={"authorization": f"Bearer {KEY}"}) as http:
        for changes, status, param in BAD_ORDERS:
            response = await http.post("/v1/batches", json=good | changes)
            assert response.status_code == status, (changes, response.text)
            assert param is None or response.json()["error"]["param"] == param
    assert (await client.batches.list()).data == []


async def test_a_file_of_another_purpose_or_tenant_is_refused(gateway):
    client, other = gateway.client(), gateway.client("other")
    theirs = await other.files.create(file=("a.jsonl", b"{}"), purpose="batch")
    tuning = await client.files.create(file=("a.jsonl", b"{}"), purpose="fine-tune")
    with pytest.raises(openai.NotFoundError):
        await client.batches.create(input_file_id=theirs.id, endpoint="/v1/chat/completions", completion_window="24h")
    with pytest.raises(openai.BadRequestError, match="purpose"):
        await client.batches.create(input_file_id=tuning.id, endpoint="/v1/chat/completions", completion_window="24h")


async def test_batches_of_other_tenants_are_unknown(gateway):
    client, other = gateway.client(), gateway.client("other")
    batch = await ended(client, await order(client, [chat_line("a", "t")]))
    for call in (other.batches.retrieve(batch.id), other.batches.cancel(batch.id), other.batches.retrieve("x\x00")):
        with pytest.raises(openai.NotFoundError):
            await call
    with pytest.raises(openai.NotFoundError):
        await other.files.content(batch.output_file_id)
    assert (await other.batches.list()).data == []


async def test_batches_are_listed_page_by_page_newest_first(gateway):
    client = gateway.client()
    made = [await order(client, [chat_line("a", "t")]) for _ in range(5)]
    page = await client.batches.list(limit=2)
    assert [one.id for one in page.data] == made[:2:-1] and page.has_more
    assert [one.id async for one in client.batches.list(limit=2)] == made[::-1]
    assert (await client.batches.list(after=made[0])).data == []


async def test_a_cancelled_batch_stops_and_keeps_what_is_done(gateway):
    client = gateway.client()
    gateway.generator.held = {"stuck"}
    lines = [chat_line("a", "x"), chat_line("b", "stuck"), chat_line("c", "stuck"), chat_line("d", "stuck")]
    batch_id = await order(client, [*lines, chat_line("e", "never")])

    async def stands() -> bool:
        counts = (await client.batches.retrieve(batch_id)).request_counts
        return counts.completed == 1 and gateway.generator.num_running == MAX_IN_FLIGHT

    await eventually(stands)
    assert (await client.batches.cancel(batch_id)).status == "cancelling"
    batch = await ended(client, batch_id)
    assert (batch.status, gateway.generator.num_running) == ("cancelled", 0)
    assert batch.cancelling_at <= batch.cancelled_at
    assert [one["custom_id"] for one in await results(client, batch.output_file_id)] == ["a"]
    errors = await results(client, batch.error_file_id)
    assert [(one["custom_id"], one["error"]["code"]) for one in errors] == [(i, "batch_cancelled") for i in "bcde"]
    assert "never" not in gateway.generator.asked()
    # What the lines in flight had used is in the ledger all the same.
    assert (await gateway.usage())[0][3:7] == (4, 0, 12, 5)
    assert (await client.batches.cancel(batch_id)).status == "cancelled"


async def test_a_batch_that_has_ended_cannot_be_cancelled(gateway):
    client = gateway.client()
    batch = await ended(client, await order(client, [chat_line("a", "t")]))
    with pytest.raises(openai.ConflictError):
        await client.batches.cancel(batch.id)


async def test_passing_troubles_are_waited_out_and_lasting_ones_are_told(gateway):
    client = gateway.client()
    busy = PlatformError(Code.OVERLOADED, "busy", retry_after_s=0.0)
    broken = PlatformError(Code.INTERNAL, "broken")
    gateway.generator.failures = {"a": [busy, busy], "b": [broken] * 9}
    batch = await ended(
        client, await order(client, [chat_line("1", "a"), chat_line("2", "b"), chat_line("3", "c")]), 60
    )
    assert [one["custom_id"] for one in await results(client, batch.output_file_id)] == ["1", "3"]
    (told,) = await results(client, batch.error_file_id)
    assert (told["custom_id"], told["response"]["status_code"]) == ("2", 500)
    assert gateway.generator.asked().count("a") == 3
    assert gateway.generator.asked().count("b") == 3


async def test_a_worker_that_was_cut_off_is_followed_by_one_that_asks_only_what_is_left(tmp_path):
    generator, bus = FakeGenerator(held={"t2", "t3", "t4"}), FakeBus()
    lines = [chat_line(str(i), f"t{i}") for i in range(8)]
    async with running(tmp_path, generator, bus) as gateway:
        client = gateway.client()
        batch_id = await order(client, lines)

        async def stands() -> bool:
            counts = (await client.batches.retrieve(batch_id)).request_counts
            return counts.completed == 2 and generator.num_running == MAX_IN_FLIGHT

        await eventually(stands)
    first = generator.asked()
    generator.calls.clear()
    generator.held.clear()
    async with running(tmp_path, generator, bus) as gateway:
        batch = await ended(gateway.client(), batch_id)
        output = await results(gateway.client(), batch.output_file_id)
        usage = await gateway.usage()
    assert batch.status == "completed"
    assert [line["custom_id"] for line in output] == [str(i) for i in range(8)]
    assert sorted(first) == ["t0", "t1", "t2", "t3", "t4"]
    assert sorted(generator.asked()) == ["t2", "t3", "t4", "t5", "t6", "t7"]
    # Eight answers and three that were cut off after their first token.
    assert usage[0][3:7] == (11, 0, 33, 8 * 2 + 3)


async def test_a_batch_whose_key_was_revoked_stops(gateway):
    client = gateway.client("other")
    gateway.generator.held = {"t0", "t1", "t2"}
    batch_id = await order(client, [chat_line(str(i), f"t{i}") for i in range(9)])
    await eventually(lambda: gateway.generator.num_running == MAX_IN_FLIGHT)
    key_id = gateway.keys["other"].split("-")[1]
    await gateway.admin("DELETE", f"/admin/keys/{key_id}")
    gateway.generator.held.clear()
    await eventually(lambda: gateway.generator.num_running == 0)
    await gateway.new_key("other")
    batch = await ended(gateway.client("other"), batch_id)
    assert (batch.status, batch.errors.data[0].code) == ("failed", "batch_failed")
    assert len(gateway.generator.calls) < 9


async def test_two_batches_share_the_places_in_flight(gateway):
    client = gateway.client()
    gateway.generator.held = {"slow"}
    long = await order(client, [chat_line(str(i), "slow") for i in range(MAX_IN_FLIGHT * 2)])
    await eventually(lambda: gateway.generator.num_running == MAX_IN_FLIGHT)
    short = await order(client, [chat_line("a", "quick")])
    await asyncio.sleep(0)
    gateway.generator.held.clear()
    await ended(client, short)
    assert (await ended(client, long)).status == "completed"
    assert gateway.generator.most_running == MAX_IN_FLIGHT


async def test_too_many_unfinished_batches_are_refused(gateway):
    client = gateway.client()
    gateway.generator.held = {"slow"}
    ids = [await order(client, [chat_line("a", "slow")]) for _ in range(20)]
    with pytest.raises(openai.RateLimitError):
        await order(client, [chat_line("a", "slow")])
    for batch_id in ids:
        await client.batches.cancel(batch_id)
    for batch_id in ids:
        assert (await ended(client, batch_id)).status == "cancelled"


async def test_a_batch_whose_time_is_up_keeps_what_is_done(tmp_path):
    generator, bus = FakeGenerator(held={"stuck"}), FakeBus()
    async with running(tmp_path, generator, bus) as gateway:
        client = gateway.client()
        batch_id = await order(client, [chat_line("a", "x"), *(chat_line(i, "stuck") for i in "bcdef")])

        async def stands() -> bool:
            counts = (await client.batches.retrieve(batch_id)).request_counts
            return counts.completed == 1 and generator.num_running == MAX_IN_FLIGHT

        await eventually(stands)
    with contextlib.closing(sqlite3.connect(tmp_path / "gateway.db")) as connection, connection:
        connection.execute("UPDATE batches SET expires_unix_ms = 1")
    generator.calls.clear()
    async with running(tmp_path, generator, bus) as gateway:
        client = gateway.client()
        batch = await ended(client, batch_id)
        assert [one["custom_id"] for one in await results(client, batch.output_file_id)] == ["a"]
        late = await results(client, batch.error_file_id)
    assert (batch.status, batch.expired_at is not None, batch.failed_at) == ("expired", True, None)
    assert [(one["custom_id"], one["error"]["code"]) for one in late] == [(i, "batch_expired") for i in "bcdef"]
    assert generator.asked() == []


async def test_a_batch_keeps_to_the_request_limit_of_its_key(gateway):
    await gateway.new_key("other", rpm=5)  # one for the upload, one for the order, three for lines
    client = gateway.client("other")
    await order(client, [chat_line(str(i), f"t{i}") for i in range(6)])
    await eventually(lambda: len(gateway.generator.calls) == 3)
    await asyncio.sleep(0.5)  # long enough for a fourth, were the limit not kept
    assert len(gateway.generator.calls) == 3
    owner = await gateway.state.keys.owner("other", gateway.keys["other"].split("-")[1])
    assert (await gateway.state.in_process.post(owner, CHAT, b"{}")).status == 429
