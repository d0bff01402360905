"""Sends the events of a graph to a client: as one JSON answer or as server-sent events.

Watches for a client that leaves, and stops the work at once when it does. Headers go out with the
first chunk, so that what fails before it is a real HTTP status; what fails later is said in the stream's own way.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Protocol

import orjson
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from chassis.errors import PlatformError
from gateway.api import errors
from gateway.api.identity import principal_of
from gateway.core.account import Account
from gateway.core.graph import Deadline, Graph, GraphEvent, GraphRequest
from gateway.core.services import Chat
from gateway.core.serving import Ask, Serving

JsonObject = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Framing:
    """How the chunks of a stream become bytes; `end` comes after a stream that nothing cut short."""

    media_type: str
    frame: Callable[[JsonObject], bytes]
    end: bytes = b""


def _data_event(chunk: JsonObject) -> bytes:
    return b"data: " + orjson.dumps(chunk) + b"\n\n"


def _named_event(chunk: JsonObject) -> bytes:
    return b"event: " + str(chunk["type"]).encode() + b"\n" + _data_event(chunk)


def _line(chunk: JsonObject) -> bytes:
    return orjson.dumps(chunk) + b"\n"


EVENT_STREAM = "text/event-stream; charset=utf-8"
DATA_EVENTS = Framing(EVENT_STREAM, _data_event, b"data: [DONE]\n\n")
NAMED_EVENTS = Framing(EVENT_STREAM, _named_event)  # an event's name is the type of its chunk
JSON_LINES = Framing("application/x-ndjson", _line)


class Rendering(Protocol):
    """Turns events into the shapes of one API."""

    @property
    def framing(self) -> Framing:
        """How its streams are written."""
        ...

    @property
    def params(self) -> Mapping[str, str]:
        """What this API calls the fields that the generator names in its errors, where the names differ."""
        ...

    def take(self, event: GraphEvent) -> Iterable[JsonObject]:
        """The chunks that a stream sends for an event; an answer in one piece ignores them."""
        ...

    def whole(self) -> JsonObject:
        """The answer in one piece, once all events were taken."""
        ...

    def failure(self, error: PlatformError) -> Iterable[JsonObject]:
        """The chunks that end a stream which has begun and cannot go on."""
        ...


class DataEvents:
    """The streams of OpenAI's chat and completions: an error is the last event, and there is no [DONE] then."""

    framing = DATA_EVENTS

    def failure(self, error: PlatformError) -> Iterable[JsonObject]:
        """The envelope."""
        yield errors.envelope(error)


def account_of(request: Request) -> Account:
    """The account that the middleware opened for the request."""
    account = request.scope["state"]["account"]
    assert isinstance(account, Account)
    return account


def deadline_of(request: Request) -> Deadline:
    """When the request's time is up."""
    return Deadline(request.scope["state"]["deadline_s"])


async def graph_of(request: Request, serving: Serving, model: str) -> Graph:
    """What answers under the name that the request gives; raises NOT_FOUND."""
    graph = await serving.graph(principal_of(request), model)
    account_of(request).model = graph.name
    return graph


def ask_of(request: Request, graph: Graph, wanted: Sequence[GraphRequest]) -> Ask:
    """What the request asks of the graph."""
    account = account_of(request)
    account.prompt_text = "\n".join(map(_prompt_text, wanted))
    return Ask(principal_of(request), account, deadline_of(request), graph.name, requests=tuple(wanted))


def _prompt_text(request: GraphRequest) -> str:
    match request.prompt:
        case Chat():
            return "\n".join(message.content for message in request.prompt.messages)
        case str():
            return request.prompt
    return ""  # token ids


class InferenceResponse(Response):
    """Answers with the events of a graph while they come."""

    def __init__(
        self, events: AsyncGenerator[GraphEvent], rendering: Rendering, account: Account, *, stream: bool
    ) -> None:
        super().__init__()
        self._events = events
        self._rendering = rendering
        self._account = account
        self._stream = stream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Works until everything was sent or the client left."""
        self._account.stream = self._stream
        work = self._send_stream(scope, send) if self._stream else self._send_whole(scope, receive, send)
        try:
            if not await finished_before_client_left(work, receive):
                self._account.finish_reason = "cancelled"
        except PlatformError as error:
            self._name_field(error)
            raise

    def _name_field(self, error: PlatformError) -> None:
        if error.param is not None:
            error.param = self._rendering.params.get(error.param, error.param)

    async def _send_whole(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._events) as events:
            async for event in events:
                for _ in self._rendering.take(event):
                    pass
        await json_response(self._rendering.whole())(scope, receive, send)

    async def _send_stream(self, scope: Scope, send: Send) -> None:
        framing = self._rendering.framing
        started = has_spoken = False
        try:
            async with aclosing(self._events) as events:
                async for event in events:
                    data = b"".join(map(framing.frame, self._rendering.take(event)))
                    if not data:
                        continue
                    if not started:
                        started = True
                        await send({"type": "http.response.start", "status": 200, "headers": _stream_headers(framing)})
                    await send({"type": "http.response.body", "body": data, "more_body": True})
                    if not has_spoken and self._account.ttft_s:
                        has_spoken = True
                        await asyncio.sleep(0)  # the loop turns: the first token leaves before the rest is made
            last = framing.end
        except PlatformError as error:
            if not started:
                raise
            self._name_field(error)
            last = self._failed(scope, error)
        except Exception as error:
            if not started:
                raise
            errors.log_unexpected(error)
            last = self._failed(scope, errors.internal_error())
        await send({"type": "http.response.body", "body": last, "more_body": False})

    def _failed(self, scope: Scope, error: PlatformError) -> bytes:
        scope["state"]["error"] = error
        return b"".join(map(self._rendering.framing.frame, self._rendering.failure(error)))


async def finished_before_client_left(work: Any, receive: Receive) -> bool:
    """Runs a coroutine to its end, or cancels it when the client disconnects and returns False.

    Handlers of answers in one piece are not cancelled by the server when the client leaves, hence the watcher.
    """
    working = asyncio.create_task(work)
    watching = asyncio.create_task(_disconnected(receive))
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            working.result()
            return True
        return False
    finally:
        for task in (working, watching):
            task.cancel()
        await asyncio.wait({working, watching})


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def json_response(content: JsonObject) -> Response:
    """An answer in one piece."""
    return Response(orjson.dumps(content), media_type="application/json")


def _stream_headers(framing: Framing) -> list[tuple[bytes, bytes]]:
    return [(b"content-type", framing.media_type.encode("latin-1")), (b"cache-control", b"no-store")]
