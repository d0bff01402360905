"""Requests that do not run to their end: a cancel frees within one step, and a thousand of them leave nothing."""

import asyncio
import random
import threading
from collections import Counter
from collections.abc import AsyncIterator

import lora_files
import pytest
from engine_suite import ask, collect

from chassis.errors import PlatformError
from generator.backends.toy import ByteTokenizer, ToyRunner
from generator.core.adapters import AdapterFiles
from generator.core.batching import BatchingEngine
from generator.core.blocks import BlockManager
from generator.core.events import Delta, Finished, FinishReason, Summary
from generator.core.requests import GenerationRequest, SamplingParams, StopParams
from generator.core.scheduler import SchedulerLimits
from generator.core.sequences import Outcome, Work
from testkit import eventually

NUM_BLOCKS, BLOCK, CONTEXT = 120, 4, 400
ADAPTERS = ("toy:a", "toy:b")


class SteppedRunner(ToyRunner):
    """Computes a step only when it is let, and tells which requests were in it."""

    def __init__(self) -> None:
        super().__init__(NUM_BLOCKS, BLOCK, CONTEXT)
        self.let = threading.Semaphore(0)
        self.begun: list[set[str]] = []
        self.is_free = False

    def execute(self, step: list[Work]) -> list[Outcome]:
        self.begun.append({work.sequence.request.request_id for work in step})
        assert self.is_free or self.let.acquire(timeout=30)
        return super().execute(step)


@pytest.fixture
def runner() -> SteppedRunner:
    return SteppedRunner()


@pytest.fixture
async def engine(runner: SteppedRunner) -> AsyncIterator[BatchingEngine]:
    blocks = BlockManager(NUM_BLOCKS, BLOCK)
    engine = BatchingEngine(runner, ByteTokenizer(), blocks, SchedulerLimits(max_running=16, max_waiting=4096))
    engine.start()
    yield engine
    runner.is_free = True
    runner.let.release(1000)
    await engine.close()


def _named(name: str, **fields: object) -> GenerationRequest:
    return ask((97,) * 60, 200, request_id=name, **fields)


@pytest.mark.parametrize("at_step", [1, 2, 5], ids=["reading its prompt", "at its first token", "writing"])
async def test_a_cancel_frees_blocks_within_one_step(
    engine: BatchingEngine, runner: SteppedRunner, at_step: int
) -> None:
    """The step that runs when the cancel comes is the last one with the request, and the next frees its blocks."""
    settled: list[Summary] = []
    stream = engine.submit(_named("cancelled", cache_salt="of its own"), settled.append)  # no blocks are shared
    engine.submit(_named("other"), lambda _: None)
    for number in range(at_step):
        await eventually(lambda n=number: len(runner.begun) > n)  # type: ignore[misc]
        runner.let.release() if number < at_step - 1 else None
    assert "cancelled" in runner.begun[-1]
    held = engine.stats().blocks_used
    stream.cancel()
    runner.let.release()  # ends the step that was running
    await eventually(lambda: len(runner.begun) == at_step + 1)
    assert runner.begun[-1] == {"other"}
    assert engine.stats().blocks_used < held
    await eventually(lambda: bool(settled))  # told while the next step still runs
    assert settled[0].reasons == (FinishReason.CANCELLED,)
    runner.is_free = True
    runner.let.release(1)
    assert engine.cancel("other") == 1
    await eventually(lambda: engine.stats().blocks_used == 0)


def _any_request(chance: random.Random, number: int) -> GenerationRequest:
    prompt = tuple(chance.randrange(97, 123) for _ in range(chance.choice((1, 3, 30, 150))))
    if chance.random() < 0.3:
        prompt = (120,) * 40 + prompt  # a prefix that others have too
    most = chance.choice((1, 5, 40, 200))
    return GenerationRequest(
        request_id=f"req_{number}",
        prompt_ids=prompt,
        sampling=SamplingParams(temperature=chance.choice((0.0, 1.0)), seed=number),
        stop=StopParams(max_tokens=most, ignore_eos=True),
        n=chance.choice((1, 1, 1, 3)),
        logprobs=chance.choice((None, None, 1)),
        prompt_logprobs=chance.choice((None, None, None, 0)),
        priority=chance.choice((0, 0, 0, -1, 1)),
        adapter=chance.choice(("", "", *ADAPTERS)),
        cache_salt=chance.choice(("t1", "t2")),
    )


