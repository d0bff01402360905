"""A server that answers as a test says, byte by byte, and remembers what it was asked."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass, field

import pytest
from pydantic import SecretStr

from gateway.backends.openai_request import Dialect
from gateway.backends.openai_upstream import Endpoint, OpenAiUpstream, open_session
from gateway.core.services import Chat, Generation, Message

SSE = "text/event-stream; charset=utf-8"
KEY = "sk-the-vendors-own"
HELLO = Chat((Message("user", "hello there"),))


@dataclass
class Asked:
    """One request as it arrived."""

    path: str
    headers: dict[str, str]
    body: dict


Answer = Callable[[Asked, asyncio.StreamWriter], Awaitable[None]]


@dataclass
class ScriptedServer:
    """Speaks HTTP/1.1 with keep-alive; `answer` writes the raw answer to each request."""

    answer: Answer | None = None
    asked: list[Asked] = field(default_factory=list)
    num_connections: int = 0
    num_left: int = 0  # connections that the client closed
    url: str = ""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
                headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in head[1:])}
                body = await reader.readexactly(int(headers.get("content-length", 0)))
                self.asked.append(Asked(head[0].split()[1], headers, json.loads(body or b"{}")))
                assert self.answer is not None
                watching = asyncio.create_task(reader.read(1))
                try:
                    await self.answer(self.asked[-1], writer)
                    await writer.drain()
                finally:
                    left = watching.done() and watching.result() == b""
                    watching.cancel()
                    await asyncio.wait({watching})
                if left:
                    raise ConnectionResetError
        except (asyncio.IncompleteReadError, ConnectionError):
            self.num_left += 1
        finally:
            writer.close()

    def says(self, *events: object, done: bool = True, status: str = "200 OK", kind: str = SSE) -> None:
        """Answers with a stream of these events."""
        text = "".join(f"data: {json.dumps(event)}\n\n" for event in events) + ("data: [DONE]\n\n" if done else "")
        self.sends(text.encode(), status=status, kind=kind)

    def sends(self, body: bytes, *, status: str = "200 OK", kind: str = SSE, headers: str = "") -> None:
        """Answers with this body."""

        async def answer(_: Asked, writer: asyncio.StreamWriter) -> None:
            head = f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\n{headers}Content-Length: {len(body)}\r\n\r\n"
            writer.write(head.encode() + body)

        self.answer = answer


def chunk(*, content: str | None = None, finish: str | None = None, index: int = 0, **rest: object) -> dict:
    """A chunk of a chat's stream."""
    delta = {} if content is None else {"content": content}
    choice = {"index": index, "delta": delta | rest.pop("delta", {}), "finish_reason": finish}
    return {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [choice], **rest}


def usage(prompt: int, completion: int, cached: int = 0) -> dict:
    """The chunk that ends a stream with include_usage."""
    counts = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
    return {"choices": [], "usage": counts | {"prompt_tokens_details": {"cached_tokens": cached}}}


@pytest.fixture
async def server():
    scripted = ScriptedServer()
    listening = await asyncio.start_server(scripted.serve, "127.0.0.1", 0)
    host, port = listening.sockets[0].getsockname()
    scripted.url = f"http://{host}:{port}/v1"
    yield scripted
    listening.close()


@pytest.fixture
async def session():
    async with open_session() as opened:
        yield opened


@pytest.fixture
def upstream(server, session):
    """Makes an upstream in front of the server."""

    def make(*, extensions: bool = False, key: str | None = KEY, timeout_s=10.0, first_byte_timeout_s=10.0, url=None):
        secret = SecretStr(key) if key else None
        dialect = Dialect(extensions)
        endpoint = Endpoint("vendor", url or server.url, secret, timeout_s, first_byte_timeout_s, 8, dialect)
        return OpenAiUpstream(session, endpoint)

    return make


@pytest.fixture
def ask(upstream):
    """Asks and gives all events."""

    async def asked(prompt=HELLO, *, timeout_s=10.0, made=None, **fields):
        call = Generation("their-model", prompt, "acme", **fields)
        async with aclosing((made or upstream()).generate(call, timeout_s=timeout_s)) as events:
            return [event async for event in events]

    return asked
