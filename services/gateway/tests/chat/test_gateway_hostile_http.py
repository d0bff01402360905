"""Bad HTTP over a real socket, against the server as every process of ours runs it.

Each case says what is answered and whether the connection is closed; after each, nothing is left (no connection, no
task, no run of the model, no row of the ledger but those that are due) and the next client is served.
"""

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing

import pytest

from chassis.http_server import BoundedProtocol, make_http_server
from testkit import eventually, free_port

KEY = "sk-one-secret"
BODY = json.dumps(
    {"model": "smollm2-135m-instruct", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}
).encode()
AUTH = b"authorization: Bearer " + KEY.encode() + b"\r\n"
JSON = b"content-type: application/json\r\n"
HOST = b"host: gateway\r\n"
POST = b"POST /v1/chat/completions HTTP/1.1\r\n" + HOST + AUTH + JSON
GET = b"GET /v1/models HTTP/1.1\r\n" + HOST + AUTH
LENGTH = b"content-length: %d\r\n" % len(BODY)


class Hasty(BoundedProtocol):
    """The same, with less patience."""

    head_timeout_s = 0.4
    body_idle_s = 0.4
    write_stall_s = 0.4


class Served:
    """A running server."""

    def __init__(self, world, server, port):
        self.world, self.server, self.port = world, server, port

    async def exchange(self, *pieces: bytes, half_close=False, timeout_s=20.0) -> bytes:
        """Sends the pieces, and reads until the server closes."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            try:
                for piece in pieces:
                    writer.write(piece)
                    await writer.drain()
                    await asyncio.sleep(0)
                if half_close:
                    writer.write_eof()
            except ConnectionError:
                pass  # it was closed on us: what was said before that is to be read
            return await _read(reader, timeout_s)
        finally:
            writer.close()

    async def at_rest(self):
        """Nothing is left of anybody, and the next one is served."""
        generator = self.world.generator
        await eventually(lambda: not self.server.server_state.connections and not self.server.server_state.tasks)
        await eventually(lambda: generator.num_cancelled + generator.num_finished == len(generator.calls))
        assert statuses(await self.exchange(LAST)) == [200]


async def _read(reader, timeout_s) -> bytes:
    """Until the end; CLOSED is added where that was the server's."""
    answer = b""
    try:
        async with asyncio.timeout(timeout_s):
            while piece := await reader.read(65536):
                answer += piece
    except TimeoutError:
        return answer
    except ConnectionError:
        pass
    return answer + b"CLOSED"


def statuses(answer: bytes) -> list[int]:
    """The statuses of all answers on a connection. Bodies of ours hold no line that begins so."""
    return [int(part[:3]) for part in answer.split(b"HTTP/1.1 ")[1:] if not part.startswith(b"100")]


@asynccontextmanager
async def serving(world, protocol=BoundedProtocol) -> AsyncIterator[Served]:
    port = free_port()
    server = make_http_server(world.app, host="127.0.0.1", port=port, grace_s=1.0, protocol=protocol)
    task = asyncio.create_task(server.serve())
    await eventually(lambda: server.started)
    yield Served(world, server, port)
    server.should_exit = True
    await task


@pytest.fixture
async def served(world):
    async with serving(world) as made:
        yield made


@pytest.fixture
async def hasty(world):
    async with serving(world, Hasty) as made:
        yield made


def chunked(*chunks: bytes) -> bytes:
    return b"transfer-encoding: chunked\r\n\r\n" + b"".join(chunks)


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


LAST = GET + b"connection: close\r\n\r\n"
END = b"0\r\n\r\n"
MANY = b"".join(b"x-%d: y\r\n" % number for number in range(10_000))