class Client:
    """One that reads a while and then leaves, or stays to the end."""

    def __init__(self, engine: BatchingEngine, chance: random.Random, number: int) -> None:
        self._engine = engine
        self.request = _any_request(chance, number)
        self._patience = chance.choice((0, 0, 1, 2, 8, 1000))  # events that it reads
        self._way = chance.choice(("stream", "id", "task"))
        self._delay_s = chance.random() * 2
        self.num_settled = 0
        self.summary: Summary | None = None
        self.tokens: dict[int, list[int]] = {index: [] for index in range(self.request.n)}
        self.reasons: Counter[FinishReason] = Counter()

    def _settle(self, summary: Summary) -> None:
        self.num_settled += 1
        self.summary = summary

    async def run(self) -> None:
        await asyncio.sleep(self._delay_s)
        stream = self._engine.submit(self.request, self._settle)
        num_read = 0
        if not self._patience:
            self._leave(stream.cancel)
        async for event in stream:
            num_read += 1
            if num_read == self._patience:
                self._leave(stream.cancel)
                if self._way == "task":  # nobody reads the rest
                    return
            if isinstance(event, Delta):
                self.tokens[event.index] += event.token_ids
            elif isinstance(event, Finished):
                self.reasons[event.reason] += 1

    def _leave(self, cancel: object) -> None:
        if self._way == "id":
            assert self._engine.cancel(self.request.request_id) <= 1
        else:
            cancel()  # type: ignore[operator]


async def test_a_thousand_random_cancels_leave_nothing_behind(engine: BatchingEngine, runner: SteppedRunner) -> None:
    """Of every kind and at every point, in memory for a few at a time; whoever stayed has the text it gets alone."""
    runner.is_free = True
    runner.let.release(1)
    for adapter_id in ADAPTERS:
        await engine.load_adapter(AdapterFiles(lora_files.spec(adapter_id), b"{}", adapter_id.encode()))
    chance = random.Random(4)
    clients = [Client(engine, chance, number) for number in range(1000)]
    async with asyncio.timeout(100), asyncio.TaskGroup() as group:
        for client in clients:
            group.create_task(client.run())
    await eventually(lambda: all(client.num_settled for client in clients), timeout_s=30)

    stats = engine.stats()
    assert (stats.blocks_used, stats.running_sequences, stats.waiting_sequences) == (0, 0, 0)
    assert all(client.num_settled == 1 for client in clients)
    ended = Counter(reason for client in clients for reason in client.summary.reasons)  # type: ignore[union-attr]
    assert set(ended) == {FinishReason.CANCELLED, FinishReason.LENGTH} and ended[FinishReason.CANCELLED] > 500
    assert stats.preemptions_total > 0  # it was tight
    stayed = [client for client in clients if client.reasons[FinishReason.LENGTH] == client.request.n]
    assert len(stayed) > 50
    for client in chance.sample(stayed, 12):
        alone = await collect(engine, client.request)
        assert alone.tokens == client.tokens
    for adapter_id in ADAPTERS:  # nobody uses them any more: this returns at once
        async with asyncio.timeout(10):
            await engine.unload_adapter(adapter_id)


async def test_a_drain_finishes_what_is_there_and_refuses_what_comes(
    engine: BatchingEngine, runner: SteppedRunner
) -> None:
    """Running and waiting requests both; the batch holds sixteen."""
    tasks = [asyncio.create_task(collect(engine, _named(f"r{i}", priority=i % 3))) for i in range(20)]
    await eventually(lambda: engine.stats().waiting_sequences > 0 and bool(runner.begun))
    engine.drain()
    with pytest.raises(PlatformError, match="shutting down") as raised:
        engine.submit(_named("late"), lambda _: None)
    assert raised.value.retryable
    runner.is_free = True
    runner.let.release(1)
    answers = [await task for task in tasks]
    assert all(answer.reasons == {0: FinishReason.LENGTH} for answer in answers)
    assert len({tuple(answer.tokens[0]) for answer in answers}) == 1 and len(answers[0].tokens[0]) == 200
    assert engine.stats().blocks_used == 0
