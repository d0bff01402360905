"""The HTTP/1.1 server of a process: uvicorn on httptools, with the bounds that a server for strangers needs.

uvicorn waits for ever for a request's head, reads heads of any size, and keeps a connection whose client does not read.
"""

import asyncio
import contextlib
import json
import logging
import uuid
from collections.abc import Iterator
from http import HTTPStatus

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from chassis import context
from chassis.corked import CorkedTransport

_log = logging.getLogger(__name__)

_MAX_URL_BYTES = 16 * 1024
_MAX_HEAD_BYTES = 48 * 1024  # of names and values together
_MAX_HEADERS = 128
_LINGER_S = 2.0
_MAX_UNREAD_HEAD_BYTES = 128 * 1024  # of a head that has not ended, however it is made up


class _Refused(Exception):
    """The head breaks a bound."""

    def __init__(self, status: HTTPStatus, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.message = message


class _Transport:
    """A connection whose close() leaves a client that is still sending the time to read why.

    Closed at once, the kernel would answer what comes with a reset, and the client would lose what we said.
    """

    def __init__(self, transport: CorkedTransport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport = transport
        self._loop = loop
        self._timer: asyncio.TimerHandle | None = None
        self.is_ending = False
        self.expects_more = False  # the protocol keeps it up to date: the client is in the middle of a request
        self.write = transport.write
        self.abort = transport.abort
        self.pause_reading = transport.pause_reading
        self.resume_reading = transport.resume_reading
        self.get_extra_info = transport.get_extra_info

    def is_closing(self) -> bool:
        return self.is_ending or self._transport.is_closing()

    def close(self) -> None:
        if self.is_closing():
            return
        if not self.expects_more:
            self._transport.close()
            return
        self.is_ending = True
        self._transport.resume_reading()
        self._transport.write_eof()
        self._timer = self._loop.call_later(_LINGER_S, self._transport.abort)

    def lost(self) -> None:
        if self._timer is not None:
            self._timer.cancel()


class BoundedProtocol(HttpToolsProtocol):
    """One connection."""

    head_timeout_s = 10.0  # from a request's first byte, or the connection's start, to the end of its head
    body_idle_s = 30.0  # between two pieces of a body that is waited for
    write_stall_s = 60.0  # for a client to read what has been sent, once buffers are full

    url = b""
    _refusal: _Refused | None = None
    _is_in_head = True
    _head_bytes = 0
    _unread_bytes = 0
    _head_timer: asyncio.TimerHandle | None = None
    _body_timer: asyncio.TimerHandle | None = None
    _write_timer: asyncio.TimerHandle | None = None
    _heard_s = 0.0  # when the last bytes came

    # What the transport tells.

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begins to wait for the first head."""
        self._lingering = _Transport(CorkedTransport(transport, self.loop), self.loop)
        super().connection_made(self._lingering)  # type: ignore[arg-type]
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Ends all waiting."""
        for timer in (self._head_timer, self._body_timer, self._write_timer):
            if timer is not None:
                timer.cancel()
        self._lingering.lost()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parses, and judges what a head that goes on and on has taken so far."""
        if self._lingering.is_ending:
            return
        self._heard_s = self.loop.time()
        super().data_received(data)
        self._lingering.expects_more = self._is_in_head or self._waits_for_body()
        if self.transport.is_closing():
            return
        if self._is_in_head:
            self._unread_bytes += len(data)
            if self._unread_bytes > _MAX_UNREAD_HEAD_BYTES:
                self._refuse(_Refused(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, "the request's head is too large"))
        elif self._body_timer is None and self._waits_for_body():
            self._body_timer = self.loop.call_later(self.body_idle_s, self._look_at_body)

    def pause_writing(self) -> None:
        """The buffers are full."""
        super().pause_writing()
        if self._write_timer is None:
            self._write_timer = self.loop.call_later(self.write_stall_s, self._stalled)

    def resume_writing(self) -> None:
        """The client reads."""
        super().resume_writing()
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    # What the parser tells. An exception in here becomes uvicorn's send_400_response.

    def on_message_begin(self) -> None:
        """A head begins."""
        super().on_message_begin()
        self._is_in_head, self._head_bytes, self._unread_bytes = True, 0, 0
        if self._head_timer is None:
            self._await_head()

    def on_url(self, url: bytes) -> None:
        """A piece of the URL."""
        super().on_url(url)
        if len(self.url) > _MAX_URL_BYTES:
            self._raise(HTTPStatus.REQUEST_URI_TOO_LONG, f"the URL has more than {_MAX_URL_BYTES} bytes")

    def on_header(self, name: bytes, value: bytes) -> None:
        """One header."""
        super().on_header(name, value)
        self._head_bytes += len(name) + len(value)
        if self._head_bytes > _MAX_HEAD_BYTES or len(self.headers) > _MAX_HEADERS:
            self._raise(
                HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE,
                f"the headers are more than {_MAX_HEADERS} or have more than {_MAX_HEAD_BYTES} bytes together",
            )

    def on_headers_complete(self) -> None:
        """The head ends."""
        self._is_in_head = False
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None
        offers_upgrade = self.parser.should_upgrade()
        if offers_upgrade and any(name in (b"content-length", b"transfer-encoding") for name, _ in self.headers):
            # The parser would take the body for the beginning of another protocol, and we for another request.
            self._raise(HTTPStatus.BAD_REQUEST, "no other protocol is spoken here: send the body without Upgrade")
        super().on_headers_complete()
        if offers_upgrade:
            self.cycle.keep_alive = False  # what follows may be in the other protocol

    def send_400_response(self, msg: str) -> None:
        """Answers what is no HTTP, or more than we read, in the shape of every other error."""
        self._refuse(self._refusal or _Refused(HTTPStatus.BAD_REQUEST, msg))

    # What we do about it.

    def _raise(self, status: HTTPStatus, message: str) -> None:
        self._refusal = _Refused(status, message)
        raise self._refusal

    def _refuse(self, refused: _Refused) -> None:
        """Says why where no answer has begun, and closes."""
        if self.transport.is_closing():
            return
        # Where another request is being answered, what we wrote would pass for its answer.
        if not self._is_answering() or (self._waits_for_body() and not self.cycle.response_started):
            self.transport.write(_answer(refused))
        if self._is_answering():
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self._lingering.expects_more = True
        self.transport.close()

    def _await_head(self) -> None:
        self._head_timer = self.loop.call_later(self.head_timeout_s, self._head_is_late)

    def _head_is_late(self) -> None:
        self._head_timer = None
        if self._is_answering():  # the head of a pipelined request: it is not waited for yet
            self._await_head()
        elif self.url or self._unread_bytes:
            self._refuse(_Refused(HTTPStatus.REQUEST_TIMEOUT, "the request's head did not arrive in time"))
        else:
            self.transport.close()

    def _look_at_body(self) -> None:
        self._body_timer = None
        if self.transport.is_closing() or not self._waits_for_body():
            return
        idle_s = self.loop.time() - self._heard_s
        if self.flow.read_paused:  # it is we who do not read
            idle_s = 0.0
        if idle_s >= self.body_idle_s:
            self._refuse(_Refused(HTTPStatus.REQUEST_TIMEOUT, "the request's body did not arrive in time"))
        else:
            self._body_timer = self.loop.call_later(self.body_idle_s - idle_s, self._look_at_body)

    def _stalled(self) -> None:
        self._write_timer = None
        _log.info("a client does not read its answer: closed", extra={"stalled_s": self.write_stall_s})
        self.transport.abort()

    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _waits_for_body(self) -> bool:
        return self._is_answering() and self.cycle.more_body


def _answer(refused: _Refused) -> bytes:
    message = refused.message
    error = {"message": message, "type": "invalid_request_error", "param": None, "code": "bad_http_request"}
    body = json.dumps({"error": error}).encode()
    head = (
        f"HTTP/1.1 {refused.status.value} {refused.status.phrase}\r\n"
        "content-type: application/json\r\n"
        f"content-length: {len(body)}\r\n"
        f"x-request-id: {context.new_request_id()}\r\n"
        f"x-trace-id: {uuid.uuid4().hex}\r\n"
        "connection: close\r\n\r\n"
    )
    return head.encode() + body


class HttpServer(uvicorn.Server):
    """uvicorn without signal handlers: the App owns the signals."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Captures none."""
        yield


def make_http_server(
    app: ASGIApp, *, host: str, port: int, grace_s: float, protocol: type[BoundedProtocol] = BoundedProtocol
) -> HttpServer:
    """Makes a server that is not started yet; serve() runs it, should_exit ends it within grace_s."""
    config = uvicorn.Config(
        app,
        interface="asgi3",  # uvicorn takes a bound method for an ASGI 2 application
        http=protocol,
        ws="none",
        host=host,
        port=port,
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=max(1, int(grace_s)),
    )
    return HttpServer(config)
