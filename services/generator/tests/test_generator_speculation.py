"""Speculation by prompt lookup: good guesses, and an output that is the same with and without."""

import asyncio
import zlib
from dataclasses import replace

import numpy as np
import pytest
from engine_suite import GREEDY, PROMPTS, Collected, ask, collect
from hypothesis import given
from hypothesis import strategies as st
from test_generator_engine_toy import BLOCK_SIZE, CONTEXT, make_engine

from generator.backends.toy import VOCAB_SIZE, ToyRunner
from generator.core import sampling
from generator.core.batching import BatchingEngine
from generator.core.events import FinishReason
from generator.core.requests import GenerationRequest, SamplingParams, StopParams
from generator.core.sequences import Outcome, Sequence, Work
from generator.core.speculation import PromptLookup

SEEDED = SamplingParams(temperature=0.6, top_p=0.95, seed=11)


class LoopingRunner(ToyRunner):
    """A toy that repeats itself: its next token follows from the last two, its log probabilities from all of them."""

    def __init__(self, num_blocks: int = 400) -> None:
        super().__init__(num_blocks, BLOCK_SIZE, CONTEXT)
        self.steps: list[list[Work]] = []
        self.reach = 0

    def execute(self, step: list[Work]) -> list[Outcome]:
        self.steps.append(step)
        self.reach = max(self.reach, *(work.reach for work in step))
        return super().execute(step)

    def _logits(self, sequence: Sequence, num_tokens: int) -> sampling.Floats:
        last = self._slots[self._slot_ids(sequence, max(0, num_tokens - 2), num_tokens)]
        habit = np.random.default_rng(zlib.crc32(last.tobytes())).standard_normal(VOCAB_SIZE, dtype=np.float32)
        habit[97:101] += 4.0  # four letters: sixteen pairs, so it loops soon
        return habit * 3 + super()._logits(sequence, num_tokens) / 8


def _engines(num_blocks: int = 400) -> tuple[BatchingEngine, LoopingRunner, BatchingEngine, LoopingRunner]:
    guessing, plain = LoopingRunner(num_blocks), LoopingRunner(num_blocks)
    # Steps take no time: whether a guess pays depends on how many were right and not on the machine.
    engine = make_engine(guessing, num_blocks, stopwatch=lambda: 0.0)
    return engine, guessing, make_engine(plain, num_blocks, max_drafts=0), plain


def _shown(got: Collected) -> tuple[object, ...]:
    assert got.summary is not None
    return dict(got.texts), dict(got.tokens), dict(got.logprobs), got.reasons, got.summary.num_completion


@pytest.mark.parametrize("params", [GREEDY, SEEDED])
async def test_the_output_is_the_same_in_fewer_steps(params: SamplingParams) -> None:
    guessing, runner, plain, slow = _engines()
    for prompt in PROMPTS:
        request = ask(prompt, 120, sampling=params, logprobs=3)
        assert _shown(await collect(guessing, request)) == _shown(await collect(plain, request))
    stats = guessing.stats()
    assert 0 < stats.accepted_tokens_total <= stats.draft_tokens_total
    assert len(runner.steps) <= len(slow.steps) - 0.9 * stats.accepted_tokens_total and len(slow.steps) >= 600
    assert plain.stats().draft_tokens_total == 0
    if params is GREEDY:
        assert len(runner.steps) < len(slow.steps) / 2
    await guessing.close()
    await plain.close()


async def test_together_and_with_little_memory_the_output_is_the_same() -> None:
    """Sequences that come, go and are preempted, drafts that cross the ends of blocks and blocks that run out."""
    guessing, _, plain, _ = _engines(num_blocks=65)
    requests = [ask(p, 90, n=1 + i % 2, sampling=(GREEDY, SEEDED)[i % 2], logprobs=0) for i, p in enumerate(PROMPTS)]
    expected = [_shown(await collect(plain, request)) for request in requests]
    found = await asyncio.gather(*(collect(guessing, request) for request in requests))
    assert [_shown(got) for got in found] == expected
    stats = guessing.stats()
    assert stats.preemptions_total > 0 and stats.accepted_tokens_total > 0 and stats.blocks_used == 0
    await guessing.close()
    await plain.close()


async def test_every_way_to_end_is_exact_when_tokens_come_several_at_once() -> None:
    guessing, runner, plain, _ = _engines()
    free = await collect(plain, ask(most=100))
    text, tokens = free.texts[0], free.tokens[0]
    stops = [StopParams(max_tokens=most, ignore_eos=True) for most in range(40, 60)]
    stops += [StopParams(max_tokens=99, stop=(text[at : at + 3],), ignore_eos=True) for at in range(30, 60, 5)]
    for least in (0, 45, 46, 47):
        stops.append(StopParams(max_tokens=99, min_tokens=least, stop=(text[20:22],), ignore_eos=True))
        stops.append(StopParams(max_tokens=99, min_tokens=least, stop_token_ids=(tokens[30],), ignore_eos=True))
    for stop in stops:
        request = ask(stop=stop, logprobs=1)
        assert _shown(await collect(guessing, request)) == _shown(await collect(plain, request)), stop
    lengths = [await collect(guessing, ask(most=most)) for most in range(40, 60)]
    assert [len(got.tokens[0]) for got in lengths] == list(range(40, 60))
    assert all(got.reasons[0] is FinishReason.LENGTH for got in lengths)
    total = guessing.stats().completion_tokens_total
    assert total == plain.stats().completion_tokens_total - 100 + sum(range(40, 60))  # nothing past a stop is counted
    assert any(work.drafts for step in runner.steps for work in step)
    await guessing.close()
    await plain.close()