# name: what is sent, the statuses that are answered, whether the server closes
CASES: dict[str, tuple[bytes, list[int], bool]] = {
    "length and chunked both": (POST + LENGTH + chunked(chunk(BODY), END), [400], True),
    "chunked and length both": (POST + b"transfer-encoding: chunked\r\n" + LENGTH + b"\r\n" + BODY, [400], True),
    "chunked and length of a hidden second request": (
        POST + b"content-length: 4\r\n" + chunked(END, GET, b"\r\n"),
        [400],
        True,
    ),
    "two lengths that differ": (POST + LENGTH + b"content-length: 4\r\n\r\n" + BODY, [400], True),
    "two lengths alike": (POST + LENGTH + LENGTH + b"\r\n" + BODY, [400], True),
    "length with a sign": (POST + b"content-length: +%d\r\n\r\n" % len(BODY) + BODY, [400], True),
    "length below zero": (POST + b"content-length: -1\r\n\r\n" + BODY, [400], True),
    "length that is a list": (POST + b"content-length: 5, 5\r\n\r\n" + BODY, [400], True),
    "length in hex": (POST + b"content-length: 0x10\r\n\r\n" + BODY, [400], True),
    "length beyond 64 bits": (POST + b"content-length: 99999999999999999999999\r\n\r\n", [400], True),
    "length of a petabyte": (POST + b"content-length: 1000000000000000\r\n\r\n", [413], True),
    "chunked twice": (POST + b"transfer-encoding: chunked, chunked\r\n\r\n" + chunk(BODY) + END, [400], True),
    "chunked, then something else": (POST + b"transfer-encoding: chunked, identity\r\n\r\n" + END, [400], True),
    "unknown coding": (POST + b"transfer-encoding: xchunked\r\n\r\n" + chunk(BODY) + END, [400], True),
    "space before the colon": (POST + b"transfer-encoding : chunked\r\n\r\n" + chunk(BODY) + END, [400], True),
    "vertical tab in the coding": (POST + b"transfer-encoding:\x0bchunked\r\n\r\n" + chunk(BODY) + END, [400], True),
    "chunk of no number": (POST + chunked(b"zz\r\nabc\r\n", END), [400], True),
    "chunk of negative size": (POST + chunked(b"-1\r\nabc\r\n", END), [400], True),
    "chunk of 2**64 and more": (POST + chunked(b"ffffffffffffffffff\r\nabc\r\n"), [400], True),
    "chunk that is longer than it says": (POST + chunked(b"2\r\nabcdef\r\n", END), [400], True),
    "chunk ended by a bare line feed": (POST + chunked(b"%x\n" % len(BODY), BODY, b"\n0\n\n"), [400], True),
    "chunk extension with a bare line feed": (POST + chunked(b"2;a\nb\r\nab\r\n", END), [400], True),
    "chunks that are too much together": (POST + chunked(chunk(b" " * 60_000), chunk(b" " * 60_000)), [413], True),
    "header of 64 KB": (GET + b"x-large: " + b"a" * 65536 + b"\r\n\r\n", [431], True),
    "authorization of 64 KB": (
        b"GET /v1/models HTTP/1.1\r\n" + HOST + b"authorization: Bearer " + b"a" * 65536 + b"\r\n\r\n",
        [431],
        True,
    ),
    "header of 1 MB that never ends": (GET + b"x-large: " + b"a" * 1_000_000, [431], True),
    "header name of 1 MB that never ends": (GET + b"a" * 1_000_000, [431], True),
    "10,000 headers": (GET + MANY + b"\r\n", [431], True),
    "URL of 64 KB": (b"GET /v1/" + b"a" * 65536 + b" HTTP/1.1\r\n" + HOST + b"\r\n", [414], True),
    "URL of 1 MB that never ends": (b"GET /v1/" + b"a" * 1_000_000, [414], True),
    "query of 64 KB": (b"GET /v1/models?" + b"a" * 65536 + b" HTTP/1.1\r\n" + HOST + b"\r\n", [414], True),
    "NUL in a header's value": (GET + b"x-a: a\0b\r\n\r\n", [400], True),
    "NUL in a header's name": (GET + b"x\0a: b\r\n\r\n", [400], True),
    "bare carriage return in a header": (GET + b"x-a: a\rx-b: c\r\n\r\n", [400], True),
    "folded header": (GET + b"x-a: a\r\n folded\r\n\r\n", [400], True),
    "header without a colon": (GET + b"nothing\r\n\r\n", [400], True),
    "header without a name": (GET + b": nothing\r\n\r\n", [400], True),
    "space before the first header": (b"GET /v1/models HTTP/1.1\r\n host: a\r\n" + AUTH + b"\r\n", [400], True),
    "NUL in the path": (b"GET /v1/\0 HTTP/1.1\r\n" + HOST + b"\r\n", [400], True),
    "control character in the path": (b"GET /v1/\x01 HTTP/1.1\r\n" + HOST + b"\r\n", [400], True),
    "raw bytes in the path": (b"GET /v1/\xff\xfe HTTP/1.1\r\n" + HOST + AUTH + b"\r\n", [400], True),
    "space in the path": (b"GET /v1/a b HTTP/1.1\r\n" + HOST + b"\r\n", [400], True),
    "encoded NUL": (b"GET /v1/files/%00 HTTP/1.1\r\n" + HOST + AUTH + b"\r\n", [404], False),
    "encoded line break": (b"GET /v1/a%0d%0aset-cookie:%20a HTTP/1.1\r\n" + HOST + AUTH + b"\r\n", [404], False),
    "encoded bytes that are no text": (b"GET /v1/%ff%fe HTTP/1.1\r\n" + HOST + AUTH + b"\r\n", [404], False),
    "encoded traversal": (b"GET /v1/..%2f..%2fetc%2fpasswd HTTP/1.1\r\n" + HOST + AUTH + b"\r\n", [404], False),
    "traversal to what needs no key": (b"GET /v1/../healthz HTTP/1.1\r\n" + HOST + b"\r\n", [401], False),
    "double slash before what needs a key": (b"GET //v1/models HTTP/1.1\r\n" + HOST + b"\r\n", [404], False),
    "path in capitals": (b"GET /V1/models HTTP/1.1\r\n" + HOST + b"\r\n", [404], False),
    "absolute URI": (b"GET http://evil/v1/models HTTP/1.1\r\n" + HOST + AUTH + b"\r\n", [200], False),
    "absolute URI without a key": (b"GET http://evil/v1/models HTTP/1.1\r\n" + HOST + b"\r\n", [401], False),
    "absolute URI without a path": (b"GET http://evil HTTP/1.1\r\n" + HOST + AUTH + b"\r\n", [400], True),
    "absolute URI of another kind": (b"GET file:///etc/passwd HTTP/1.1\r\n" + HOST + AUTH + b"\r\n", [400], True),
    "a tunnel": (b"CONNECT evil:443 HTTP/1.1\r\n" + HOST + AUTH + b"\r\n", [400], True),
    "star": (b"OPTIONS * HTTP/1.1\r\n" + HOST + AUTH + b"\r\n", [404], False),
    "TRACE": (b"TRACE /v1/models HTTP/1.1\r\n" + HOST + AUTH + b"\r\n", [405], False),
    "unknown method": (b"BREW /v1/models HTTP/1.1\r\n" + HOST + AUTH + b"\r\n", [400], True),
    "method of 1 MB": (b"A" * 1_000_000, [400], True),
    "no HTTP": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 100, [400], True),
    "HTTP/2 by prior knowledge": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", [400], True),
    "HTTP/9.9": (b"GET /v1/models HTTP/9.9\r\n" + HOST + AUTH + b"\r\n", [400], True),
    "HTTP/0.9": (b"GET /v1/models\r\n\r\n", [401], True),
    "HTTP/1.0": (b"GET /v1/models HTTP/1.0\r\n" + AUTH + b"\r\n", [200], True),
    "h2c upgrade": (
        GET + b"connection: upgrade, http2-settings\r\nupgrade: h2c\r\nhttp2-settings: AAMAAABkAAQAAP__\r\n\r\n",
        [200],
        True,
    ),
    "h2c upgrade with a body": (POST + LENGTH + b"connection: upgrade\r\nupgrade: h2c\r\n\r\n" + BODY, [400], True),
    "h2c upgrade that hides a request": (
        POST + b"content-length: %d\r\nconnection: upgrade\r\nupgrade: h2c\r\n\r\n" % len(GET) + GET + b"\r\n",
        [400],
        True,
    ),
    "websocket": (
        GET + b"connection: upgrade\r\nupgrade: websocket\r\nsec-websocket-version: 13\r\n"
        b"sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n",
        [200],
        True,
    ),
    "pipelined": ((GET + b"\r\n") * 5, [200] * 5, False),
    "pipelined, the last one no HTTP": (GET + b"\r\n" + b"@@@@\r\n\r\n", [], True),
    "request behind a body that is longer than it says": (
        POST + b"content-length: 2\r\n\r\n{}" + GET + b"\r\n",
        [400, 200],
        False,
    ),
    "two hosts": (GET + b"host: evil\r\n\r\n", [200], False),
    "two Authorization headers": (GET + AUTH + b"\r\n", [401], False),
    "forwarded-for of another": (GET + b"x-forwarded-for: 127.0.0.1\r\nx-real-ip: ::1\r\n\r\n", [200], False),
    "expectation that cannot be met": (POST + LENGTH + b"expect: 200-ok\r\n\r\n" + BODY, [200], False),
    "expect 100, refused by its length": (
        POST + b"content-length: 99999999\r\nexpect: 100-continue\r\n\r\n",
        [413],
        True,
    ),
}


