"""A client that leaves: the work stops at once, and what was produced is accounted, once."""

import asyncio
import json

import pytest

from testkit import eventually

BODY = {"model": "smollm2-135m-instruct", "messages": [{"role": "user", "content": "hello there"}], "max_tokens": 60}


class Client:
    """A client at the ASGI level: it leaves when it is told to."""

    def __init__(self, path: str, body: dict, key: str) -> None:
        self.scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "POST",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "headers": [(b"authorization", f"Bearer {key}".encode()), (b"content-type", b"application/json")],
            "client": ("test", 1),
            "server": ("test", 80),
            "scheme": "http",
            "root_path": "",
        }
        self._body = json.dumps(body).encode()
        self._sent_body = False
        self.leaves = asyncio.Event()
        self.stalls = False
        self.received = b""

    async def receive(self) -> dict:
        if not self._sent_body:
            self._sent_body = True
            return {"type": "http.request", "body": self._body, "more_body": False}
        await self.leaves.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: dict) -> None:
        self.received += message.get("body", b"")
        if self.stalls and self.received:
            await asyncio.Event().wait()  # flow control: the client reads no more


@pytest.mark.parametrize("stalls", [False, True], ids=["reads", "stalls"])
async def test_leaving_a_stream_stops_the_decoding(world, key, stalls):
    world.generator.token_s = 0.02
    client = Client("/v1/chat/completions", BODY | {"stream": True}, key)
    client.stalls = stalls
    serving = asyncio.create_task(world.app(client.scope, client.receive, client.send))
    await eventually(lambda: client.received.count(b"data:") >= (1 if stalls else 3))
    client.leaves.set()
    await asyncio.wait_for(serving, 0.3)
    assert (world.generator.num_cancelled, world.generator.num_finished) == (1, 0)
    (record,) = world.ledger.records
    assert (record.finish_reason, record.prompt_tokens, record.stream) == ("cancelled", 2, True)
    if not stalls:
        assert 2 <= record.completion_tokens < 60
        assert client.received.count(b'"content":"') - 1 == record.completion_tokens
    assert record.http_status == 200
    assert b"[DONE]" not in client.received


async def test_leaving_before_an_answer_in_one_piece_stops_the_decoding(world, key):
    world.generator.token_s = 0.02
    client = Client("/v1/chat/completions", BODY, key)
    serving = asyncio.create_task(world.app(client.scope, client.receive, client.send))
    await eventually(lambda: world.generator.calls)
    await asyncio.sleep(0.1)  # let some tokens come
    client.leaves.set()
    await asyncio.wait_for(serving, 0.3)
    assert world.generator.num_cancelled == 1
    (record,) = world.ledger.records
    assert (record.finish_reason, record.http_status) == ("cancelled", 499)
    assert 1 <= record.completion_tokens < 60
    assert client.received == b""


async def test_leaving_several_prompts_stops_them_all(world, key):
    world.generator.token_s = 0.02
    body = {"model": BODY["model"], "prompt": ["a", "b", "c"], "max_tokens": 60, "stream": True}
    client = Client("/v1/completions", body, key)
    serving = asyncio.create_task(world.app(client.scope, client.receive, client.send))
    await eventually(lambda: client.received.count(b"data:") >= 3)
    client.leaves.set()
    await asyncio.wait_for(serving, 0.3)
    assert world.generator.num_cancelled == 3
    assert [record.finish_reason for record in world.ledger.records] == ["cancelled"]


async def test_leaving_embeddings_is_accounted(world, key):
    world.embedder.delay_s = 30
    client = Client("/v1/embeddings", {"model": "all-minilm-l6-v2", "input": "x"}, key)
    serving = asyncio.create_task(world.app(client.scope, client.receive, client.send))
    await eventually(lambda: world.embedder.calls)
    client.leaves.set()
    await asyncio.wait_for(serving, 0.3)
    assert [record.finish_reason for record in world.ledger.records] == ["cancelled"]


async def test_leaving_while_the_body_is_sent_is_no_error_of_ours(world, key, caplog):
    client = Client("/v1/chat/completions", BODY, key)
    client._sent_body = True
    client.leaves.set()
    await asyncio.wait_for(world.app(client.scope, client.receive, client.send), 0.3)
    (record,) = world.ledger.records
    assert (record.finish_reason, record.http_status) == ("cancelled", 499)
    assert not [line for line in caplog.records if line.levelname == "ERROR"]


async def test_a_body_that_never_ends_is_refused_when_the_time_is_up(world, key):
    world.app._timeout_s = 0.1
    client = Client("/v1/chat/completions", BODY, key)
    client._sent_body = True  # no byte comes, and the client does not leave
    await asyncio.wait_for(world.app(client.scope, client.receive, client.send), 2)
    assert json.loads(client.received)["error"]["code"] == "deadline_exceeded"
    (record,) = world.ledger.records
    assert (record.http_status, record.error_code) == (504, "deadline_exceeded")


async def test_a_server_that_shuts_down_records_what_it_cuts_off(world, key):
    world.generator.token_s = 0.02
    client = Client("/v1/chat/completions", BODY | {"stream": True}, key)
    serving = asyncio.create_task(world.app(client.scope, client.receive, client.send))
    await eventually(lambda: client.received.count(b"data:") >= 3)
    serving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await serving
    await eventually(lambda: len(world.ledger.records) == 1)
    assert world.ledger.records[0].finish_reason == "cancelled"
    assert world.generator.num_cancelled == 1
