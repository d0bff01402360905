"""gRPC: pressroom.generator.v1 over one engine and its adapters."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Protocol

from pressroom.generator.v1 import generator_pb2 as pb
from pressroom.generator.v1 import generator_pb2_grpc

from chassis import context
from chassis.errors import Code, PlatformError
from generator.api import accounting, wire
from generator.api.grammars import GrammarDesk
from generator.api.metering import EngineMeter, StepTotals
from generator.core import requests
from generator.core.adapters import not_loaded
from generator.core.engine import Engine
from generator.core.events import Summary
from generator.core.library import AdapterLibrary, AdapterOrder
from generator.core.stream import TokenStream
from generator.core.text import Tokenizer
from generator.core.usage import Usage, UsageBook, UsageCall

_ROLES = frozenset({"system", "user", "assistant", "tool"})


class RpcContext(Protocol):
    """What is used of grpc.aio's servicer context."""

    def time_remaining(self) -> float | None: ...

    def add_done_callback(self, callback: Callable[[object], None]) -> None: ...


class GeneratorServicer(generator_pb2_grpc.GeneratorServiceServicer):
    """The service of the proto over one engine, its adapters and its tokenizer."""

    def __init__(
        self,
        engine: Engine,
        library: AdapterLibrary,
        tokenizer: Tokenizer,
        meter: EngineMeter | None = None,
        grammars: GrammarDesk | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`grammars` compiles for an engine that wants them compiled."""
        self._engine = engine
        self._library = library
        self._tokenizer = tokenizer
        self._grammars = grammars
        self._meter = meter
        self._clock = clock
        self._usage = UsageBook()

    async def Generate(self, request: pb.GenerateRequest, rpc: RpcContext) -> AsyncIterator[pb.GenerateResponse]:
        call = self._usage.begin(request.usage_id)  # before anything is awaited: who closes the id must find the call
        try:
            asked, stream = await self._submit(request, rpc, call)
        except BaseException:
            call.end(Usage())
            raise
        call.runs(stream.cancel)
        # Whatever way the call ends, this runs at once; a generator's `finally` may wait for its finaliser.
        rpc.add_done_callback(lambda _: stream.cancel())
        async for event in stream:
            yield wire.write_event(event, asked, self._tokenizer)

    async def _submit(
        self, request: pb.GenerateRequest, rpc: RpcContext, call: UsageCall
    ) -> tuple[requests.GenerationRequest, TokenStream]:
        """Hands the request to the engine, which tells its end to the metrics and to the call."""
        adapter = self._adapter(request.model, request.adapter)
        deadline_s = self._deadline(request, rpc)
        prompt_ids = await self._prompt_ids(request)
        asked = wire.read_request(request, prompt_ids, adapter, context.current().request_id, deadline_s)
        if asked.grammar is not None and self._grammars is not None:
            asked = replace(asked, compiled=await self._grammars.compile(asked.grammar))
        model_id = adapter or self._engine.model.id
        if adapter:
            requests.check(asked, self._engine.model)  # before anything is loaded for its sake
            await self._library.ensure(adapter, deadline_s)

        def settle(summary: Summary) -> None:
            accounting.settle(summary, model_id, adapter)
            call.end(Usage.of(summary))

        return asked, self._engine.submit(asked, settle)

    async def CloseUsage(self, request: pb.CloseUsageRequest, rpc: RpcContext) -> pb.CloseUsageResponse:
        if not request.usage_id:
            raise PlatformError(Code.INVALID_ARGUMENT, "usage_id must not be empty", param="usage_id")
        num_calls, usage = await self._usage.close(request.usage_id)
        return pb.CloseUsageResponse(instance=self._usage.instance, num_calls=num_calls, usage=wire.write_usage(usage))

    async def Tokenize(self, request: pb.TokenizeRequest, rpc: RpcContext) -> pb.TokenizeResponse:
        self._adapter(request.model)
        token_ids = await self._prompt_ids(request)
        return pb.TokenizeResponse(token_ids=token_ids, context_length=self._engine.model.context_length)

    async def ListModels(self, request: pb.ListModelsRequest, rpc: RpcContext) -> pb.ListModelsResponse:
        model = self._engine.model
        adapters = [wire.write_adapter(adapter, model) for adapter in self._library.specs()]
        return pb.ListModelsResponse(models=[wire.write_model(model), *adapters])

    async def GetStats(self, request: pb.GetStatsRequest, rpc: RpcContext) -> pb.GetStatsResponse:
        steps = self._meter.totals if self._meter else StepTotals()
        return wire.write_stats(self._engine.stats(), steps, len(self._library.specs()))

    async def LoadAdapter(self, request: pb.LoadAdapterRequest, rpc: RpcContext) -> pb.LoadAdapterResponse:
        self._check_lora()
        for name in ("adapter", "path", "manifest_sha256"):
            if not getattr(request, name):
                raise PlatformError(Code.INVALID_ARGUMENT, f"{name} must not be empty", param=name)
        order = AdapterOrder(request.adapter, request.path, request.manifest_sha256)
        adapter = await self._library.load(order)
        return pb.LoadAdapterResponse(model=wire.write_adapter(adapter, self._engine.model))

    async def UnloadAdapter(self, request: pb.UnloadAdapterRequest, rpc: RpcContext) -> pb.UnloadAdapterResponse:
        self._check_lora()
        await self._library.unload(request.adapter)
        accounting.forget(request.adapter)
        return pb.UnloadAdapterResponse()

    def _check_lora(self) -> None:
        if "lora" not in self._engine.model.capabilities:
            raise PlatformError(Code.UNIMPLEMENTED, "this engine does not support adapters", reason="unsupported")

    def _adapter(self, model_id: str, adapter_id: str = "") -> str:
        """Returns the adapter that is meant, "" for the base. It may be named as model, as adapter or as both."""
        served = self._engine.model.id
        if model_id not in (served, adapter_id) or model_id == "":
            if adapter_id or self._library.get(model_id) is None:
                message = f"model {model_id!r} is not served here; {served!r} is"
                raise PlatformError(Code.NOT_FOUND, message, param="model", reason="model_not_found")
            return model_id
        if adapter_id in ("", served):
            return ""
        if self._library.get(adapter_id) is None:
            raise not_loaded(adapter_id)
        return adapter_id

    def _deadline(self, request: pb.GenerateRequest, rpc: RpcContext) -> float | None:
        """The earlier of the call's own deadline and the one in the request, in Unix seconds."""
        remaining_s = rpc.time_remaining()
        deadlines = [] if remaining_s is None else [self._clock() + remaining_s]
        if request.deadline_unix_ms:
            deadlines.append(request.deadline_unix_ms / 1000)
        return min(deadlines, default=None)

    async def _prompt_ids(self, request: pb.GenerateRequest | pb.TokenizeRequest) -> list[int]:
        """Tokenizes the prompt on a thread: a long one takes longer than the event loop may be held."""
        match request.WhichOneof("prompt"):
            case "text":
                self._check_size(request.text)
                return await asyncio.to_thread(self._tokenizer.encode, request.text)
            case "chat":
                messages = wire.read_messages(request.chat)
                if not messages:
                    raise PlatformError(Code.INVALID_ARGUMENT, "messages must not be empty", param="messages")
                for number, message in enumerate(messages):
                    if message.role not in _ROLES:
                        param = f"messages[{number}].role"
                        raise PlatformError(Code.INVALID_ARGUMENT, f"{message.role!r} is not a role", param=param)
                self._check_size(*(message.content for message in messages))
                return await asyncio.to_thread(self._tokenizer.encode_chat, messages, request.chat.tools_json)
            case "token_ids" if isinstance(request, pb.GenerateRequest):
                num_ids = len(request.token_ids.ids)
                if num_ids > self._engine.model.context_length:  # before millions of them are copied and looked at
                    most = request.stop.max_tokens if request.stop.HasField("max_tokens") else None
                    raise requests.context_overflow(self._engine.model, num_ids, most)
                return list(request.token_ids.ids)
        raise PlatformError(Code.INVALID_ARGUMENT, "the request has no prompt", param="prompt")

    def _check_size(self, *texts: str) -> None:
        """Refuses a text that cannot fit before the tokenizer spends seconds on it."""
        size_bytes = sum(len(text.encode()) for text in texts)
        least = size_bytes // self._tokenizer.max_token_bytes
        if least > self._engine.model.context_length:
            raise requests.context_overflow(self._engine.model, least, None, at_least=True)
