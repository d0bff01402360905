"""A tiny service on the real frame, run as a process by test_frame.py: `frame_service.py front|back`.

The back answers with what it sees of a request; the front asks the back. The model's name says what to do.
"""

import asyncio
import json
import sys
from collections.abc import AsyncIterator

from pressroom.embedder.v1 import embedder_pb2, embedder_pb2_grpc
from pressroom.generator.v1 import generator_pb2, generator_pb2_grpc

from chassis import context, rpc, telemetry
from chassis.app import App
from chassis.bus import Received
from chassis.errors import Code, PlatformError
from chassis.nats_bus import NatsBus
from chassis.settings import ServiceSettings, load_settings, settings_config
from contracts.subjects import EVENTS_REQUEST_COMPLETED, STREAMS

NEXT_TIMEOUT_S = 30.0


class FrontSettings(ServiceSettings):
    model_config = settings_config("FRONT_")
    back_addr: str


class BackSettings(ServiceSettings):
    model_config = settings_config("BACK_")
    trouble: str = ""


class Back(embedder_pb2_grpc.EmbedderServiceServicer, generator_pb2_grpc.GeneratorServiceServicer):
    def __init__(self, bus: NatsBus) -> None:
        self._bus = bus
        self._num_cancelled = 0

    async def Embed(self, request: embedder_pb2.EmbedRequest, _: object) -> embedder_pb2.EmbedResponse:
        what, _, seconds = request.model.partition(":")
        match what:
            case "fail":
                raise PlatformError(
                    Code.OUT_OF_RANGE,
                    "300 tokens, but 256 are read: cut 44 — bitte",
                    param="input[3]",
                    reason="context_length_exceeded",
                    retry_after_s=2.5,
                )
            case "bug":
                raise KeyError("secret detail")
            case "sleep":
                await asyncio.sleep(float(seconds))
            case "publish":
                await self._bus.publish(EVENTS_REQUEST_COMPLETED, b"", message_id=context.current().request_id)
        seen = {
            "request_id": context.current().request_id,
            "tenant": context.current().tenant,
            "remaining_s": context.current().remaining_s(1e9),
            "trace_id": telemetry.trace_id(),
            "num_cancelled": self._num_cancelled,
        }
        return embedder_pb2.EmbedResponse(model_version=json.dumps(seen))

    async def Generate(
        self, request: generator_pb2.GenerateRequest, _: object
    ) -> AsyncIterator[generator_pb2.GenerateResponse]:
        try:
            for i in range(100_000):
                if request.model == "breaks" and i == 2:
                    raise PlatformError(Code.OVERLOADED, "full", retry_after_s=2.0)
                yield generator_pb2.GenerateResponse(delta=generator_pb2.Delta(text=str(i)))
                await asyncio.sleep(0.01)
        except (asyncio.CancelledError, GeneratorExit):
            self._num_cancelled += 1
            raise


class Front(embedder_pb2_grpc.EmbedderServiceServicer, generator_pb2_grpc.GeneratorServiceServicer):
    def __init__(self, back_addr: str) -> None:
        self.channel = rpc.connect(back_addr)
        self._embedder = embedder_pb2_grpc.EmbedderServiceStub(self.channel)
        self._generator = generator_pb2_grpc.GeneratorServiceStub(self.channel)

    async def Embed(self, request: embedder_pb2.EmbedRequest, _: object) -> embedder_pb2.EmbedResponse:
        async with rpc.call("back.Embed", timeout_s=NEXT_TIMEOUT_S) as call:
            return await self._embedder.Embed(request, timeout=call.timeout_s, metadata=call.metadata)

    async def Generate(
        self, request: generator_pb2.GenerateRequest, _: object
    ) -> AsyncIterator[generator_pb2.GenerateResponse]:
        async with rpc.call("back.Generate", timeout_s=NEXT_TIMEOUT_S) as call:
            stream = self._generator.Generate(request, timeout=call.timeout_s, metadata=call.metadata)
            try:
                async for response in stream:
                    yield response
            finally:
                stream.cancel()


def _add(app: App, servicer: Front | Back) -> None:
    app.add_grpc(
        embedder_pb2_grpc.add_EmbedderServiceServicer_to_server, servicer, "pressroom.embedder.v1.EmbedderService"
    )
    app.add_grpc(
        generator_pb2_grpc.add_GeneratorServiceServicer_to_server, servicer, "pressroom.generator.v1.GeneratorService"
    )


def front() -> int:
    settings = load_settings(FrontSettings)

    async def setup(app: App) -> None:
        servicer = Front(settings.back_addr)
        app.on_close(servicer.channel.close)
        _add(app, servicer)

    return App("front", settings).run(setup)


def back() -> int:
    settings = load_settings(BackSettings)

    async def setup(app: App) -> None:
        if settings.trouble == "setup":
            raise PlatformError(Code.DATA_LOSS, "model.bin: expected sha256 aa, found bb")
        bus = NatsBus.connect(settings.nats_url, "back", STREAMS)
        app.on_close(bus.close)
        app.spawn("records", bus.consume(EVENTS_REQUEST_COMPLETED, durable="back-records", handler=_hear))
        if settings.trouble == "not ready":
            app.ready_when("never", lambda: False)
        if settings.trouble == "task":
            app.spawn("doomed", _doomed())
        if settings.trouble == "deaf":
            app.spawn("deaf", _deaf())
        app.set_queue_depth(lambda: 3)
        _add(app, Back(bus))

    return App("back", settings).run(setup)


async def _hear(_: Received) -> None:
    with telemetry.tracer().start_as_current_span("record stored"):
        await asyncio.sleep(0)


async def _doomed() -> None:
    await asyncio.sleep(0.5)
    raise RuntimeError("background work broke")


async def _deaf() -> None:
    """Drops its first cancellation, as asyncio.wait_for does now and then."""
    try:
        await asyncio.sleep(60)
    except asyncio.CancelledError:
        await asyncio.sleep(60)


if __name__ == "__main__":
    sys.exit(front() if sys.argv[1] == "front" else back())
