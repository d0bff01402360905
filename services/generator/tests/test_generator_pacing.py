"""How long prompts go beside streams: the pacer on made-up step times, and the engine on a runner with a clock."""

import asyncio
import time
from collections.abc import Callable

import numpy as np
import pytest
from engine_suite import Collected, ask, collect
from test_generator_engine_toy import BLOCK_SIZE

from generator.backends.toy import ByteTokenizer, ToyRunner
from generator.core.batching import BatchingEngine
from generator.core.blocks import BlockManager
from generator.core.pacing import StepPacer
from generator.core.scheduler import SchedulerLimits
from generator.core.sequences import Outcome, Work
from generator.core.steps import StepReport, StepTimes
from testkit import eventually

BASE_S, ROW_S = 0.0035, 0.00055  # of our own kernels on two cores


def _step_s(num_rows: int) -> float:
    return BASE_S + ROW_S * num_rows


def _report(num_decodes: int, num_prefill: int, took_s: float | None = None) -> StepReport:
    took_s = _step_s(num_decodes + num_prefill) if took_s is None else took_s
    return StepReport(num_decodes, num_decodes, num_prefill, 0, 0, num_decodes, 0.0, took_s, 0.0)


def _taught(max_slowdown: float = 2.0) -> StepPacer:
    pacer = StepPacer(max_slowdown)
    for _ in range(20):
        for num in (1, 8, 32):
            pacer.note(_report(num, 0))
        pacer.note(_report(0, 128))
    return pacer


def test_before_anything_is_known_nothing_is_held_back() -> None:
    pacer = StepPacer(2.0)
    assert pacer.prompt_tokens(8, 1) is None and pacer.slowdown(1, 4) is None
    pacer.note(_report(0, 128))
    assert pacer.prompt_tokens(8, 1) is None
    pacer.note(_report(8, 0))
    assert pacer.prompt_tokens(8, 1) is not None


@pytest.mark.parametrize("num_decoding", [1, 8, 32])
@pytest.mark.parametrize("max_slowdown", [1.5, 2.0, 4.0])
def test_a_step_with_a_piece_of_a_prompt_stays_within_the_slowdown(num_decoding: int, max_slowdown: float) -> None:
    pacer = _taught(max_slowdown)
    for _ in range(50):  # steps with both teach what a token more really costs
        num_tokens = pacer.prompt_tokens(num_decoding, 1)
        assert num_tokens is not None
        pacer.note(_report(num_decoding, num_tokens))
    most = _step_s(num_decoding) * max_slowdown
    assert _step_s(num_decoding + num_tokens) <= most * 1.02 or num_tokens == 8
    assert _step_s(num_decoding + num_tokens + 2) > most * 0.98 or num_tokens == 8


def test_prompts_that_queue_up_weigh_more_than_the_few_that_decode() -> None:
    pacer = _taught()
    budgets = [pacer.prompt_tokens(8, num) or 0 for num in (1, 2, 5, 9, 33)]
    assert budgets == sorted(budgets) and budgets[1] < 1.5 * budgets[0] and budgets[-1] > 8 * budgets[0]


def test_a_prompt_goes_on_however_slow_it_is_and_one_bad_step_changes_little() -> None:
    pacer = _taught(1.0)
    assert pacer.prompt_tokens(8, 1) == 8
    pacer = _taught()
    before = pacer.prompt_tokens(8, 1)
    pacer.note(_report(8, 0, took_s=5.0))  # the machine was away
    after = pacer.prompt_tokens(8, 1)
    assert before is not None and after is not None and before <= after < 1.2 * before


def test_what_was_learned_follows_the_machine() -> None:
    pacer = _taught()
    before = pacer.prompt_tokens(8, 1)
    for _ in range(60):  # prompts became four times as cheap
        pacer.note(_report(0, 128, took_s=_step_s(128) / 4))
    after = pacer.prompt_tokens(8, 1)
    assert before is not None and after is not None and after > 3.5 * before


def test_more_rows_take_as_much_longer_as_was_seen() -> None:
    pacer = _taught()
    found = pacer.slowdown(1, 7)
    assert found == pytest.approx(_step_s(8) / _step_s(1)) and pacer.slowdown(1, 3) is None


