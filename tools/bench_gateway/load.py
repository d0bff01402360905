"""A closed loop of streamed chats at one door. Raw asyncio, so that it weighs little and the same on every peer."""

import asyncio
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from urllib.parse import urlsplit

_TIMEOUT_S = 60.0
_END = b"data: [DONE]"
_LAST_CHUNK = b"0\r\n\r\n"


@dataclass(frozen=True, slots=True)
class Target:
    """Where chats are sent."""

    base_url: str  # ends in /v1
    model: str
    key: str


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer; an error is what stood in the way of it."""

    ttft_s: float
    usage: tuple[int, int] | None  # prompt and completion tokens
    error: str = ""


@dataclass(slots=True)
class Run:
    """A closed loop's answers."""

    answers: list[Answer] = field(default_factory=list)
    wall_s: float = 0.0

    @property
    def whole(self) -> list[Answer]:
        """Those that came to their end."""
        return [answer for answer in self.answers if not answer.error]


class Client:
    """Sends chats to one target; keeps connections open between requests where it is told to."""

    def __init__(self, target: Target, *, keeps_alive: bool = False) -> None:
        url = urlsplit(target.base_url)
        assert url.hostname and url.port
        self._host, self._port = url.hostname, url.port
        self._keeps_alive = keeps_alive
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []
        body = json.dumps(
            {
                "model": target.model,
                "messages": [{"role": "user", "content": "Write on about this: the press room keeps a calm hand."}],
                "max_tokens": 64,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
        ).encode()
        self._request = (
            f"POST {url.path}/chat/completions HTTP/1.1\r\nHost: {url.netloc}\r\nContent-Type: application/json\r\n"
            f"Authorization: Bearer {target.key}\r\nConnection: {'keep-alive' if keeps_alive else 'close'}\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        ).encode() + body

    async def ask(self, on_first: Callable[[], None] = lambda: None) -> Answer:
        """One chat, to its last byte; on_first is called when its first text has come."""
        try:
            async with asyncio.timeout(_TIMEOUT_S):
                return await self._ask(on_first)
        except (OSError, ValueError, asyncio.IncompleteReadError) as error:
            return Answer(0.0, None, repr(error) or "failed")

    async def _ask(self, on_first: Callable[[], None]) -> Answer:
        started_s = time.perf_counter()
        reader, writer = await self._connection()
        is_whole = False
        try:
            writer.write(self._request)
            received, ttft_s = b"", 0.0
            while not (_END in received and received.endswith(_LAST_CHUNK)):
                piece = await reader.read(65536)
                if not piece:
                    break
                received += piece
                if not ttft_s and _has_text(received):
                    ttft_s = time.perf_counter() - started_s
                    on_first()
            is_whole = _END in received
        finally:
            if is_whole and self._keeps_alive:
                self._idle.append((reader, writer))
            else:
                writer.close()
        if not is_whole or not ttft_s:
            return Answer(0.0, None, received[:200].decode(errors="replace") or "closed without an answer")
        return Answer(ttft_s, _usage(received))

    async def _connection(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        while self._idle:
            reader, writer = self._idle.pop()
            if not reader.at_eof():
                return reader, writer
            writer.close()
        return await asyncio.open_connection(self._host, self._port)

    def close(self) -> None:
        """Closes what is kept open."""
        for _, writer in self._idle:
            writer.close()


def _events(received: bytes) -> list[dict[str, Any]]:
    lines = (line[5:].strip() for line in received.split(b"\n")[:-1] if line.startswith(b"data:"))
    return [json.loads(line) for line in lines if line.startswith(b"{")]


def _has_text(received: bytes) -> bool:
    return b'"content"' in received and any(
        choice.get("delta", {}).get("content") for event in _events(received) for choice in event.get("choices", ())
    )


def _usage(received: bytes) -> tuple[int, int] | None:
    told = [event["usage"] for event in _events(received[-4096:]) if event.get("usage")]
    return (told[-1]["prompt_tokens"], told[-1]["completion_tokens"]) if told else None


async def closed_loop(client: Client, *, num_streams: int, num_requests: int) -> Run:
    """num_streams at a time, until num_requests were answered."""
    run, left = Run(), iter(range(num_requests))

    async def stream() -> None:
        for _ in left:
            run.answers.append(await client.ask())

    began_s = time.perf_counter()
    await asyncio.gather(*(stream() for _ in range(num_streams)))
    run.wall_s = time.perf_counter() - began_s
    return run


async def while_idle(client: Client, *, num_streams: int, measure: Callable[[], float]) -> tuple[float, int]:
    """Opens so many streams, measures when all have said something and stand still, and leaves them.

    Returns what was measured and how many streams stood.
    """
    begun: set[int] = set()
    tasks = [asyncio.create_task(client.ask(partial(begun.add, number))) for number in range(num_streams)]
    try:
        for _ in range(int(_TIMEOUT_S * 5)):
            await asyncio.sleep(0.2)
            if len(begun) == num_streams or all(task.done() for task in tasks):
                break
        return measure(), sum(number in begun and not task.done() for number, task in enumerate(tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
