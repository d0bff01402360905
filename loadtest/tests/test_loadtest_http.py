"""The client against a real server that streams with pauses, breaks off, refuses and hangs."""

import http.server
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from loadtest import http_stream
from loadtest.rows import Row
from loadtest.target import Target

DELTA = b'data: {"choices": [{"delta": {"content": "word "}}]}\n\n'
END = (
    b'data: {"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 2}}\n\n',
    b"data: [DONE]\n\n",
)
PAUSE_S = 0.4


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    seen: dict[str, object]

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        type(self).seen = {"body": body, "path": self.path, "authorization": self.headers["authorization"]}
        getattr(self, f"_{body['model']}")()

    def _start(self) -> None:
        self.send_response(200)
        self.send_header("transfer-encoding", "chunked")
        self.send_header("x-request-id", "req_1")
        self.send_header("x-trace-id", "t" * 32)
        self.end_headers()

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
        self.wfile.flush()

    def _slow(self) -> None:
        self._start()
        for data in (DELTA, DELTA, *END, b""):
            time.sleep(PAUSE_S if data == DELTA else 0)
            self._chunk(data)

    def _torn(self) -> None:
        self._start()
        self._chunk(DELTA)
        self.connection.shutdown(socket.SHUT_RDWR)
        self.close_connection = True

    def _hangs(self) -> None:
        self._start()
        self._chunk(DELTA)
        time.sleep(3)
        self.close_connection = True

    def _drips(self) -> None:
        """Something always comes, so that no single read is slow, but the answer never ends."""
        self._start()
        for _ in range(40):
            time.sleep(0.1)
            try:
                self._chunk(DELTA)
            except OSError:  # the client left
                break
        self.close_connection = True

    def _refuses(self) -> None:
        body = b'{"error": {"message": "m", "type": "rate_limit_error", "param": null, "code": "rate_limit_exceeded"}}'
        self.send_response(429)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def _server() -> Iterator[http.server.ThreadingHTTPServer]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def target() -> Iterator[Target]:
    with _server() as server:
        yield Target(f"http://127.0.0.1:{server.server_port}/v1", "sk-a-b")


def ask(target: Target, model: str, timeout_s: float = 30.0) -> Row:
    row = Row(1, 1, 1.0, "chat", model, 0.0)
    http_stream.ask(target, {"model": model}, row, timeout_s=timeout_s, clock=time.perf_counter)
    return row


def test_the_first_token_is_timed_when_it_arrives_and_not_when_the_answer_ends(target):
    row = ask(target, "slow")
    assert row.outcome == "ok"
    assert (row.prompt_tokens, row.completion_tokens, row.num_chunks) == (9, 2, 2)
    assert row.ttft_s >= PAUSE_S * 0.95
    assert row.last_token_s - row.first_token_s >= PAUSE_S * 0.8, "both chunks were read at once"
    assert row.done_s >= row.last_token_s
    assert (row.request_id, row.trace_id) == ("req_1", "t" * 32)
    assert _Handler.seen["path"] == "/v1/chat/completions"
    assert _Handler.seen["authorization"] == "Bearer sk-a-b"


def test_an_answer_that_breaks_off_is_a_failure_with_what_had_come(target):
    row = ask(target, "torn")
    assert (row.outcome, row.num_tokens, row.status) == ("failed", 1, 200)
    assert row.error in ("disconnected", "no_done")


@pytest.mark.parametrize("model", ["hangs", "drips"])
def test_an_answer_that_does_not_end_in_time_is_left(target, model):
    row = ask(target, model, timeout_s=0.7)
    assert (row.error, row.outcome) == ("timeout", "failed")
    assert 0.6 < row.e2e_s < 2.5


def test_a_refusal_keeps_status_and_code(target):
    row = ask(target, "refuses")
    assert row.code == "429 rate_limit_exceeded"
    assert row.first_token_s is None


def test_nobody_listens():
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    assert ask(Target(f"http://127.0.0.1:{port}/v1", "k"), "slow").code == "connection_refused"


class Killed(BaseException):
    """As gevent's GreenletExit."""


class _KillsAfter:
    """A clock that kills its reader at its third look: in the middle of the answer."""

    def __init__(self) -> None:
        self.looks = 0

    def __call__(self) -> float:
        self.looks += 1
        if self.looks == 3:
            raise Killed
        return time.perf_counter()


def test_a_request_that_is_killed_with_the_test_is_written_down_as_stopped(target):
    row = Row(1, 1, 1.0, "chat", "slow", 0.0)
    with pytest.raises(Killed):
        http_stream.ask(target, {"model": "slow"}, row, timeout_s=30.0, clock=_KillsAfter())
    assert row.outcome == "stopped"
    assert row.done_s is not None
