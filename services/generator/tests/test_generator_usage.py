"""What a call used can be asked for under its usage id, whatever way the call ended, and the answer is final."""

import asyncio
from collections.abc import AsyncIterator

import grpc
import pytest
from pressroom.common.v1 import common_pb2
from pressroom.generator.v1 import generator_pb2 as pb
from pressroom.generator.v1 import generator_pb2_grpc
from prometheus_client import REGISTRY

from chassis import rpc
from chassis.errors import Code, PlatformError
from generator.api.grpc import GeneratorServicer
from generator.backends.toy import ByteTokenizer, ToyRunner
from generator.core.batching import BatchingEngine
from generator.core.blocks import BlockManager
from generator.core.library import AdapterLibrary
from generator.core.scheduler import SchedulerLimits
from generator.core.usage import Usage, UsageBook
from testkit import eventually

Stub = generator_pb2_grpc.GeneratorServiceStub


@pytest.fixture
async def engine() -> AsyncIterator[BatchingEngine]:
    limits = SchedulerLimits(max_running=4)
    engine = BatchingEngine(ToyRunner(4000, 4, 4096), ByteTokenizer(), BlockManager(4000, 4), limits)
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


def _request(usage_id: str, max_tokens: int = 10, **fields: object) -> pb.GenerateRequest:
    return pb.GenerateRequest(
        model="toy",
        text="Set the type.",
        sampling=pb.SamplingParams(temperature=0),
        stop=pb.StopParams(max_tokens=max_tokens, ignore_eos=True),
        usage_id=usage_id,
        **fields,  # type: ignore[arg-type]
    )


async def _close(stub: Stub, usage_id: str) -> pb.CloseUsageResponse:
    return await stub.CloseUsage(pb.CloseUsageRequest(usage_id=usage_id), timeout=10)


def _counted() -> dict[str, float]:
    kinds = ("prompt", "completion")
    labels = {"service": "generator", "model": "toy"}
    return {k: REGISTRY.get_sample_value("pressroom_tokens_total", labels | {"kind": k}) or 0.0 for k in kinds}


async def test_what_ended_by_itself_is_told_as_in_its_last_event(stub: Stub) -> None:
    events = [event async for event in stub.Generate(_request("a"))]
    answer = await _close(stub, "a")
    assert answer.usage == events[-1].done.usage == common_pb2.Usage(prompt_tokens=13, completion_tokens=10)
    assert answer.num_calls == 1 and answer.instance


async def test_calls_under_one_id_are_added_up(stub: Stub) -> None:
    async def drain(usage_id: str) -> None:
        async for _ in stub.Generate(_request(usage_id)):
            pass

    await asyncio.gather(drain("b"), drain("b"), drain("c"))
    answer = await _close(stub, "b")
    assert (answer.num_calls, answer.usage.prompt_tokens, answer.usage.completion_tokens) == (2, 26, 20)


async def test_streams_that_are_left_at_random_moments_add_up_to_the_counters(stub: Stub) -> None:
    before = _counted()

    async def leave(number: int) -> None:
        stream = stub.Generate(_request(f"left{number}", max_tokens=400))
        events = 0
        async for _ in stream:
            events += 1
            if events > number % 7:
                break
        stream.cancel()

    await asyncio.gather(*(leave(number) for number in range(24)))
    answers = [await _close(stub, f"left{number}") for number in range(24)]
    after = _counted()
    assert sum(a.usage.completion_tokens for a in answers) == after["completion"] - before["completion"] > 0
    assert sum(a.usage.prompt_tokens for a in answers) == after["prompt"] - before["prompt"]
    assert all(a.num_calls == 1 for a in answers)


async def test_closing_ends_what_runs_and_refuses_what_comes_later(stub: Stub, engine: BatchingEngine) -> None:
    stream = aiter(stub.Generate(_request("d", max_tokens=4000)))
    await anext(stream)
    answer = await _close(stub, "d")
    assert 0 < answer.usage.completion_tokens < 4000 and answer.usage.prompt_tokens == 13
    *_, last = [event async for event in stream]
    assert last.done.usage == answer.usage
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        async for _ in stub.Generate(_request("d")):
            pass
    assert refused.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert (await _close(stub, "d")).usage == answer.usage
    assert engine.stats().running_sequences == 0


async def test_what_never_was_admitted_used_nothing_and_says_so_in_its_last_event(stub: Stub) -> None:
    running = [stub.Generate(_request(f"e{i}", max_tokens=4000)) for i in range(4)]
    for stream in running:
        await anext(aiter(stream))
    waiting = asyncio.create_task(_events(stub, "late"))
    await eventually(lambda: _waits(stub))
    answer = await _close(stub, "late")
    assert answer.num_calls == 1 and answer.usage == common_pb2.Usage()
    assert (await waiting)[-1].done.usage == common_pb2.Usage()
    for stream in running:
        stream.cancel()


async def _events(stub: Stub, usage_id: str) -> list[pb.GenerateResponse]:
    return [event async for event in stub.Generate(_request(usage_id))]


async def _waits(stub: Stub) -> bool:
    return bool((await stub.GetStats(pb.GetStatsRequest(), timeout=10)).waiting_sequences)


async def test_an_id_that_is_closed_before_its_call_comes_lets_nothing_run(stub: Stub) -> None:
    before = _counted()
    assert (await _close(stub, "early")).num_calls == 0
    with pytest.raises(grpc.aio.AioRpcError):
        async for _ in stub.Generate(_request("early")):
            pass
    assert _counted() == before


async def test_refused_calls_used_nothing(stub: Stub) -> None:
    with pytest.raises(grpc.aio.AioRpcError):
        async for _ in stub.Generate(_request("f", max_tokens=10_000)):
            pass
    answer = await _close(stub, "f")
    assert answer.num_calls == 1 and answer.usage == common_pb2.Usage()


async def test_an_empty_id_cannot_be_closed(stub: Stub) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await _close(stub, "")
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_the_book_is_bounded_in_number_and_time() -> None:
    now = [0.0]
    book = UsageBook(max_kept=3, kept_s=10.0, clock=lambda: now[0])
    for number in range(5):
        book.begin(f"u{number}").end(Usage(1, 1, 0))
    assert len(book) == 3
    now[0] = 11.0
    book.begin("last").end(Usage())
    assert len(book) == 1


async def test_a_call_that_runs_is_never_forgotten() -> None:
    book = UsageBook(max_kept=1, kept_s=10.0)
    call = book.begin("kept")
    for number in range(5):
        book.begin(f"u{number}").end(Usage())
    call.end(Usage(3, 4, 1))
    assert await book.close("kept") == (1, Usage(3, 4, 1))


async def test_a_call_that_is_not_running_yet_is_cancelled_when_it_does() -> None:
    book = UsageBook()
    call = book.begin("g")
    closing = asyncio.ensure_future(book.close("g"))
    await asyncio.sleep(0)
    cancelled: list[bool] = []
    call.runs(lambda: cancelled.append(True))
    assert cancelled and not closing.done()
    call.end(Usage(1, 0, 0))
    assert await closing == (1, Usage(1, 0, 0))


async def test_a_closed_id_raises_for_calls_that_come_later() -> None:
    book = UsageBook()
    await book.close("h")
    with pytest.raises(PlatformError) as refused:
        book.begin("h")
    assert refused.value.code is Code.FAILED_PRECONDITION
