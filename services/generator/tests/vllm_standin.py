"""A small server that speaks vLLM's shapes over the toy runner: what vLLM 0.32 says, without its gigabytes.

It computes one token of every stream in turn, holds blocks while it does, and frees them when a client leaves. What a
test wants to go wrong is set on it.
"""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import lora_files
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from generator.backends.toy import EOS, ToyAdapter, ToyRunner
from generator.core.adapters import AdapterFiles
from generator.core.blocks import BlockManager
from generator.core.requests import GenerationRequest, SamplingParams, StopParams
from generator.core.sequences import Sampled, Sequence, TokenLogprob, Work

BLOCK_SIZE = 4
NUM_BLOCKS = 2000
LOADABLE = b"tensors"


@dataclass
class StandIn:
    """The server's state, and the faults that it is asked for."""

    name: str = "toy-served"
    context_length: int = 256
    api_key: str = ""
    url: str = ""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    adapters: dict[str, ToyAdapter] = field(default_factory=dict)
    is_healthy: bool = True
    returns_token_ids: bool = True
    miscounts: bool = False
    breaks_after: int | None = None  # tokens of a stream
    is_silent: bool = False
    finish: str = ""  # ends a stream after its first token

    def __post_init__(self) -> None:
        self.runner = ToyRunner(NUM_BLOCKS, BLOCK_SIZE, self.context_length)
        self.blocks = BlockManager(NUM_BLOCKS, BLOCK_SIZE)

    def app(self) -> Starlette:
        return Starlette(
            routes=[
                Route("/health", self._health),
                Route("/metrics", self._metrics),
                Route("/v1/models", self._models),
                Route("/v1/completions", self._complete, methods=["POST"]),
                Route("/v1/load_lora_adapter", self._load, methods=["POST"]),
                Route("/v1/unload_lora_adapter", self._unload, methods=["POST"]),
            ]
        )

    async def _health(self, request: Request) -> Response:
        return Response(status_code=200 if self.is_healthy else 503)

    async def _metrics(self, request: Request) -> Response:
        share = self.blocks.num_used / NUM_BLOCKS
        labels = f'engine="0",model_name="{self.name}"'
        return PlainTextResponse(
            f"# HELP vllm:kv_cache_usage_perc KV-cache usage. 1 means 100 percent usage.\n"
            f"vllm:kv_cache_usage_perc{{{labels}}} {share}\n"
            f"vllm:num_preemptions_total{{{labels}}} 3.0\n"
            f'vllm:cache_config_info{{block_size="4",engine="0",num_gpu_blocks="{NUM_BLOCKS}"}} 1.0\n'
        )

    async def _models(self, request: Request) -> Response:
        if self.api_key and request.headers.get("authorization") != f"Bearer {self.api_key}":
            return JSONResponse({"error": "Unauthorized"}, 401)
        base = {"id": self.name, "object": "model", "max_model_len": self.context_length, "parent": None}
        adapters = [{"id": name, "object": "model", "parent": self.name} for name in self.adapters]
        return JSONResponse({"object": "list", "data": [base, *adapters]})

    async def _load(self, request: Request) -> Response:
        body = await request.json()
        path = Path(body["lora_path"])
        if not (path / "adapter_config.json").exists():
            return _refusal(404, f"No adapter found for {path}", "NotFoundError")
        tensors = (path / "adapter_model.safetensors").read_bytes()
        files = AdapterFiles(lora_files.spec("a", tensors), b"{}", tensors)
        self.adapters[body["lora_name"]] = self.runner.read_adapter(files)
        return PlainTextResponse(f"Success: LoRA adapter '{body['lora_name']}' added successfully.")

    async def _unload(self, request: Request) -> Response:
        body = await request.json()
        if self.adapters.pop(body["lora_name"], None) is None:
            return _refusal(404, "The lora adapter cannot be found.", "NotFoundError")
        return PlainTextResponse("Success")

    async def _complete(self, request: Request) -> Response:
        body = await request.json()
        if body["model"] not in (self.name, *self.adapters):
            return _refusal(404, f"The model `{body['model']}` does not exist.", "NotFoundError")
        self.bodies.append(body)
        if body.get("stream"):
            return StreamingResponse(self._stream(body), media_type="text/event-stream")
        pieces = [piece async for piece in self._tokens(body)]
        sampled = [token for tokens, _, _ in pieces for token in tokens]
        choice = {
            "index": 0,
            "text": "",
            "finish_reason": pieces[-1][1],
            "logprobs": None,
            "token_ids": [token.token_id for token in sampled] if self.returns_token_ids else None,
            "prompt_logprobs": self._prompt_logprobs(body),
        }
        return JSONResponse({"choices": [choice], "usage": _usage(body, len(sampled))})

    async def _stream(self, body: dict[str, Any]) -> AsyncIterator[str]:
        num_tokens = 0
        async with contextlib.aclosing(self._tokens(body)) as pieces:
            async for tokens, finish, _ in pieces:
                if self.is_silent:
                    await asyncio.sleep(3600)
                if self.breaks_after is not None and num_tokens >= self.breaks_after:
                    raise RuntimeError("the stand-in breaks a stream, as it was asked")
                num_tokens += len(tokens)
                choice = {
                    "index": 0,
                    "text": "x",
                    "finish_reason": finish or None,
                    "token_ids": [token.token_id for token in tokens],
                    "logprobs": _logprobs(tokens) if body.get("logprobs") is not None else None,
                }
                yield _event({"choices": [choice], "usage": _usage(body, num_tokens)})
        yield _event({"choices": [], "usage": _usage(body, num_tokens + self.miscounts)})
        yield "data: [DONE]\n\n"

    async def _tokens(self, body: dict[str, Any]) -> AsyncIterator[tuple[list[Sampled], str, Sequence]]:
        """Yields what vLLM sends: two tokens at a time now and then, the last with the reason of the end."""
        sequence = self._sequence(body)
        ends = set(body.get("stop_token_ids", ())) | (set() if body.get("ignore_eos") else {EOS})
        try:
            while True:
                await asyncio.sleep(0.001)
                tokens = [self._step(sequence)]
                finish = self._finish(sequence, tokens[-1].token_id, ends)
                if not finish and sequence.num_new % 5 == 0:
                    tokens.append(self._step(sequence))
                    finish = self._finish(sequence, tokens[-1].token_id, ends)
                yield tokens, finish, sequence
                if finish:
                    return
        finally:
            self.blocks.release(sequence.table)

    def _finish(self, sequence: Sequence, token_id: int, ends: set[int]) -> str:
        if token_id in ends:
            return "stop"
        return self.finish or ("length" if sequence.num_new >= sequence.max_new_tokens else "")

    def _step(self, sequence: Sequence) -> Sampled:
        assert self.blocks.grow(sequence.table, len(sequence.token_ids))
        work = Work(sequence, len(sequence.token_ids) - sequence.num_computed)
        (outcome,) = self.runner.execute([work])
        (token,) = outcome.tokens
        sequence.num_computed = work.end
        sequence.prompt_logprobs += outcome.prompt_logprobs
        sequence.token_ids.append(token.token_id)
        return token

    def _sequence(self, body: dict[str, Any]) -> Sequence:
        names = ("temperature", "top_p", "top_k", "min_p", "frequency_penalty", "presence_penalty")
        sampling = SamplingParams(**{name: body[name] for name in (*names, "repetition_penalty") if name in body})
        bias = {int(token_id): value for token_id, value in body.get("logit_bias", {}).items()}
        request = GenerationRequest(
            "vllm",
            tuple(body["prompt"]),
            replace(sampling, logit_bias=bias),
            StopParams(max_tokens=body["max_tokens"], min_tokens=body.get("min_tokens", 0)),
            logprobs=body.get("logprobs"),
            prompt_logprobs=body.get("prompt_logprobs"),
        )
        suppressed = tuple(body.get("stop_token_ids", ())) if request.stop.min_tokens else ()
        adapter = self.adapters.get(body["model"])
        return Sequence(request, 0, 0, body.get("seed", 0), body["max_tokens"], suppressed, adapter)

    def _prompt_logprobs(self, body: dict[str, Any]) -> list[Any] | None:
        if body.get("prompt_logprobs") is None:
            return None
        sequence = self._sequence(body)
        self._step(sequence)
        self.blocks.release(sequence.table)
        return [None, *(_by_id(score) for score in sequence.prompt_logprobs)]


