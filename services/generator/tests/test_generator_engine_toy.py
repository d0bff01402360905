"""The batching engine over the toy runner: the contract, and what only a runner that misbehaves can show."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable

import lora_files
import pytest
from engine_suite import PROMPTS, EngineSuite, MakeAdapter, ask, collect

from chassis.errors import Code, PlatformError
from generator.backends.toy import ByteTokenizer, ToyRunner
from generator.core.adapters import AdapterFiles, AdapterLimits
from generator.core.batching import BatchingEngine
from generator.core.blocks import BlockManager
from generator.core.engine import OutOfMemory
from generator.core.events import FinishReason, Summary
from generator.core.requests import StopParams
from generator.core.scheduler import SchedulerLimits
from generator.core.sequences import Outcome, Work
from testkit import eventually

BLOCK_SIZE = 4
CONTEXT = 256


def make_engine(
    runner: ToyRunner | None = None,
    num_blocks: int = 400,
    adapter_limits: AdapterLimits = AdapterLimits(),
    stopwatch: Callable[[], float] = time.perf_counter,
    **limits: int,
) -> BatchingEngine:
    engine = BatchingEngine(
        runner or ToyRunner(num_blocks, BLOCK_SIZE, CONTEXT),
        ByteTokenizer(),
        BlockManager(num_blocks, BLOCK_SIZE),
        SchedulerLimits(**limits),
        adapter_limits,
        stopwatch=stopwatch,
    )
    engine.start()
    return engine


def toy_adapter(adapter_id: str, seed: int) -> AdapterFiles:
    content = f"weights {seed}".encode()
    return AdapterFiles(lora_files.spec(adapter_id, content), b"{}", content)


class SlowRunner(ToyRunner):
    """Takes as long for a step as a fast model would: a toy ends before anybody can cancel it."""

    def execute(self, step: list[Work]) -> list[Outcome]:
        time.sleep(0.0005)
        return super().execute(step)


class TestToyEngine(EngineSuite):
    @pytest.fixture
    def make_adapter(self) -> MakeAdapter:
        return toy_adapter

    @pytest.fixture
    async def engine(self) -> AsyncIterator[BatchingEngine]:
        engine = make_engine(SlowRunner(400, BLOCK_SIZE, CONTEXT))
        yield engine
        await engine.close()


async def test_preempted_sequences_resume_with_the_same_tokens() -> None:
    roomy, tight = make_engine(), make_engine(num_blocks=65)
    requests = [ask(p, 100) for p in PROMPTS]
    expected = [(await collect(roomy, request)).tokens[0] for request in requests]
    found = await asyncio.gather(*(collect(tight, request) for request in requests))
    assert [f.tokens[0] for f in found] == expected
    assert tight.stats().preemptions_total > 0 and tight.stats().blocks_used == 0
    await roomy.close()
    await tight.close()


async def test_text_follows_the_tokens_and_stops_at_a_stop_string() -> None:
    engine = make_engine()
    text = (await collect(engine, ask(most=60))).texts[0]
    stop = text[20:23]
    got = await collect(engine, ask(stop=StopParams(max_tokens=60, stop=(stop,), ignore_eos=True)))
    assert got.texts[0] == text[: text.index(stop)] and got.reasons[0] is FinishReason.STOP
    await engine.close()


async def test_a_reader_that_lags_gets_everything() -> None:
    engine = make_engine()
    expected = (await collect(engine, ask(most=80))).texts[0]
    settled: list[Summary] = []
    stream = engine.submit(ask(most=80), settled.append)
    await eventually(lambda: settled)
    events = [event async for event in stream]
    assert "".join(getattr(event, "text", "") for event in events) == expected
    assert len(events) == 4  # started, one merged delta, finished, done
    await engine.close()


class GatedRunner(ToyRunner):
    """Computes nothing before its gate is open."""

    def __init__(self) -> None:
        super().__init__(400, BLOCK_SIZE, CONTEXT)
        self.gate = threading.Event()

    def execute(self, step: list[Work]) -> list[Outcome]:
        assert self.gate.wait(10)
        return super().execute(step)


async def test_a_full_queue_refuses_and_the_rest_ends() -> None:
    runner = GatedRunner()
    engine = make_engine(runner, max_running=1, max_waiting=2)
    tasks = [asyncio.create_task(collect(engine, ask()))]
    await eventually(lambda: engine.stats().running_sequences == 1)
    tasks += [asyncio.create_task(collect(engine, ask())) for _ in range(2)]
    await eventually(lambda: engine.stats().waiting_sequences == 2)
    with pytest.raises(PlatformError) as raised:
        engine.submit(ask(), lambda _: None)
    assert raised.value.code is Code.OVERLOADED
    runner.gate.set()
    assert all(got.reasons[0] is FinishReason.LENGTH for got in await asyncio.gather(*tasks))
    await engine.close()


async def test_a_request_cancelled_in_the_queue_never_runs() -> None:
    runner = GatedRunner()
    engine = make_engine(runner, max_running=1)
    running = asyncio.create_task(collect(engine, ask()))
    await eventually(lambda: engine.stats().running_sequences == 1)
    waiting = asyncio.create_task(collect(engine, ask(request_id="waits")))
    await eventually(lambda: engine.stats().waiting_sequences == 1)
    engine.cancel("waits")
    runner.gate.set()
    got = await waiting
    assert got.reasons[0] is FinishReason.CANCELLED and got.settled[0].admitted_s is None
    assert (await running).reasons[0] is FinishReason.LENGTH
    await engine.close()


class BrokenRunner(ToyRunner):
    """Raises what it is told when a step has a prompt that begins with 13."""

    def __init__(self, error: Exception) -> None:
        super().__init__(400, BLOCK_SIZE, CONTEXT)
        self._error = error

    def execute(self, step: list[Work]) -> list[Outcome]:
        if any(work.sequence.token_ids[0] == 13 for work in step):
            raise self._error
        return super().execute(step)


async def test_out_of_memory_is_the_error_of_the_request_that_asked_for_most() -> None:
    engine = make_engine(BrokenRunner(OutOfMemory("no room")))
    other = asyncio.create_task(collect(engine, ask(most=200)))
    with pytest.raises(PlatformError) as raised:
        await collect(engine, ask((13,) * 50))
    assert (raised.value.code, raised.value.reason) == (Code.OVERLOADED, "out_of_memory")
    assert (await other).reasons[0] is FinishReason.LENGTH
    assert engine.stats().blocks_used == 0
    await engine.close()


async def test_a_crash_ends_every_stream_and_is_told() -> None:
    engine = make_engine(BrokenRunner(ValueError("shapes")))
    watching = asyncio.create_task(engine.watch())
    other = asyncio.create_task(collect(engine, ask(most=250)))
    for request in (collect(engine, ask((13, 1))), other):
        with pytest.raises(PlatformError) as raised:
            await asyncio.wait_for(request, 10)
        assert raised.value.code is Code.INTERNAL
    with pytest.raises(RuntimeError):
        await asyncio.wait_for(watching, 10)
    with pytest.raises(PlatformError):
        engine.submit(ask(), lambda _: None)
    await engine.close()


def test_memory_for_less_than_one_context_is_refused() -> None:
    with pytest.raises(PlatformError, match="kv_cache_mb"):
        BatchingEngine(ToyRunner(8, 4, 64), ByteTokenizer(), BlockManager(8, 4), SchedulerLimits())
