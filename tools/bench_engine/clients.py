"""The two clients, twins of each other: chat over HTTP for peers and gateway, the generator's own gRPC for ours."""

import asyncio
import contextlib
import json
import time
import urllib.parse
from collections.abc import Iterator, Sequence
from typing import Any

import grpc
from pressroom.common.v1 import common_pb2
from pressroom.generator.v1 import generator_pb2 as pb
from pressroom.generator.v1 import generator_pb2_grpc

from bench_engine.answers import Answer
from chassis import rpc

ANSWER_TIMEOUT_S = 300.0
_MAX_LINE_BYTES = 1 << 20


class HttpClient:
    """Streamed chat completions over HTTP/1.1, greedy, to the last token; a connection for each request.

    The standard library alone, so that it weighs the same on whatever answers.
    """

    def __init__(self, base_url: str, model: str, key: str = "none") -> None:
        """base_url ends in /v1."""
        parts = urllib.parse.urlsplit(base_url)
        self._host, self._port = parts.hostname or "127.0.0.1", parts.port or 80
        self._path, self._model, self._key = parts.path.rstrip("/"), model, key

    async def ask(self, prompt: str, max_tokens: int) -> Answer:
        """Never raises for what the other side does: the answer carries the error."""
        answer = Answer(time.perf_counter())
        try:
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                await self._exchange(prompt, max_tokens, answer)
        except (OSError, ValueError, IndexError) as error:
            answer.error = repr(error)
        return answer

    async def _exchange(self, prompt: str, max_tokens: int, answer: Answer) -> None:
        reader, writer = await asyncio.open_connection(self._host, self._port, limit=_MAX_LINE_BYTES)
        try:
            writer.write(self._request(prompt, max_tokens))
            await writer.drain()
            status = int((await reader.readline()).split()[1])
            if status != 200:
                answer.error = f"{status} {(await reader.read(2000))[-300:]!r}"
                return
            while line := await reader.readline():
                if line.startswith(b"data:"):
                    payload = line[5:].strip()
                    if payload == b"[DONE]":
                        return
                    _take(json.loads(payload), answer)
            answer.error = "the stream ended without [DONE]"
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    def _request(self, prompt: str, max_tokens: int) -> bytes:
        body = json.dumps(
            {
                "model": self._model,
                "messages": [{"role": "user", "content": prompt}],
                "max_tokens": max_tokens,
                "temperature": 0,
                "ignore_eos": True,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
        ).encode()
        head = (
            f"POST {self._path}/chat/completions HTTP/1.1\r\nHost: {self._host}:{self._port}\r\n"
            f"Content-Type: application/json\r\nAuthorization: Bearer {self._key}\r\nConnection: close\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        )
        return head.encode() + body


def _take(event: dict[str, Any], answer: Answer) -> None:
    if "error" in event:
        answer.error = str(event["error"])[:300]
    if usage := event.get("usage"):
        answer.prompt_tokens = usage["prompt_tokens"]
        answer.completion_tokens = usage["completion_tokens"]
        answer.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    for choice in event.get("choices") or ():
        if text := (choice.get("delta") or {}).get("content"):
            answer.stamps.append(time.perf_counter())
            answer.text += text


class GrpcClient:
    """The generator's Generate, with the same request; on one channel, as the gateway has it. Closed by the caller."""

    def __init__(self, address: str, model: str) -> None:
        self._channel = rpc.connect(address)
        self.stub = generator_pb2_grpc.GeneratorServiceStub(self._channel)
        self._model = model

    async def ask(self, prompt: str, max_tokens: int) -> Answer:
        """Greedy, to the last token. Never raises for what the other side does: the answer carries the error."""
        return await self.generate(self.request(prompt, max_tokens))

    def request(
        self, prompt: str | Sequence[int], max_tokens: int, *, ignore_eos: bool = True, salt: str = "bench"
    ) -> pb.GenerateRequest:
        """A greedy request for one chat turn, or for token ids as they are."""
        request = pb.GenerateRequest(
            model=self._model,
            sampling=pb.SamplingParams(temperature=0),
            stop=pb.StopParams(max_tokens=max_tokens, ignore_eos=ignore_eos),
            tenant=salt,
            cache_salt=salt,
        )
        if isinstance(prompt, str):
            request.chat.CopyFrom(self._chat(prompt))
        else:
            request.token_ids.CopyFrom(common_pb2.TokenIds(ids=prompt))
        return request

    async def generate(self, request: pb.GenerateRequest) -> Answer:
        """Runs a request to its end."""
        answer = Answer(time.perf_counter())
        with _errors_kept(answer):
            async for message in self.stub.Generate(request, timeout=ANSWER_TIMEOUT_S):
                read(message, answer)
        return answer

    async def token_ids(self, prompt: str) -> list[int]:
        """The ids of one chat turn, as the generator renders it."""
        response = await self.stub.Tokenize(pb.TokenizeRequest(model=self._model, chat=self._chat(prompt)), timeout=30)
        return list(response.token_ids)

    async def stats(self) -> pb.GetStatsResponse:
        """Its load."""
        stats: pb.GetStatsResponse = await self.stub.GetStats(pb.GetStatsRequest(), timeout=30)
        return stats

    async def close(self) -> None:
        """Closes the channel."""
        await self._channel.close()

    @staticmethod
    def _chat(prompt: str) -> pb.ChatPrompt:
        return pb.ChatPrompt(messages=[pb.ChatMessage(role="user", content=prompt)])


def read(message: pb.GenerateResponse, answer: Answer) -> None:
    """Adds one message of the stream to the answer."""
    match message.WhichOneof("event"):
        case "delta":
            answer.token_ids += message.delta.token_ids
            if message.delta.text:
                answer.stamps.append(time.perf_counter())
                answer.text += message.delta.text
        case "done":
            usage = message.done.usage
            answer.prompt_tokens, answer.completion_tokens = usage.prompt_tokens, usage.completion_tokens
            answer.cached_tokens = usage.cached_tokens


@contextlib.contextmanager
def _errors_kept(answer: Answer) -> Iterator[None]:
    try:
        yield
    except grpc.aio.AioRpcError as error:
        answer.error = f"{error.code().name}: {error.details()}"