class ClockedRunner(ToyRunner):
    """A toy that takes no time, and a clock that says how much it would have been."""

    def __init__(self, context: int = 4096) -> None:
        super().__init__(8000, BLOCK_SIZE, context)
        self.now_s = 0.0

    def execute(self, step: list[Work]) -> list[Outcome]:
        time.sleep(0.0003)  # lets the loop run between steps
        self.now_s += _step_s(sum(work.num_positions for work in step))
        return super().execute(step)


async def _run(scenario: Callable[[BatchingEngine], object], max_slowdown: float) -> tuple[list[StepReport], float]:
    """Runs a scenario on a clocked engine; returns its steps and the clock at the end."""
    runner, reports = ClockedRunner(), list[StepReport]()
    limits = SchedulerLimits(max_slowdown=max_slowdown, max_drafts=0)
    blocks = BlockManager(8000, BLOCK_SIZE)
    engine = BatchingEngine(
        runner, ByteTokenizer(), blocks, limits, on_step=reports.append, stopwatch=lambda: runner.now_s
    )
    engine.start()
    await scenario(engine)  # type: ignore[misc]
    await engine.close()
    return reports, runner.now_s


def _prompt(seed: int, num: int) -> tuple[int, ...]:
    return tuple(int(t) for t in np.random.default_rng(seed).integers(0, 250, num))


async def _streams_and_a_long_prompt(engine: BatchingEngine) -> None:
    streams = [asyncio.create_task(collect(engine, ask(_prompt(i, 12), 700))) for i in range(8)]
    await eventually(lambda: engine.stats().completion_tokens_total > 400)
    got = await collect(engine, ask(_prompt(99, 1500), 4))
    assert len(got.tokens[0]) == 4
    for stream in await asyncio.gather(*streams):
        assert len(stream.tokens[0]) == 700


async def test_eight_streams_slow_down_at_most_twofold_beside_a_prompt_of_1500_tokens() -> None:
    for max_slowdown, most in ((1.8, 2.0), (1000.0, None)):
        reports, _ = await _run(_streams_and_a_long_prompt, max_slowdown)
        alone = [r.execute_s for r in reports if r.num_decodes == 8 and not r.num_prefill_tokens]
        beside = [r.execute_s for r in reports if r.num_decodes == 8 and r.num_prefill_tokens]
        assert sum(r.num_prefill_tokens for r in reports if r.num_decodes == 8) >= 1500
        rise = float(np.percentile(beside, 95) / np.percentile(alone, 95))
        assert rise <= most if most else rise > 5  # without pacing it is a multiple


async def test_a_short_prompt_goes_in_at_once() -> None:
    async def scenario(engine: BatchingEngine) -> None:
        stream = asyncio.create_task(collect(engine, ask(_prompt(1, 12), 1500)))
        await eventually(lambda: engine.stats().completion_tokens_total > 100)
        await collect(engine, ask(_prompt(2, 120), 2))
        await stream

    reports, _ = await _run(scenario, 1.8)
    assert [r.num_prefill_tokens for r in reports if r.num_prefill_tokens and r.num_decodes] == [120]


async def test_an_engine_full_of_long_prompts_loses_little_to_pacing() -> None:
    """Twenty-four clients with 600 tokens in and 20 out: what counts is that prompts are read."""

    async def scenario(engine: BatchingEngine) -> None:
        async def client(number: int) -> list[Collected]:
            return [await collect(engine, ask(_prompt(10 * number + i, 600), 20)) for i in range(2)]

        await asyncio.gather(*(client(number) for number in range(24)))

    _, paced_s = await _run(scenario, 1.8)
    _, free_s = await _run(scenario, 1000.0)
    assert paced_s < 1.1 * free_s


async def test_a_runner_that_tells_its_times_is_believed() -> None:
    class Telling(ClockedRunner):
        @property
        def step_times(self) -> StepTimes:  # type: ignore[override]
            return StepTimes(0.003, 0.001)

    reports: list[StepReport] = []
    engine = BatchingEngine(
        Telling(), ByteTokenizer(), BlockManager(8000, BLOCK_SIZE), SchedulerLimits(), on_step=reports.append
    )
    engine.start()
    await collect(engine, ask(most=5))
    await engine.close()
    assert [(r.forward_s, r.sample_s, r.num_sampled) for r in reports] == [(0.003, 0.001, 1)] * 5
    assert [r.num_prefill_tokens for r in reports] == [5, 0, 0, 0, 0] and all(r.schedule_s > 0 for r in reports)