def _by_id(score: TokenLogprob) -> dict[str, Any]:
    entries = {score.token_id: score.logprob, **dict(score.top)}
    return {str(token_id): {"logprob": value, "rank": 1, "decoded_token": "?"} for token_id, value in entries.items()}


def _logprobs(tokens: list[Sampled]) -> dict[str, Any]:
    scores = [token.logprob for token in tokens]
    assert all(score is not None for score in scores)
    return {
        "text_offset": [0] * len(tokens),
        "tokens": [f"token_id:{token.token_id}" for token in tokens],
        "token_logprobs": [score.logprob for score in scores if score is not None],
        "top_logprobs": [
            {f"token_id:{token_id}": value for token_id, value in (*score.top, (score.token_id, score.logprob))}
            for score in scores
            if score is not None
        ],
    }


def _usage(body: dict[str, Any], num_tokens: int) -> dict[str, Any]:
    num_prompt = len(body["prompt"])
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_tokens,
        "total_tokens": num_prompt + num_tokens,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


def _event(message: dict[str, Any]) -> str:
    return f"data: {json.dumps(message)}\n\n"


def _refusal(status: int, message: str, kind: str) -> Response:
    return JSONResponse({"error": {"message": message, "type": kind, "param": None, "code": status}}, status)


@contextlib.asynccontextmanager
async def serving(standin: StandIn, port: int = 0) -> AsyncIterator[StandIn]:
    """Serves a stand-in on the running loop, on a free port or the given one."""
    config = uvicorn.Config(
        standin.app(), host="127.0.0.1", port=port, log_config=None, timeout_graceful_shutdown=1, lifespan="off"
    )
    server = uvicorn.Server(config)
    server.install_signal_handlers = lambda: None  # type: ignore[attr-defined,method-assign]
    server.capture_signals = contextlib.nullcontext  # type: ignore[assignment,method-assign]
    task = asyncio.create_task(server.serve())
    while not server.started:
        assert not task.done(), task.exception()
        await asyncio.sleep(0.01)
    standin.url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    try:
        yield standin
    finally:
        server.should_exit = server.force_exit = True
        await task
