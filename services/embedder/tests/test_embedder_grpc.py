"""The servicer through a real gRPC server, on the fake encoder."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import numpy as np
import pytest
from embedder_suite import FakeEncoder
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from pressroom.common.v1 import common_pb2
from pressroom.embedder.v1 import embedder_pb2 as pb
from pressroom.embedder.v1 import embedder_pb2_grpc

from chassis import rpc, telemetry
from chassis.errors import Code, PlatformError
from embedder.api.grpc import EmbedderServicer
from embedder.core.batcher import Batcher, BatchLimits, BatchRun
from embedder.core.service import Embedded, EmbedderCore
from testkit import eventually


@asynccontextmanager
async def _served(
    encoder: FakeEncoder, batcher: Batcher
) -> AsyncIterator[tuple[embedder_pb2_grpc.EmbedderServiceStub, Batcher]]:
    task = asyncio.create_task(batcher.run())
    server = rpc.make_server("embedder")
    servicer = EmbedderServicer(EmbedderCore(encoder, batcher))
    embedder_pb2_grpc.add_EmbedderServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with rpc.connect(f"127.0.0.1:{port}") as channel:
        yield embedder_pb2_grpc.EmbedderServiceStub(channel), batcher
    await server.stop(0)
    task.cancel()


@pytest.fixture
async def stub() -> AsyncIterator[embedder_pb2_grpc.EmbedderServiceStub]:
    encoder = FakeEncoder()

    async def compute(batch: list[list[int]]):  # type: ignore[no-untyped-def]
        return encoder.encode(batch)

    async with _served(encoder, Batcher(compute, BatchLimits(8, 512, 0.001, 4096))) as (stub, _):
        yield stub


def _texts(*texts: str) -> list[pb.EmbedInput]:
    return [pb.EmbedInput(text=t) for t in texts]


async def test_texts_and_their_token_ids_embed_alike(stub: embedder_pb2_grpc.EmbedderServiceStub) -> None:
    tokens = (await stub.Tokenize(pb.TokenizeRequest(texts=["ink dries"]))).texts[0]
    ids = pb.EmbedInput(token_ids=common_pb2.TokenIds(ids=tokens.token_ids))
    answer = await stub.Embed(pb.EmbedRequest(model="fake", inputs=[*_texts("ink dries"), ids]))
    assert list(answer.embeddings[0].values) == pytest.approx(list(answer.embeddings[1].values), abs=1e-5)
    assert answer.usage.prompt_tokens == 8 and [e.num_tokens for e in answer.embeddings] == [4, 4]


async def test_the_trace_shows_each_run_of_the_encoder_with_its_batch_size(
    stub: embedder_pb2_grpc.EmbedderServiceStub, monkeypatch: pytest.MonkeyPatch
) -> None:
    spans = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(spans))
    monkeypatch.setattr(telemetry, "tracer", lambda: provider.get_tracer("test"))
    await stub.Embed(pb.EmbedRequest(inputs=_texts("ink", "dries", "here")))
    run, batch = spans.get_finished_spans()[:2]
    assert (run.name, dict(run.attributes or {})) == ("encoder.run", {"batch_size": 3})
    assert batch.name == "embedder.batch" and run.parent is not None
    assert run.parent.span_id == batch.context.span_id  # type: ignore[union-attr]
    assert batch.start_time <= run.start_time <= run.end_time <= batch.end_time  # type: ignore[operator]


async def test_a_client_that_leaves_is_not_computed_for() -> None:
    encoder = FakeEncoder()
    release = asyncio.Event()

    async def compute(batch: list[list[int]]):  # type: ignore[no-untyped-def]
        await release.wait()
        return encoder.encode(batch)

    async with _served(encoder, Batcher(compute, BatchLimits(8, 512, 0.001, 4096))) as (stub, batcher):
        leaver = stub.Embed(pb.EmbedRequest(inputs=_texts(*["ink"] * 64)))
        await eventually(lambda: batcher.depth == 56)  # the first batch is being computed
        leaver.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leaver
        stayer = stub.Embed(pb.EmbedRequest(inputs=_texts("stays")))
        await eventually(lambda: batcher.depth == 57)
        release.set()
        assert len((await stayer).embeddings) == 1
    assert [len(batch) for batch in encoder.batches] == [8, 1]


class _InstantCore:
    """Everything is embedded at once; only the answer remains to be written."""

    info = FakeEncoder().info

    def check_model(self, _: str) -> None: ...

    def token_ids(self, *_: object) -> list[int]:
        return [1]

    async def embed(self, token_lists: list[list[int]], _: int) -> list[Embedded]:
        run = BatchRun(len(token_lists), 1, 2)
        return [Embedded(np.ones(384, dtype=np.float32), 3, run) for _ in token_lists]


async def test_a_large_answer_is_not_written_on_the_event_loop() -> None:
    request = pb.EmbedRequest(inputs=_texts(*["ink"] * 2048))
    embedding = asyncio.create_task(EmbedderServicer(_InstantCore()).Embed(request, object()))  # type: ignore[arg-type]
    num_turns = 0
    while not embedding.done():
        await asyncio.sleep(0)
        num_turns += 1
    answer = await embedding
    assert len(answer.embeddings) == 2048 and answer.usage.prompt_tokens == 3 * 2048
    # Turns that only the thread leaves time for: the request's own steps take a handful.
    assert num_turns > 20


async def test_list_models_tells_the_encoder(stub: embedder_pb2_grpc.EmbedderServiceStub) -> None:
    (model,) = (await stub.ListModels(pb.ListModelsRequest())).models
    assert (model.id, model.dimensions, model.max_tokens) == ("fake", 16, 32)


@pytest.mark.parametrize(
    ("request_", "code", "param"),
    [
        (pb.EmbedRequest(), Code.INVALID_ARGUMENT, "input"),
        (pb.EmbedRequest(inputs=_texts("x"), model="other"), Code.NOT_FOUND, "model"),
        (pb.EmbedRequest(inputs=_texts("x"), dimensions=99), Code.INVALID_ARGUMENT, "dimensions"),
        (pb.EmbedRequest(inputs=_texts("x", "w " * 99)), Code.OUT_OF_RANGE, "input"),
        (pb.EmbedRequest(inputs=_texts(*["x"] * 2049)), Code.INVALID_ARGUMENT, "input"),
        (pb.EmbedRequest(inputs=[pb.EmbedInput()]), Code.INVALID_ARGUMENT, "input"),
        (pb.EmbedRequest(inputs=_texts(*["x" * 450_000] * 9)), Code.PAYLOAD_TOO_LARGE, "input"),
        (pb.EmbedRequest(inputs=_texts("x" * 500_001)), Code.OUT_OF_RANGE, "input"),
    ],
)
async def test_bad_requests_are_named(
    stub: embedder_pb2_grpc.EmbedderServiceStub, request_: pb.EmbedRequest, code: Code, param: str
) -> None:
    with pytest.raises(PlatformError) as caught:
        async with rpc.call("embedder.Embed", timeout_s=5) as call:
            await stub.Embed(request_, timeout=call.timeout_s, metadata=call.metadata)
    assert caught.value.code is code and caught.value.param == param


async def test_rerank_is_not_implemented(stub: embedder_pb2_grpc.EmbedderServiceStub) -> None:
    with pytest.raises(PlatformError) as caught:
        async with rpc.call("embedder.Rerank", timeout_s=5) as call:
            await stub.Rerank(pb.RerankRequest(query="q", texts=["t"]), metadata=call.metadata)
    assert caught.value.code is Code.UNIMPLEMENTED
