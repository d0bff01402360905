"""An upstream that fails, lies, dawdles or leaves: every way of it is one error of ours, and none is the client's."""

import asyncio
import json
import ssl
from contextlib import aclosing

import pytest

from chassis.errors import Code, PlatformError, http_status
from gateway.core.services import Delta, Done, Generation, Started
from testkit import eventually, free_port

from .conftest import HELLO, KEY, SSE, chunk, usage

HTML = b"<html><body>502 Bad Gateway</body></html>"


def refusal(message="no", **fields):
    return json.dumps({"error": {"message": message, "type": "x", **fields}}).encode()


async def failure(ask, **how):
    with pytest.raises(PlatformError) as caught:
        await ask(**how)
    return caught.value


@pytest.mark.parametrize(
    ("status", "body", "code", "is_retryable", "reason"),
    [
        ("401 Unauthorized", refusal(f"bad key {KEY}"), Code.UNAVAILABLE, False, "upstream_misconfigured"),
        ("403 Forbidden", refusal(), Code.UNAVAILABLE, False, "upstream_misconfigured"),
        ("404 Not Found", refusal("no such model"), Code.UNAVAILABLE, False, "upstream_misconfigured"),
        ("302 Found", b"", Code.UNAVAILABLE, False, "upstream_misconfigured"),
        ("400 Bad Request", refusal("bad seed", code="invalid_seed"), Code.INVALID_ARGUMENT, False, "invalid_seed"),
        ("422 Unprocessable", refusal(), Code.INVALID_ARGUMENT, False, None),
        (
            "400 Bad Request",
            refusal(code="context_length_exceeded"),
            Code.OUT_OF_RANGE,
            False,
            "context_length_exceeded",
        ),
        ("429 Too Many Requests", refusal(), Code.OVERLOADED, True, "upstream_rate_limited"),
        ("500 Oops", refusal(), Code.UNAVAILABLE, True, None),
        ("502 Bad Gateway", HTML, Code.UNAVAILABLE, True, None),
        ("503 Busy", b"x" * 300_000, Code.UNAVAILABLE, True, None),
    ],
)
async def test_a_status_means_one_error(ask, server, status, body, code, is_retryable, reason):
    server.sends(body, status=status, kind="application/json")
    error = await failure(ask)
    assert (error.code, error.retryable, error.reason) == (code, is_retryable, reason)
    assert http_status(error.code) not in (401, 403, 404), "they would say that the client is at fault"
    assert KEY not in error.message and "<html>" not in error.message


async def test_what_a_400_says_is_passed_on(ask, server):
    server.sends(refusal("seed must be an integer", param="seed", code="invalid"), status="400 Bad Request")
    error = await failure(ask)
    assert (error.message, error.param, error.reason) == ("seed must be an integer", "seed", "invalid")


@pytest.mark.parametrize(("value", "expected"), [("7", 7.0), ("99999999999", 3600.0), ("soon", 1.0)])
async def test_a_429_says_when_to_come_again(ask, server, value, expected):
    server.sends(refusal(), status="429 Slow Down", headers=f"Retry-After: {value}\r\n")
    assert (await failure(ask)).retry_after_s == expected


FIRST = json.dumps(chunk(content="a")).encode()
MALFORMED = [
    (HTML, "text/html"),
    (b"", "text/html"),
    (b"data: {not json\n\n", SSE),
    (b"data: [1, 2]\n\n", SSE),
    (b'data: {"choices": 7}\n\n', SSE),
    (b'data: {"choices": [{"index": 5, "delta": {"content": "a"}}]}\n\n', SSE),
    (b'data: {"choices": [{"index": -1, "delta": {"content": "a"}}]}\n\n', SSE),
    (b'data: {"choices": [{"index": 0, "delta": {"content": 7}}]}\n\n', SSE),
    (b'data: {"choices": [{"index": 0, "delta": {"tool_calls": [{"index": 0}]}}]}\n\n', SSE),
    (b'data: {"choices": [], "usage": {"prompt_tokens": -3}}\n\n', SSE),
    (b"data: " + b"x" * 1_500_000, SSE),
    (b"data: " + FIRST + b"\n\n", SSE),
    (b"data: " + FIRST + b"\n\ndata: [DONE]\n\n", SSE),
    (b": just a comment\n\ndata: [DONE]\n\n", SSE),
    (b'{"choices": [{"message": {"content": "a"}}]}', "application/json"),
]


@pytest.mark.parametrize(("body", "kind"), MALFORMED, ids=lambda value: str(value)[:40])
async def test_what_is_no_answer_is_not_taken_for_one(ask, server, body, kind):
    server.sends(body, kind=kind)
    error = await failure(ask)
    assert error.code is Code.UNAVAILABLE and error.retryable and "vendor" in error.message