# Framing must be judged alike however the bytes are cut.
FRAMING = [name for name, (sent, expected, _) in CASES.items() if expected == [400] and len(sent) < 1000]


# One server for a whole table: to start one takes longer than a case.
async def test_every_case_is_answered_as_the_table_says_and_leaves_nothing_behind(served):
    wrong = {}
    for name, (sent, expected, closes) in CASES.items():
        # Where the connection stays open, it serves the next request as if nothing had been.
        answer = await served.exchange(sent + (b"" if closes else LAST))
        if statuses(answer) != (expected if closes else [*expected, 200]) or not answer.endswith(b"CLOSED"):
            wrong[name] = answer[:500]
        check_shape(answer)
        await served.at_rest()
    assert not wrong


async def test_however_the_bytes_are_cut_framing_is_judged_alike(served):
    wrong = {}
    for name in FRAMING:
        sent, expected, _ = CASES[name]
        answer = await served.exchange(*(sent[at : at + 1] for at in range(len(sent))))
        if statuses(answer) != expected or not answer.endswith(b"CLOSED"):
            wrong[name] = answer[:500]
        await served.at_rest()
    assert not wrong


def check_shape(answer: bytes) -> None:
    """Every answer carries its ids, every error the envelope."""
    for part in answer.removesuffix(b"CLOSED").split(b"HTTP/1.1 ")[1:]:
        head, _, body = part.partition(b"\r\n\r\n")
        assert b"x-request-id: " in head and b"x-trace-id: " in head
        if not part.startswith(b"200"):
            assert set(json.loads(body)["error"]) == {"message", "type", "param", "code"}


