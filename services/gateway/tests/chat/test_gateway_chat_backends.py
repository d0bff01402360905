"""One contract for the fakes and for the gRPC clients in front of a real gRPC server."""

import asyncio
from contextlib import aclosing

import grpc.aio
import pytest
from pressroom.common.v1 import common_pb2
from pressroom.embedder.v1 import embedder_pb2, embedder_pb2_grpc
from pressroom.generator.v1 import generator_pb2 as pb
from pressroom.generator.v1 import generator_pb2_grpc
from pressroom.retriever.v1 import retriever_pb2, retriever_pb2_grpc

from chassis import rpc
from chassis.context import RequestContext, use
from chassis.errors import Code, PlatformError
from gateway.backends.embedder import GrpcEmbedder
from gateway.backends.generator import GrpcGenerator
from gateway.backends.retriever import GrpcRetriever
from gateway.core.services import (
    Chat,
    Delta,
    Done,
    Finished,
    Generation,
    Grammar,
    Message,
    Sampling,
    SearchQuery,
    Source,
    Started,
    Stopping,
)
from testkit import eventually

MODEL = "smollm2-135m-instruct"
CHAT = Chat((Message("user", "hello there"),))
REASONS = {"length": pb.FINISH_REASON_LENGTH, "stop": pb.FINISH_REASON_STOP}


class GeneratorServer(generator_pb2_grpc.GeneratorServiceServicer):
    """Puts the fake behind protobuf."""

    def __init__(self, fake) -> None:
        self.fake = fake
        self.requests = []

    async def Generate(self, request, context):
        self.requests.append(request)
        prompt = {
            "chat": lambda: Chat(tuple(Message(m.role, m.content) for m in request.chat.messages)),
            "text": lambda: request.text,
            "token_ids": lambda: tuple(request.token_ids.ids),
        }[request.WhichOneof("prompt")]()
        stop = request.stop
        call = Generation(
            request.model,
            prompt,
            request.tenant,
            n=request.n,
            stopping=Stopping(max_tokens=stop.max_tokens if stop.HasField("max_tokens") else None),
            logprobs=request.logprobs if request.HasField("logprobs") else None,
            grammar=Grammar("json_object") if request.HasField("grammar") else None,
        )
        async with aclosing(self.fake.generate(call, timeout_s=context.time_remaining())) as events:
            async for event in events:
                yield self._wire(event)

    @staticmethod
    def _wire(event):
        match event:
            case Started():
                return pb.GenerateResponse(
                    started=pb.Started(prompt_tokens=event.prompt_tokens, model_version=event.model_version)
                )
            case Delta():
                logprobs = [
                    pb.TokenLogprob(token_id=t.token_id, logprob=t.logprob, text=t.text, token_bytes=t.token_bytes)
                    for t in event.logprobs
                ]
                return pb.GenerateResponse(
                    delta=pb.Delta(
                        index=event.index, text=event.text, token_ids=[1] * event.num_tokens, logprobs=logprobs
                    )
                )
            case Finished():
                return pb.GenerateResponse(finished=pb.Finished(index=event.index, reason=REASONS[event.reason]))
            case Done():
                usage = event.usage
                return pb.GenerateResponse(
                    done=pb.Done(
                        usage=common_pb2.Usage(
                            prompt_tokens=usage.prompt_tokens,
                            completion_tokens=usage.completion_tokens,
                            cached_tokens=usage.cached_tokens,
                        )
                    )
                )

    async def Tokenize(self, request, context):
        prompt = request.text or Chat(tuple(Message(m.role, m.content) for m in request.chat.messages))
        tokenized = await self.fake.tokenize(request.model, prompt, timeout_s=1)
        return pb.TokenizeResponse(token_ids=[1] * tokenized.num_tokens, context_length=tokenized.context_length)

    async def ListModels(self, request, context):
        return pb.ListModelsResponse(
            models=[
                pb.ServedModel(id=m.id, created_unix_s=m.created_unix_s)
                for m in await self.fake.list_models(timeout_s=1)
            ]
        )


