"""A real gRPC server and client in one process: what must cross the wire does."""

import asyncio
import time
from collections.abc import AsyncIterator

import grpc
import pytest
from pressroom.embedder.v1 import embedder_pb2, embedder_pb2_grpc
from pressroom.generator.v1 import generator_pb2, generator_pb2_grpc

from chassis import context, rpc
from chassis.errors import Code, PlatformError


class _Embedder(embedder_pb2_grpc.EmbedderServiceServicer):
    seen: context.RequestContext

    async def Embed(self, request: embedder_pb2.EmbedRequest, _: object) -> embedder_pb2.EmbedResponse:
        self.seen = context.current()
        if request.model == "long":
            raise PlatformError(Code.OUT_OF_RANGE, "300 > 256", param="input", reason="context_length_exceeded")
        if request.model == "bug":
            raise KeyError("secret detail")
        if request.model.startswith("unknown"):
            raise PlatformError(Code.NOT_FOUND, request.model)
        if request.model == "slow":
            await asyncio.sleep(30)
        return embedder_pb2.EmbedResponse(model_version="v")


class _Generator(generator_pb2_grpc.GeneratorServiceServicer):
    def __init__(self) -> None:
        self.cancelled = asyncio.Event()

    async def Generate(
        self, request: generator_pb2.GenerateRequest, _: object
    ) -> AsyncIterator[generator_pb2.GenerateResponse]:
        try:
            for i in range(1000):
                if i == 3 and request.model == "breaks":
                    raise PlatformError(Code.OVERLOADED, "full", retry_after_s=2.0)
                yield generator_pb2.GenerateResponse(delta=generator_pb2.Delta(text=str(i)))
                await asyncio.sleep(0.005)
        except (asyncio.CancelledError, GeneratorExit):  # the latter where the cancel came while a message was sent
            self.cancelled.set()
            raise


@pytest.fixture
async def served() -> AsyncIterator[tuple[_Embedder, _Generator, grpc.aio.Channel]]:
    server, embedder, generator = rpc.make_server("test"), _Embedder(), _Generator()
    embedder_pb2_grpc.add_EmbedderServiceServicer_to_server(embedder, server)
    generator_pb2_grpc.add_GeneratorServiceServicer_to_server(generator, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with rpc.connect(f"127.0.0.1:{port}") as channel:
        yield embedder, generator, channel
    await server.stop(0)


async def _embed(channel: grpc.aio.Channel, model: str, timeout_s: float = 5) -> embedder_pb2.EmbedResponse:
    stub = embedder_pb2_grpc.EmbedderServiceStub(channel)
    async with rpc.call("embedder.Embed", timeout_s=timeout_s) as call:
        return await stub.Embed(embedder_pb2.EmbedRequest(model=model), timeout=call.timeout_s, metadata=call.metadata)


async def test_request_id_tenant_and_deadline_cross(served: tuple[_Embedder, _Generator, grpc.aio.Channel]) -> None:
    embedder, _, channel = served
    with context.use(context.RequestContext("req_9", "acme", time.monotonic() + 2.0)):
        await _embed(channel, "m", timeout_s=60)
    assert (embedder.seen.request_id, embedder.seen.tenant) == ("req_9", "acme")
    assert 0 < embedder.seen.remaining_s(60) < 10  # of the context, not of the call; gRPC rounds a timeout up


async def test_an_error_crosses_unchanged(served: tuple[_Embedder, _Generator, grpc.aio.Channel]) -> None:
    with pytest.raises(PlatformError) as caught:
        await _embed(served[2], "long")
    error = caught.value
    assert (error.code, error.message, error.param) == (Code.OUT_OF_RANGE, "300 > 256", "input")
    assert error.reason == "context_length_exceeded"


async def test_an_unexpected_exception_shows_no_internals(
    served: tuple[_Embedder, _Generator, grpc.aio.Channel],
) -> None:
    with pytest.raises(PlatformError) as caught:
        await _embed(served[2], "bug")
    assert caught.value.code is Code.INTERNAL and "secret" not in caught.value.message


@pytest.mark.parametrize("name", ["x" * 30_000, "\U0001f99c" * 3_000])
async def test_a_long_message_does_not_hide_its_error(
    served: tuple[_Embedder, _Generator, grpc.aio.Channel], name: str
) -> None:
    with pytest.raises(PlatformError, match=f"^unknown {name[:50]}") as caught:
        await _embed(served[2], f"unknown {name}")
    assert caught.value.code is Code.NOT_FOUND


async def test_a_late_answer_is_deadline_exceeded(served: tuple[_Embedder, _Generator, grpc.aio.Channel]) -> None:
    with pytest.raises(PlatformError) as caught:
        await _embed(served[2], "slow", timeout_s=0.2)
    assert caught.value.code is Code.DEADLINE_EXCEEDED


async def test_no_time_left_fails_before_the_call(served: tuple[_Embedder, _Generator, grpc.aio.Channel]) -> None:
    with (
        context.use(context.RequestContext("r", "t", time.monotonic() - 1)),
        pytest.raises(PlatformError, match="no time was left"),
    ):
        await _embed(served[2], "m")


async def test_an_absent_server_is_unavailable_and_retryable() -> None:
    async with rpc.connect("127.0.0.1:1") as channel:
        with pytest.raises(PlatformError) as caught:
            await _embed(channel, "m")
    assert caught.value.code is Code.UNAVAILABLE and caught.value.retryable


async def test_a_stream_that_breaks_raises_after_its_first_messages(
    served: tuple[_Embedder, _Generator, grpc.aio.Channel],
) -> None:
    stub, texts = generator_pb2_grpc.GeneratorServiceStub(served[2]), []
    with pytest.raises(PlatformError) as caught:
        async with rpc.call("generator.Generate", timeout_s=5) as call:
            request = generator_pb2.GenerateRequest(model="breaks")
            async for message in stub.Generate(request, timeout=call.timeout_s, metadata=call.metadata):
                texts.append(message.delta.text)
    assert texts == ["0", "1", "2"] and caught.value.code is Code.OVERLOADED and caught.value.retry_after_s == 2.0


async def test_leaving_a_stream_cancels_the_handler(served: tuple[_Embedder, _Generator, grpc.aio.Channel]) -> None:
    stub = generator_pb2_grpc.GeneratorServiceStub(served[2])
    async with rpc.call("generator.Generate", timeout_s=5) as call:
        stream = stub.Generate(generator_pb2.GenerateRequest(), timeout=call.timeout_s, metadata=call.metadata)
        async for _ in stream:
            break
        stream.cancel()
    await asyncio.wait_for(served[1].cancelled.wait(), 2)