async def test_ledger_has_a_row_for_each_request_that_came_to_be_one_and_no_other(served):
    for sent in (CASES["length and chunked both"][0], CASES["header of 64 KB"][0], CASES["no HTTP"][0]):
        await served.exchange(sent)
    await served.exchange(POST + LENGTH + b"connection: close\r\n\r\n" + BODY)
    await served.exchange(CASES["chunk of no number"][0])
    await eventually(lambda: len(served.world.ledger.records) == 2)
    assert [(one.http_status, one.completion_tokens) for one in served.world.ledger.records] == [(200, 3), (499, 0)]


class TestPatience:
    @pytest.mark.parametrize("sent", [b"", b"G", GET, GET + b"x-slow: "])
    async def test_head_that_does_not_come_is_not_waited_for(self, hasty, sent):
        answer = await hasty.exchange(sent, timeout_s=10)
        assert answer.endswith(b"CLOSED") and statuses(answer) == ([408] if sent else [])
        await hasty.at_rest()

    async def test_head_that_comes_a_byte_at_a_time_is_not_waited_for(self, hasty):
        _reader, writer = await asyncio.open_connection("127.0.0.1", hasty.port)
        started = asyncio.get_running_loop().time()
        with pytest.raises(ConnectionError):
            for byte in (GET + b"x-slow: ") + b"a" * 10_000:
                writer.write(bytes([byte]))
                await writer.drain()
                await asyncio.sleep(0.01)
        assert asyncio.get_running_loop().time() - started < 10
        writer.close()
        await hasty.at_rest()

    async def test_many_slow_heads_hold_nobody_up(self, hasty):
        waiting = [asyncio.create_task(hasty.exchange(GET)) for _ in range(200)]
        await asyncio.sleep(0.05)
        assert statuses(await hasty.exchange(LAST)) == [200]
        assert {tuple(statuses(answer)) for answer in await asyncio.gather(*waiting)} == {(408,)}
        await hasty.at_rest()

    async def test_second_head_of_a_connection_is_not_waited_for_either(self, hasty):
        answer = await hasty.exchange(GET + b"\r\n", GET)
        assert statuses(answer) in ([200, 408], [200]) and answer.endswith(b"CLOSED")
        await hasty.at_rest()

    @pytest.mark.parametrize("sent", [POST + LENGTH + b"\r\n", POST + LENGTH + b"\r\n{", POST + chunked(b"5\r\n{")])
    async def test_body_that_stops_coming_is_not_waited_for(self, hasty, sent):
        answer = await hasty.exchange(sent)
        assert statuses(answer) == [408] and answer.endswith(b"CLOSED")
        await hasty.at_rest()
        assert [one.http_status for one in hasty.world.ledger.records] == [499]

    async def test_body_that_goes_on_coming_is_read(self, hasty):
        answer = await asyncio.create_task(self._trickle(hasty))
        assert statuses(answer) == [200]

    async def _trickle(self, hasty):
        reader, writer = await asyncio.open_connection("127.0.0.1", hasty.port)
        writer.write(POST + LENGTH + b"connection: close\r\n\r\n")
        for at in range(0, len(BODY), 10):
            writer.write(BODY[at : at + 10])
            await asyncio.sleep(0.1)
        try:
            return await _read(reader, 10)
        finally:
            writer.close()

    async def test_long_answer_outlasts_every_patience(self, hasty):
        hasty.world.generator.token_s = 0.5
        answer = await hasty.exchange(POST + LENGTH + b"connection: close\r\n\r\n" + BODY)
        assert statuses(answer) == [200]
        await hasty.at_rest()