async def test_an_error_in_the_middle_of_a_stream_is_told(ask, server):
    server.says(chunk(content="a"), {"error": {"message": "out of memory", "code": 500}})
    error = await failure(ask)
    assert error.code is Code.UNAVAILABLE and "out of memory" in error.message


async def test_a_connection_that_breaks_off_in_a_stream_is_no_end_of_it(ask, server):
    async def answer(_, writer):
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
        event = b"data: " + json.dumps(chunk(content="a", finish="stop")).encode() + b"\n\n"
        writer.write(b"%x\r\n%s\r\n" % (len(event), event))
        await writer.drain()
        writer.transport.abort()

    server.answer = answer
    assert (await failure(ask)).code is Code.UNAVAILABLE


async def test_a_server_that_is_away_is_unavailable(ask, upstream):
    error = await failure(ask, made=upstream(url=f"http://127.0.0.1:{free_port()}/v1"))
    assert error.code is Code.UNAVAILABLE and error.retryable


async def test_a_certificate_that_cannot_be_trusted_is_refused(ask, upstream, tmp_path):
    certificate, key = _self_signed(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)

    async def never(reader, writer):
        raise AssertionError("it was spoken to")

    async with await asyncio.start_server(never, "127.0.0.1", 0, ssl=context) as listening:
        port = listening.sockets[0].getsockname()[1]
        error = await failure(ask, made=upstream(url=f"https://127.0.0.1:{port}/v1"))
    assert error.code is Code.UNAVAILABLE and error.reason == "upstream_misconfigured" and not error.retryable


def _self_signed(folder):
    from datetime import UTC, datetime, timedelta

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.now(UTC)
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    builder = builder.serial_number(1).not_valid_before(now - timedelta(1)).not_valid_after(now + timedelta(1))
    pem, key_pem = folder / "cert.pem", folder / "key.pem"
    pem.write_bytes(builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
    key_pem.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return pem, key_pem


def slow(*, head_s=0.0, first_s=0.0, between_s=0.0, num=3):
    """A stream that takes its time."""

    async def answer(_, writer):
        await asyncio.sleep(head_s)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n")
        await writer.drain()
        await asyncio.sleep(first_s)
        for _ in range(num):
            writer.write(b"data: " + FIRST + b"\n\n")
            await writer.drain()
            await asyncio.sleep(between_s)

    return answer


@pytest.mark.parametrize("how", [{"head_s": 30.0}, {"first_s": 30.0}])
async def test_a_server_that_does_not_begin_is_not_asked_again_but_another_may_be(ask, server, upstream, how):
    server.answer = slow(**how)
    error = await failure(ask, made=upstream(first_byte_timeout_s=0.2))
    assert error.code is Code.UNAVAILABLE and not error.retryable


@pytest.mark.parametrize(
    ("own", "request_s", "how"),
    [(0.3, 10.0, {"between_s": 30.0}), (10.0, 0.3, {"between_s": 30.0}), (10.0, 0.3, {"head_s": 30.0})],
)
async def test_the_shorter_of_both_times_ends_the_wait(ask, server, upstream, own, request_s, how):
    server.answer = slow(**how)
    error = await failure(ask, made=upstream(timeout_s=own), timeout_s=request_s)
    assert error.code is Code.DEADLINE_EXCEEDED


async def test_closing_the_events_closes_the_connection(server, upstream):
    server.answer = slow(between_s=0.05, num=10_000)
    call = Generation("m", HELLO, "acme")
    async with aclosing(upstream().generate(call, timeout_s=10)) as events:
        async for event in events:
            if isinstance(event, Delta):
                break
    await eventually(lambda: server.num_left == 1)


async def test_a_cancelled_wait_closes_the_connection(server, upstream):
    server.answer = slow(head_s=0.2, between_s=0.05, num=10_000)

    async def run():
        async with aclosing(upstream().generate(Generation("m", HELLO, "acme"), timeout_s=10)) as events:
            async for _ in events:
                pass

    task = asyncio.create_task(run())
    await eventually(lambda: len(server.asked) == 1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await eventually(lambda: server.num_left == 1)


async def test_a_stream_that_stays_open_behind_its_end_holds_nobody_up(ask, server):
    async def answer(_, writer):
        events = (chunk(content="a", finish="stop"), usage(3, 1))
        text = "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n"
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n" + text.encode())
        await writer.drain()
        await asyncio.sleep(30)

    server.answer = answer
    async with asyncio.timeout(5):
        events = await ask()
    assert isinstance(events[0], Started) and isinstance(events[-1], Done)