async def test_the_context_is_never_left() -> None:
    guessing, runner, plain, _ = _engines()
    request = ask(PROMPTS[0], stop=StopParams(ignore_eos=True))
    assert _shown(await collect(guessing, request)) == _shown(await collect(plain, request))
    assert CONTEXT - 1 <= runner.reach <= CONTEXT
    await guessing.close()
    await plain.close()


async def test_a_cancel_and_a_deadline_end_it_as_ever() -> None:
    guessing, _, plain, _ = _engines()
    stream = guessing.submit(ask(most=240, request_id="mine"), lambda _: None)
    stream.cancel()
    assert [event async for event in stream]
    late = await collect(guessing, ask(most=240, deadline_unix_s=1.0))
    assert late.reasons[0] is FinishReason.DEADLINE and guessing.stats().blocks_used == 0
    await guessing.close()
    await plain.close()


async def test_nothing_is_guessed_where_tokens_hang_on_the_ones_before() -> None:
    guessing, runner, plain, _ = _engines()
    for change in (
        {"sampling": replace(GREEDY, frequency_penalty=0.1)},
        {"sampling": replace(GREEDY, repetition_penalty=1.1)},
        {"stop": StopParams(max_tokens=80, min_tokens=80)},
        {"priority": -1},
    ):
        request = ask(most=80, **change)
        assert _shown(await collect(guessing, request)) == _shown(await collect(plain, request))
    assert not any(work.drafts for step in runner.steps for work in step)
    await guessing.close()
    await plain.close()


async def test_a_large_batch_does_not_guess() -> None:
    guessing, runner, plain, _ = _engines()
    await asyncio.gather(*(collect(guessing, ask((i, *PROMPTS[0]), 60)) for i in range(12)))
    for step in runner.steps:
        num_decodes = sum(work.num_tokens == 1 for work in step)
        assert num_decodes <= 4 or not any(work.drafts for work in step)
        assert sum(work.num_positions for work in step) <= 128
    await guessing.close()
    await plain.close()


async def test_guesses_that_are_wrong_end_soon() -> None:
    """The plain toy never repeats itself, but its prompt's pairs come back by chance."""
    prompt = tuple(97 + (a if place else b) for a in range(9) for b in range(9) for place in (0, 1))
    engine = make_engine(stopwatch=lambda: 0.0)
    await collect(engine, ask(prompt, 90))
    stats = engine.stats()
    assert 0 < stats.draft_tokens_total <= 4 * (4 + 90 // 24)
    await engine.close()


# Guesses.


@given(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.integers(1, 6))
def test_the_last_place_where_the_most_tokens_agree_is_continued(tokens: list[int], most: int) -> None:
    lookup, grown = PromptLookup(), tokens[:1]
    for token in tokens[1:]:  # token by token, and all at once below
        lookup.propose(grown, most, 0.0)
        grown.append(token)
    expected: tuple[int, ...] = ()
    for size in (3, 2):
        places = [at for at in range(size, len(tokens)) if tokens[at - size : at] == tokens[-size:]]
        if places and not expected:
            follows = tokens[places[-1] :]
            expected = tuple((follows * most)[:most])
    assert lookup.propose(grown, most, 0.0) == PromptLookup().propose(tokens, most, 0.0) == expected


def test_what_does_not_pay_is_tried_again_now_and_then() -> None:
    lookup, tokens = PromptLookup(), [1, 2, 3, 1, 2]
    assert lookup.propose(tokens, 3, 0.5) == (3, 1, 2)
    for _ in range(2):
        lookup.note(0)
    tries = [bool(lookup.propose(tokens, 3, 0.5)) for _ in range(60)]
    assert tries[:24] == [False] * 24 and tries[24]
    lookup.note(3)
    assert lookup.propose(tokens, 3, 0.5)


def test_where_rows_are_dear_more_must_be_right() -> None:
    lookup, tokens = PromptLookup(), [1, 2, 3, 1, 2]
    assert lookup.propose(tokens, 4, 3.0)  # the first is always tried
    lookup.note(1)
    assert lookup.propose(tokens, 4, 0.6) and not lookup.propose(tokens, 4, 0.7)


# What a runner is told of drafts.


def test_a_row_draws_what_it_would_draw_alone() -> None:
    logits = np.random.default_rng(0).standard_normal((3, 50)).astype(np.float32)
    sequence = Sequence(GenerationRequest("r", (1, 2), SEEDED), 0, 0, 11, 100)
    together = sampling.sample(logits.copy(), sampling.rows_of(Work(sequence, 2, (7, 8))))
    alone = []
    for place in range(3):
        alone += sampling.sample(logits[place : place + 1].copy(), [sampling.Row(sequence)])
        sequence.token_ids.append(0)
    assert together == alone


@pytest.mark.parametrize(
    ("drafts", "sampled", "num"),
    [((), (5,), 1), ((1, 2), (1, 2, 3), 3), ((1, 2), (1, 3, 3), 2), ((1, 2), (0, 2, 3), 1)],
)
def test_tokens_stand_up_to_the_first_that_was_not_guessed(
    drafts: tuple[int, ...], sampled: tuple[int, ...], num: int
) -> None:
    assert sampling.num_accepted(drafts, sampled) == num