@pytest.mark.parametrize("shared", [False, True])
async def test_client_that_does_not_read_its_stream_is_cut_and_the_model_stopped(hasty, shared):
    generator = hasty.world.generator
    generator.context_length = 10**9
    asked = {"stream": True, "max_tokens": 10**6, "messages": [{"role": "user", "content": "hi"}]}
    body = json.dumps(asked | {"model": "smollm2-135m-instruct", "temperature": 0 if shared else 1}).encode()
    with closing(socket.socket()) as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(client, ("127.0.0.1", hasty.port))
        await loop.sock_sendall(client, POST + b"content-length: %d\r\n\r\n" % len(body) + body)
        await eventually(lambda: generator.num_cancelled == 1, timeout_s=30)
    [record] = hasty.world.ledger.records
    # What lay in the buffers, and no more: the model waited for the reader.
    assert record.finish_reason == "cancelled" and record.completion_tokens < 100_000
    await hasty.at_rest()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("how", ["close", "reset", "half-close"])
async def test_client_that_goes_away_stops_the_model(served, how, stream):
    generator = served.world.generator
    generator.token_s = 0.2
    body = json.dumps(json.loads(BODY) | {"stream": stream, "max_tokens": 50}).encode()
    _reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
    writer.write(POST + b"content-length: %d\r\n\r\n" % len(body) + body)
    await eventually(lambda: generator.calls)
    match how:
        case "close":
            writer.close()
        case "reset":
            writer.transport.abort()
        case "half-close":
            writer.write_eof()
    await eventually(lambda: generator.num_cancelled == 1)
    writer.close()
    await eventually(lambda: len(served.world.ledger.records) == 1)
    assert served.world.ledger.records[0].finish_reason == "cancelled"
    await served.at_rest()


async def test_pipelined_requests_are_answered_in_their_order_and_one_at_a_time(served):
    answer = await served.exchange((POST + LENGTH + b"\r\n" + BODY) * 20 + GET + b"connection: close\r\n\r\n")
    assert statuses(answer) == [200] * 21 and answer.endswith(b"CLOSED")
    assert answer.rfind(b'"object":"list"') > answer.rfind(b"chat.completion")
    await served.at_rest()
    assert len(served.world.ledger.records) == 20