class EmbedderServer(embedder_pb2_grpc.EmbedderServiceServicer):
    """Puts the fake behind protobuf."""

    def __init__(self, fake) -> None:
        self.fake = fake

    async def Embed(self, request, context):
        inputs = [i.text if i.WhichOneof("value") == "text" else tuple(i.token_ids.ids) for i in request.inputs]
        embedded = await self.fake.embed(
            request.model, inputs, truncate=request.truncate, dimensions=request.dimensions, timeout_s=1
        )
        return embedder_pb2.EmbedResponse(
            embeddings=[embedder_pb2.Embedding(values=v) for v in embedded.vectors],
            usage=common_pb2.Usage(prompt_tokens=embedded.num_tokens),
        )

    async def Tokenize(self, request, _):
        counts = await self.fake.count_tokens(request.model, request.texts, timeout_s=5)
        return embedder_pb2.TokenizeResponse(
            texts=[embedder_pb2.TokenizedText(token_ids=range(count - 2)) for count in counts], num_special_tokens=2
        )

    async def ListModels(self, request, context):
        return embedder_pb2.ListModelsResponse(
            models=[
                embedder_pb2.ServedEncoder(id=m.id, created_unix_s=m.created_unix_s)
                for m in await self.fake.list_models(timeout_s=1)
            ]
        )


class RetrieverServer(retriever_pb2_grpc.RetrieverServiceServicer):
    """Puts the fake behind protobuf; the tenant comes with the metadata."""

    def __init__(self, fake) -> None:
        self.fake = fake
        self.requests = []

    async def Search(self, request, context):
        tenant = dict(context.invocation_metadata())["x-tenant"]
        self.requests.append((tenant, request))
        query = SearchQuery(
            tenant, request.query, list(request.query_vector), request.collection, request.top_k, request.min_score
        )
        return retriever_pb2.SearchResponse(
            hits=[
                retriever_pb2.Hit(
                    document_id=s.document_id,
                    external_id=s.external_id,
                    chunk_id=s.chunk_id,
                    title=s.title,
                    text=s.text,
                    score=s.score,
                )
                for s in await self.fake.search(query, timeout_s=1)
            ]
        )


