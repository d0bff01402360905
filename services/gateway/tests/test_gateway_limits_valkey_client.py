"""The client for scripts: replies find their callers, whatever way they come and whoever has left."""

import asyncio
import time

import pytest
import redis

from gateway.backends.valkey_client import Script, ScriptCall, ValkeyClient, ValkeyError
from testkit import eventually
from testkit.servers import valkey_server

ECHO = Script("return {1, ARGV[1], {KEYS[1], false}, redis.status_reply('fine')}")
FAIL = Script("return redis.error_reply('NOPE not this one')")


@pytest.fixture(scope="module")
def valkey():
    with valkey_server() as server:
        yield server


@pytest.fixture
async def client(valkey):
    made = ValkeyClient(valkey.url)
    yield made
    made.drop()


@pytest.mark.integration
async def test_replies_of_every_kind(client):
    assert await client.run(ECHO, ["key"], ["päge\r\n$3"], timeout_s=10.0) == [
        1,
        "päge\r\n$3".encode(),
        [b"key", None],
        b"fine",
    ]


@pytest.mark.integration
async def test_scripts_that_the_server_forgot_are_told_again(client, valkey):
    await client.run(ECHO, ["key"], [0], timeout_s=10.0)
    with redis.Redis.from_url(valkey.url) as admin:
        admin.script_flush()
    calls = [ScriptCall(["key"], [number]) for number in range(100)]
    assert [reply[1] for reply in await client.run_all(ECHO, calls, timeout_s=10.0)] == [
        b"%d" % number for number in range(100)
    ]


@pytest.mark.integration
async def test_each_of_many_callers_gets_its_own_reply_over_one_connection(client, valkey):
    async def one(number):
        return (await client.run(ECHO, [f"k{number}"], [number], timeout_s=10.0))[1]

    assert await asyncio.gather(*map(one, range(500))) == [b"%d" % number for number in range(500)]
    with redis.Redis.from_url(valkey.url) as admin:
        assert [entry["name"] for entry in admin.client_list()].count("pressroom-gateway") == 1


@pytest.mark.integration
async def test_an_error_is_the_callers_alone(client):
    failing, working = await asyncio.gather(
        client.run(FAIL, [], [], timeout_s=10.0), client.run(ECHO, ["key"], [7], timeout_s=10.0), return_exceptions=True
    )
    assert isinstance(failing, ValkeyError) and "NOPE" in str(failing)
    assert working[1] == b"7"


@pytest.mark.integration
async def test_a_lost_connection_is_made_anew(client, valkey):
    await client.run(ECHO, ["key"], [1], timeout_s=10.0)
    with redis.Redis.from_url(valkey.url) as admin:
        admin.client_kill_filter(_type="normal", skipme=True)
    await eventually(lambda: client._connection.is_lost)
    assert (await client.run(ECHO, ["key"], [2], timeout_s=10.0))[1] == b"2"


@pytest.mark.integration
async def test_a_wrong_password_is_an_error_that_does_not_tell_it(valkey):
    client = ValkeyClient(valkey.url.replace(valkey.token, "sesame"))
    with pytest.raises(ValkeyError) as caught:
        await client.run(ECHO, ["key"], [1], timeout_s=10.0)
    assert "sesame" not in str(caught.value)


class ScriptedServer:
    """Greets, then sends what a test says."""

    def __init__(self) -> None:
        self.writer: asyncio.StreamWriter | None = None
        self.num_connections = 0

    async def serve(self, reader, writer):
        self.num_connections += 1
        writer.write(b"+OK\r\n")  # to CLIENT SETNAME
        self.writer = writer
        while await reader.read(4096):
            pass


@pytest.fixture
async def scripted():
    server = ScriptedServer()
    listening = await asyncio.start_server(server.serve, "127.0.0.1", 0)
    server.url = f"redis://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
    yield server
    listening.close()


async def test_a_reply_may_come_in_single_bytes_and_one_that_nobody_waits_for_is_dropped(scripted):
    client = ValkeyClient(scripted.url)
    left = asyncio.create_task(client.run(ECHO, [], [], timeout_s=10.0))
    await eventually(lambda: scripted.writer is not None and client._connection is not None)
    left.cancel()
    waiting = asyncio.create_task(client.run(ECHO, [], [], timeout_s=10.0))
    await asyncio.sleep(0)
    for byte in b"*1\r\n:1\r\n*2\r\n$4\r\nab\r\n\r\n$-1\r\n":
        scripted.writer.write(bytes([byte]))
        await scripted.writer.drain()
    assert await waiting == [b"ab\r\n", None]
    client.drop()


@pytest.mark.parametrize("said", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b":seven\r\n", b"*x\r\n"])
async def test_what_is_no_resp_closes_the_connection(scripted, said):
    client = ValkeyClient(scripted.url)
    waiting = asyncio.create_task(client.run(ECHO, [], [], timeout_s=10.0))
    await eventually(lambda: scripted.writer is not None and client._connection is not None)
    scripted.writer.write(said)
    with pytest.raises(ConnectionError):
        await waiting
    second = asyncio.create_task(client.run(ECHO, [], [], timeout_s=10.0))
    await eventually(lambda: scripted.num_connections == 2)
    second.cancel()
    client.drop()


async def test_a_server_that_is_frozen_is_left_by_drop(scripted):
    client = ValkeyClient(scripted.url)
    waiting = asyncio.create_task(client.run(ECHO, [], [], timeout_s=10.0))
    await eventually(lambda: scripted.writer is not None and client._connection is not None)
    client.drop()
    with pytest.raises(ConnectionError):
        await waiting


async def test_a_server_that_does_not_answer_in_time_is_not_waited_for(scripted):
    client = ValkeyClient(scripted.url)
    with pytest.raises(TimeoutError):
        await client.run(ECHO, [], [], timeout_s=0.05)
    client.drop()


async def test_a_busy_loop_is_not_taken_for_a_slow_server(scripted):
    client = ValkeyClient(scripted.url)
    waiting = asyncio.create_task(client.run(ECHO, [], [], timeout_s=0.2))
    await eventually(lambda: scripted.writer is not None and client._connection is not None)
    await asyncio.sleep(0)
    scripted.writer.write(b"*1\r\n:1\r\n")
    time.sleep(0.4)  # noqa: ASYNC251 - something else holds the loop while the answer is there
    assert await waiting == [1]
    client.drop()
