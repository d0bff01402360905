"""The servicer through a real gRPC server, on the toy engine."""

import asyncio
import math
import time
from collections.abc import AsyncIterator

import grpc
import pytest
from pressroom.common.v1 import common_pb2
from pressroom.events.v1 import events_pb2
from pressroom.generator.v1 import generator_pb2 as pb
from pressroom.generator.v1 import generator_pb2_grpc

from chassis import rpc
from chassis.bus import Received
from chassis.errors import Code, PlatformError
from generator.api import consumers
from generator.api.grpc import GeneratorServicer
from generator.backends.toy import ByteTokenizer, ToyRunner
from generator.core.batching import BatchingEngine
from generator.core.blocks import BlockManager
from generator.core.library import AdapterLibrary
from generator.core.scheduler import SchedulerLimits
from testkit import eventually

Stub = generator_pb2_grpc.GeneratorServiceStub


@pytest.fixture
async def engine() -> AsyncIterator[BatchingEngine]:
    engine = BatchingEngine(ToyRunner(2000, 4, 4096), ByteTokenizer(), BlockManager(2000, 4), SchedulerLimits())
    engine.start()
    yield engine
    await engine.close()


@pytest.fixture
async def stub(engine: BatchingEngine) -> AsyncIterator[Stub]:
    server = rpc.make_server("generator")
    servicer = GeneratorServicer(engine, AdapterLibrary(engine, None), ByteTokenizer())
    generator_pb2_grpc.add_GeneratorServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with rpc.connect(f"127.0.0.1:{port}") as channel:
        yield Stub(channel)
    await server.stop(0)


def _request(**fields: object) -> pb.GenerateRequest:
    fields.setdefault("text", "Set the type.")
    fields.setdefault("sampling", pb.SamplingParams(temperature=0))
    fields.setdefault("stop", pb.StopParams(max_tokens=10, ignore_eos=True))
    return pb.GenerateRequest(model="toy", **fields)  # type: ignore[arg-type]


async def _generate(stub: Stub, request: pb.GenerateRequest) -> list[pb.GenerateResponse]:
    async with rpc.call("generator.Generate", timeout_s=10) as call:
        return [message async for message in stub.Generate(request, timeout=call.timeout_s, metadata=call.metadata)]


async def _refusal(stub: Stub, request: pb.GenerateRequest) -> PlatformError:
    with pytest.raises(PlatformError) as raised:
        await _generate(stub, request)
    return raised.value


async def test_a_stream_begins_with_started_and_ends_with_exact_usage(stub: Stub) -> None:
    messages = await _generate(stub, _request())
    kinds = [message.WhichOneof("event") for message in messages]
    assert kinds[0] == "started" and kinds[-2:] == ["finished", "done"] and set(kinds[1:-2]) == {"delta"}
    assert messages[0].started.prompt_tokens == 13 and messages[0].started.model_version == "0" * 12
    assert sum(len(m.delta.token_ids) for m in messages) == 10
    assert messages[-2].finished.reason == pb.FINISH_REASON_LENGTH
    assert messages[-1].done.usage == common_pb2.Usage(prompt_tokens=13, completion_tokens=10)


async def test_text_chat_and_token_ids_are_prompts(stub: Stub) -> None:
    chat = pb.ChatPrompt(messages=[pb.ChatMessage(role="user", content="ink")])
    ids = (await stub.Tokenize(pb.TokenizeRequest(model="toy", chat=chat))).token_ids
    from_chat = await _generate(stub, _request(text=None, chat=chat))
    from_ids = await _generate(stub, _request(text=None, token_ids=common_pb2.TokenIds(ids=ids)))
    assert "".join(m.delta.text for m in from_chat) == "".join(m.delta.text for m in from_ids) != ""
    assert from_chat[0].started.prompt_tokens == len(ids)