@pytest.fixture
async def wired(world):
    """The gRPC clients in front of servers that hold the fakes, and those servers."""
    server = rpc.make_server("backends")
    servicers = GeneratorServer(world.generator), EmbedderServer(world.embedder), RetrieverServer(world.retriever)
    generator_pb2_grpc.add_GeneratorServiceServicer_to_server(servicers[0], server)
    embedder_pb2_grpc.add_EmbedderServiceServicer_to_server(servicers[1], server)
    retriever_pb2_grpc.add_RetrieverServiceServicer_to_server(servicers[2], server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    channel = rpc.connect(f"127.0.0.1:{port}")
    yield GrpcGenerator(channel), GrpcEmbedder(channel), GrpcRetriever(channel), *servicers
    await channel.close()
    await server.stop(None)


@pytest.fixture(params=["fake", "grpc"])
def generator(request, world, wired):
    return world.generator if request.param == "fake" else wired[0]


@pytest.fixture(params=["fake", "grpc"])
def embedder(request, world, wired):
    return world.embedder if request.param == "fake" else wired[1]


@pytest.fixture(params=["fake", "grpc"])
def retriever(request, world, wired):
    return world.retriever if request.param == "fake" else wired[2]


def call(**changes):
    return Generation(
        **{"model": MODEL, "prompt": CHAT, "tenant": "acme", "stopping": Stopping(max_tokens=2)} | changes
    )


async def collect(generator, wanted):
    async with aclosing(generator.generate(wanted, timeout_s=5)) as events:
        return [event async for event in events]


class TestGeneratorContract:
    """What every generator does."""

    @pytest.mark.parametrize("prompt", [CHAT, "hello there", (1, 2)])
    async def test_events_come_in_order_with_the_exact_usage(self, generator, prompt):
        started, *deltas, finished, done = await collect(generator, call(prompt=prompt))
        assert (started.prompt_tokens, started.model_version) == (2, "v1")
        assert [(d.index, d.text, d.num_tokens) for d in deltas] == [(0, "w0", 1), (0, " w1", 1)]
        assert finished == Finished(0, "length")
        assert (done.usage.prompt_tokens, done.usage.completion_tokens, done.usage.cached_tokens) == (2, 2, 1)

    async def test_logprobs_come_where_they_are_asked_for(self, generator):
        with_logprobs = await collect(generator, call(logprobs=0))
        without = await collect(generator, call())
        assert with_logprobs[1].logprobs[0].text == "w0" and with_logprobs[1].logprobs[0].logprob == -0.5
        assert without[1].logprobs == ()

    async def test_closing_stops_the_decoding(self, generator, world):
        world.generator.token_s = 0.02
        async with aclosing(generator.generate(call(stopping=Stopping(max_tokens=50)), timeout_s=5)) as events:
            async for event in events:
                if isinstance(event, Delta):
                    break
        await eventually(lambda: world.generator.num_cancelled == 1, timeout_s=0.3, interval_s=0.01)

    async def test_cancelling_stops_the_decoding(self, generator, world):
        world.generator.token_s = 0.02
        task = asyncio.create_task(collect(generator, call(stopping=Stopping(max_tokens=50))))
        await eventually(lambda: world.generator.calls)
        task.cancel()
        await asyncio.wait({task})
        await eventually(lambda: world.generator.num_cancelled == 1, timeout_s=0.3, interval_s=0.01)

    @pytest.mark.parametrize(
        ("changes", "code", "reason"),
        [
            ({"model": "gpt-9"}, Code.NOT_FOUND, "model_not_found"),
            ({"stopping": Stopping(max_tokens=500)}, Code.OUT_OF_RANGE, "context_length_exceeded"),
            ({"grammar": Grammar("json_object")}, Code.UNIMPLEMENTED, None),
        ],
    )
    async def test_refusals_keep_their_meaning(self, generator, changes, code, reason):
        with pytest.raises(PlatformError) as caught:
            await collect(generator, call(**changes))
        assert (caught.value.code, caught.value.reason) == (code, reason)

    async def test_tokenize_and_models(self, generator):
        tokenized = await generator.tokenize(MODEL, CHAT, timeout_s=5)
        assert (tokenized.num_tokens, tokenized.context_length) == (2, 64)
        assert [model.id for model in await generator.list_models(timeout_s=5)] == [MODEL]


class TestEmbedderContract:
    """What every embedder does."""

    async def test_vectors_come_in_order(self, embedder):
        embedded = await embedder.embed("all-minilm-l6-v2", ["a b", "c"], truncate=False, dimensions=0, timeout_s=5)
        assert [list(vector) for vector in embedded.vectors] == [[0.25, 0.5, -0.25], [0.125, 0.5, -0.25]]
        assert embedded.num_tokens == 3

    async def test_token_ids_and_dimensions(self, embedder):
        embedded = await embedder.embed("all-minilm-l6-v2", [(1, 2)], truncate=False, dimensions=1, timeout_s=5)
        assert [list(vector) for vector in embedded.vectors] == [[0.25]]

    async def test_tokens_are_counted_with_the_special_ones(self, embedder):
        counts = await embedder.count_tokens("all-minilm-l6-v2", ["a b c", "c d"], timeout_s=5)
        assert list(counts) == [3, 2]

    async def test_too_long_is_refused_or_cut(self, embedder):
        long = ["x " * 20]
        with pytest.raises(PlatformError) as caught:
            await embedder.embed("all-minilm-l6-v2", long, truncate=False, dimensions=0, timeout_s=5)
        assert (caught.value.code, caught.value.param) == (Code.OUT_OF_RANGE, "input")
        assert await embedder.embed("all-minilm-l6-v2", long, truncate=True, dimensions=0, timeout_s=5)

    async def test_models(self, embedder):
        assert [model.id for model in await embedder.list_models(timeout_s=5)] == ["all-minilm-l6-v2"]


class TestRetrieverContract:
    """What every retriever does."""

    async def test_sources_come_as_they_are(self, retriever, world):
        world.retriever.sources = [Source("d", "e", "c", "t", "x", 0.5)]
        with use(RequestContext("r", "acme")):
            found = await retriever.search(SearchQuery("acme", "q", [0.5], "default", 3, 0.25), timeout_s=5)
        assert list(found) == world.retriever.sources
        (query,) = world.retriever.queries
        assert (query.tenant, query.collection, query.top_k, query.min_score) == ("acme", "default", 3, 0.25)


async def test_every_field_of_a_generation_is_sent(wired):
    sampling = Sampling(0.5, 0.75, 3, 0.125, 0.25, -0.5, 1.5, {7: 2.0}, 9)
    stopping = Stopping(2, 1, ("x",), True, (5,))
    asked = call(sampling=sampling, stopping=stopping, n=2, logprobs=1, prompt_logprobs=0, priority=-2)
    await collect(wired[0], asked)
    (sent,) = wired[3].requests
    assert (sent.sampling.temperature, sent.sampling.top_p, sent.sampling.top_k) == (0.5, 0.75, 3)
    assert (sent.sampling.min_p, sent.sampling.frequency_penalty) == (0.125, 0.25)
    assert (sent.sampling.presence_penalty, sent.sampling.repetition_penalty) == (-0.5, 1.5)
    assert dict(sent.sampling.logit_bias) == {7: 2.0} and sent.sampling.seed == 9
    assert (sent.stop.max_tokens, sent.stop.min_tokens, list(sent.stop.stop)) == (2, 1, ["x"])
    assert sent.stop.ignore_eos and list(sent.stop.stop_token_ids) == [5] and sent.n == 2 and sent.logprobs == 1
    assert sent.HasField("prompt_logprobs") and sent.cache_salt == sent.tenant == "acme"
    assert (sent.priority, sent.adapter) == (-2, "")


async def test_adapter_is_sent_beside_its_base(wired, world):
    world.generator.adapters.add("m:a")
    with pytest.raises(PlatformError):  # the server's fake reads no adapter; what counts is what it was sent
        await collect(wired[0], call(model="m", adapter="m:a"))
    assert (wired[3].requests[0].model, wired[3].requests[0].adapter) == ("m", "m:a")


async def test_absent_fields_stay_absent(wired):
    await collect(wired[0], call(stopping=Stopping()))
    (sent,) = wired[3].requests
    for field in ("temperature", "top_p", "repetition_penalty", "seed"):
        assert not sent.sampling.HasField(field)
    assert not sent.stop.HasField("max_tokens") and not sent.HasField("logprobs")


async def test_a_server_that_is_away_is_unavailable():
    channel = rpc.connect("127.0.0.1:1")
    try:
        with pytest.raises(PlatformError) as caught:
            await collect(GrpcGenerator(channel), call())
        assert caught.value.code is Code.UNAVAILABLE and caught.value.retry_after_s
    finally:
        await channel.close()


async def test_a_stream_that_ends_without_done_is_an_error():
    class Halting(generator_pb2_grpc.GeneratorServiceServicer):
        async def Generate(self, request, context):
            yield pb.GenerateResponse(started=pb.Started(prompt_tokens=1))

    server = grpc.aio.server()
    generator_pb2_grpc.add_GeneratorServiceServicer_to_server(Halting(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    channel = rpc.connect(f"127.0.0.1:{port}")
    try:
        with pytest.raises(PlatformError, match="too early"):
            await collect(GrpcGenerator(channel), call())
    finally:
        await channel.close()
        await server.stop(None)