async def test_logprobs_carry_text_and_bytes(stub: Stub) -> None:
    messages = await _generate(stub, _request(logprobs=2, prompt_logprobs=1))
    first, *rest = messages[0].started.prompt_logprobs
    assert math.isnan(first.logprob) and first.text == "S" and len(rest) == 12 and len(rest[0].top) == 1
    sampled = [logprob for m in messages for logprob in m.delta.logprobs]
    assert len(sampled) == 10 and all(len(lp.top) == 2 for lp in sampled)
    assert [lp.token_bytes[0] for lp in sampled] == [t for m in messages for t in m.delta.token_ids]


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({"text": None}, Code.INVALID_ARGUMENT, "prompt"),
        ({"text": ""}, Code.INVALID_ARGUMENT, "prompt"),
        ({"text": "x" * 5000}, Code.OUT_OF_RANGE, "prompt"),
        ({"text": "x" * 4096}, Code.OUT_OF_RANGE, "prompt"),
        # Its length is looked at before its tokens.
        ({"text": None, "token_ids": common_pb2.TokenIds(ids=[300] * 5000)}, Code.OUT_OF_RANGE, "prompt"),
        ({"text": None, "chat": pb.ChatPrompt()}, Code.INVALID_ARGUMENT, "messages"),
        (
            {"text": None, "chat": pb.ChatPrompt(messages=[pb.ChatMessage(role="boss")])},
            Code.INVALID_ARGUMENT,
            "messages[0].role",
        ),
        ({"sampling": pb.SamplingParams(temperature=math.nan)}, Code.INVALID_ARGUMENT, "temperature"),
        ({"sampling": pb.SamplingParams(logit_bias={300: 1})}, Code.INVALID_ARGUMENT, "logit_bias"),
        ({"stop": pb.StopParams(stop=["x"] * 1000)}, Code.INVALID_ARGUMENT, "stop"),
        ({"stop": pb.StopParams(max_tokens=0)}, Code.INVALID_ARGUMENT, "max_tokens"),
        ({"n": 17}, Code.INVALID_ARGUMENT, "n"),
        ({"grammar": pb.Grammar(json_object=True)}, Code.UNIMPLEMENTED, "grammar"),
        ({"adapter": "toy:mine"}, Code.NOT_FOUND, "model"),
    ],
)
async def test_bad_requests_are_refused_with_code_and_field(
    stub: Stub, fields: dict[str, object], code: Code, param: str
) -> None:
    error = await _refusal(stub, _request(**fields))
    assert (error.code, error.param) == (code, param)


async def test_an_unknown_model_is_not_found(stub: Stub) -> None:
    error = await _refusal(stub, pb.GenerateRequest(model="gpt-9", text="x"))
    assert (error.code, error.reason) == (Code.NOT_FOUND, "model_not_found")


async def test_a_client_that_leaves_frees_the_blocks(stub: Stub, engine: BatchingEngine) -> None:
    call = stub.Generate(_request(stop=pb.StopParams(max_tokens=4000, ignore_eos=True)))
    await call.read()
    assert engine.stats().running_sequences == 1
    call.cancel()
    await eventually(lambda: engine.stats().blocks_used == 0, timeout_s=5)
    assert 0 < engine.stats().completion_tokens_total < 4000


async def test_the_calls_deadline_ends_the_request(stub: Stub, engine: BatchingEngine) -> None:
    call = stub.Generate(_request(stop=pb.StopParams(max_tokens=4000, ignore_eos=True)), timeout=0.3)
    try:  # whoever is first: the engine says it in the stream, gRPC by the status
        messages = [message async for message in call]
        assert messages[-2].finished.reason == pb.FINISH_REASON_DEADLINE
    except grpc.aio.AioRpcError as error:
        assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await eventually(lambda: engine.stats().blocks_used == 0, timeout_s=5)


async def test_a_deadline_in_the_request_is_a_finish_reason(stub: Stub) -> None:
    messages = await _generate(stub, _request(deadline_unix_ms=int(time.time() * 1000) - 1))
    assert [m.finished.reason for m in messages if m.HasField("finished")] == [pb.FINISH_REASON_DEADLINE]


async def test_a_cancel_from_the_bus_ends_the_stream(stub: Stub, engine: BatchingEngine) -> None:
    request = _request(stop=pb.StopParams(max_tokens=4000, ignore_eos=True))
    call = stub.Generate(request, metadata=[("x-request-id", "req_9")])
    events = aiter(call)
    await anext(events)
    cancel = consumers.make_cancel_handler(engine)
    await cancel(Received("s", events_pb2.RequestCancel(id="req_9").SerializeToString(), "m", 1, {}))
    messages = [message async for message in events]
    assert messages[-2].finished.reason == pb.FINISH_REASON_CANCELLED
    assert 0 < messages[-1].done.usage.completion_tokens < 4000


async def test_a_cancel_that_cannot_be_read_does_no_harm(engine: BatchingEngine) -> None:
    await consumers.make_cancel_handler(engine)(Received("s", b"\xff\xff", "m", 1, {}))


async def test_the_base_is_listed_and_tokenized_for(stub: Stub) -> None:
    (model,) = (await stub.ListModels(pb.ListModelsRequest())).models
    assert (model.id, model.base, model.context_length) == ("toy", "toy", 4096)
    assert {"lora", "prompt_logprobs"} <= set(model.capabilities)
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await stub.Tokenize(pb.TokenizeRequest(model="toy:none", text="x"))
    assert raised.value.code() is grpc.StatusCode.NOT_FOUND


async def test_stats_count_tokens(stub: Stub) -> None:
    await asyncio.gather(*(_generate(stub, _request()) for _ in range(4)))
    stats = await stub.GetStats(pb.GetStatsRequest())
    assert (stats.prompt_tokens_total, stats.completion_tokens_total) == (52, 40)
    assert (stats.blocks_total, stats.running_sequences) == (2000, 0)
