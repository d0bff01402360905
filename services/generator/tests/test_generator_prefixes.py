"""The prefix cache: its keys, its blocks under random use, and what a request finds of what others computed."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest
from engine_suite import PROMPTS, ask, collect
from hypothesis import given, settings
from hypothesis import strategies as st
from test_generator_engine_toy import BLOCK_SIZE, make_engine, toy_adapter

from generator.core import prefixes
from generator.core.batching import BatchingEngine
from generator.core.blocks import BlockManager
from generator.core.requests import GenerationRequest, SamplingParams, StopParams
from generator.core.scheduler import Scheduler, SchedulerLimits
from generator.core.sequences import Sequence, Work
from generator.core.speculation import PromptLookup

LONG = tuple((7 * i) % 250 for i in range(101))


@pytest.fixture
async def engine() -> AsyncIterator[BatchingEngine]:
    engine = make_engine()
    yield engine
    await engine.close()


def _chain(tokens: tuple[int, ...], salt: str = "", adapter: str = "") -> list[bytes]:
    keys: list[bytes] = []
    prefixes.extend(keys, prefixes.root(salt, adapter), tokens, BLOCK_SIZE, len(tokens) // BLOCK_SIZE)
    return keys


def test_a_key_stands_for_all_tokens_before_for_the_tenant_and_for_the_adapter() -> None:
    keys = _chain(LONG)
    assert len(keys) == 25 and len(set(keys)) == 25
    assert _chain(LONG[:50]) == keys[:12]
    assert _chain((*LONG[:40], 1, *LONG[41:]))[:11] == [*keys[:10], _chain((*LONG[:40], 1, *LONG[41:44]))[-1]]
    assert not set(_chain((1, *LONG[1:]))) & set(keys)
    others = [_chain(LONG, "ab", "c"), _chain(LONG, "a", "bc"), _chain(LONG, "abc"), _chain(LONG, "", "abc")]
    assert len({key for chain in (*others, keys) for key in chain}) == 5 * 25


class _Oracle:
    """A block manager with what each block really contains, as a runner would have written it."""

    def __init__(self, num_blocks: int) -> None:
        self.blocks = BlockManager(num_blocks, BLOCK_SIZE)
        self.contents: dict[int, bytes] = {}
        self.tables: list[tuple[list[int], list[bytes]]] = []

    def begin(self, keys: list[bytes]) -> None:
        found = self.blocks.find(keys)
        assert [self.contents[block] for block in found] == keys[: len(found)]
        if self.blocks.num_needed(len(keys) * BLOCK_SIZE, found) > self.blocks.num_free:
            return
        table: list[int] = []
        self.blocks.adopt(table, found)
        assert self.blocks.grow(table, len(keys) * BLOCK_SIZE), "num_needed promised room"
        for block, key in zip(table[len(found) :], keys[len(found) :], strict=True):
            assert all(block not in other for other, _ in self.tables), "a block in use was handed out for writing"
            self.contents[block] = key
            self.blocks.seal(block, key)
        self.tables.append((table, keys))

    def check(self) -> None:
        blocks = self.blocks
        users = [sum(table.count(block) for table, _ in self.tables) for block in range(blocks.num_blocks)]
        assert users == blocks._num_users
        places = [*blocks._blank, *blocks._idle, *(block for block, num in enumerate(users) if num)]
        assert sorted(places) == list(range(blocks.num_blocks)), "a block is in two places or in none"
        assert set(blocks._idle) <= set(blocks._key_of) and not set(blocks._blank) & set(blocks._key_of)
        assert {key: block for block, key in blocks._key_of.items()} == blocks._block_of
        assert blocks.num_used == sum(1 for num in users if num)
        for table, keys in self.tables:
            assert [self.contents[block] for block in table] == keys, "what a table holds was overwritten"


@settings(deadline=None, max_examples=200)
@given(st.integers(1, 12), st.lists(st.tuples(st.integers(0, 5), st.integers(0, 99), st.integers(0, 2)), max_size=60))
def test_every_block_is_blank_idle_or_used_and_holds_what_its_key_says(
    num_blocks: int, actions: list[tuple[int, int, int]]
) -> None:
    oracle = _Oracle(num_blocks)
    for length, which, family in actions:
        if length == 0 and oracle.tables:
            oracle.blocks.release(oracle.tables.pop(which % len(oracle.tables))[0])
        elif length:
            oracle.begin([b"%d-%d" % (family, place) for place in range(length)])
        oracle.check()
    for table, _ in oracle.tables:
        oracle.blocks.release(table)
    assert oracle.blocks.num_used == 0


def test_the_block_that_was_idle_for_longest_goes_first_and_a_prefix_from_its_end() -> None:
    blocks = BlockManager(4, BLOCK_SIZE)
    tables: list[list[int]] = [[], []]
    for table, name in zip(tables, (b"a", b"b"), strict=True):
        blocks.grow(table, 2 * BLOCK_SIZE)
        for place, block in enumerate(table):
            blocks.seal(block, b"%s%d" % (name, place))
        blocks.release(table)
    again: list[int] = []
    blocks.adopt(again, blocks.find([b"a0"]))
    blocks.release(again)  # now a0 was used last
    assert blocks.num_free == 4 and blocks.grow(again, BLOCK_SIZE)
    assert [len(blocks.find([b"%s0" % name, b"%s1" % name])) for name in (b"a", b"b")] == [1, 2]
    assert blocks.grow(again, 3 * BLOCK_SIZE)
    assert [len(blocks.find([b"%s0" % name])) for name in (b"a", b"b")] == [1, 0]


# The scheduler.


def _sequence(arrival: int, prompt: tuple[int, ...], most: int = 4, **fields: object) -> Sequence:
    request = replace(GenerationRequest("r", prompt), **fields)  # type: ignore[arg-type]
    sequence = Sequence(request, 0, arrival, 0, most, cache_root=prefixes.root(request.cache_salt, ""))
    sequence.lookup = PromptLookup()
    return sequence


def _compute(step: list[Work], scheduler: Scheduler) -> list[Sequence]:
    ended = []
    for work in step:
        sequence, samples = work.sequence, work.samples
        assert len(sequence.table) * BLOCK_SIZE >= work.reach
        sequence.num_computed = work.end
        if samples:
            sequence.token_ids.append(sequence.num_new % 2)
            for draft in work.drafts:
                if draft != sequence.token_ids[-1]:
                    break
                sequence.num_computed += 1
                sequence.token_ids.append(sequence.num_new % 2)
            assert sequence.num_new <= sequence.max_new_tokens
        scheduler.seal(sequence)
        if sequence.num_new >= sequence.max_new_tokens:
            scheduler.remove(sequence)
            ended.append(sequence)
    return ended


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_under_any_load_a_sequence_reads_its_own_context(data: st.DataObject) -> None:
    """Shared prefixes, two tenants, little memory, cancels, right and wrong drafts: what lies in a table is what the
    sequence's tokens say."""
    blocks = BlockManager(data.draw(st.integers(10, 20)), BLOCK_SIZE)
    scheduler = Scheduler(blocks, SchedulerLimits(max_running=4, max_step_tokens=data.draw(st.integers(6, 40))))
    shapes = data.draw(
        st.lists(
            st.tuples(st.integers(1, 24), st.integers(0, 1), st.integers(0, 12), st.sampled_from("ab"), st.booleans()),
            min_size=1,
            max_size=14,
        )
    )
    todo = [
        _sequence(i, (family,) * min(3, num) + (9,) * max(0, num - 3), most, cache_salt=salt, priority=-int(background))
        for i, (num, family, most, salt, background) in enumerate(shapes)
        if most
    ]
    cancels = data.draw(st.lists(st.integers(0, 60), max_size=4))
    slots: dict[int, tuple[str, tuple[int, ...]]] = {}
    num_left = len(todo)
    for now in range(2000):
        if todo and now % 2 == 0:
            scheduler.add([todo.pop(0)])
        if now in cancels and scheduler.running:
            scheduler.remove(scheduler.running[now % len(scheduler.running)])
            num_left -= 1
        busy = bool(scheduler.running or scheduler.waiting)
        step = scheduler.schedule()
        assert bool(step) == busy
        for work in step:
            _read_and_write(work, slots)
        num_left -= len(_compute(step, scheduler))
        if not num_left:
            break
    assert num_left == 0 and blocks.num_used == 0


def _read_and_write(work: Work, slots: dict[int, tuple[str, tuple[int, ...]]]) -> None:
    """A slot remembers the whole context that its keys and values were computed with."""
    sequence, salt = work.sequence, work.sequence.request.cache_salt
    token_ids = (*sequence.token_ids[: work.end], *work.drafts)
    for position in range(work.reach):
        slot = sequence.table[position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE
        context = (salt, token_ids[: position + 1])
        if position < sequence.num_computed:
            assert slots[slot] == context
        slots[slot] = context


def test_completions_of_one_prompt_compute_it_once() -> None:
    scheduler = Scheduler(BlockManager(100, BLOCK_SIZE), SchedulerLimits(max_step_tokens=200))
    first, second, other = _sequence(0, LONG), _sequence(1, LONG), _sequence(2, LONG[1:])
    for sequence in (first, second, other):
        scheduler.add([sequence])
    step = scheduler.schedule()
    assert step == [Work(first, 101), Work(other, 99)]  # and nobody behind waits for the second
    _compute(step, scheduler)
    assert Work(second, 1) in scheduler.schedule()  # 25 blocks of 4 and the last token, which is always computed


def test_cached_blocks_count_as_free() -> None:
    scheduler = Scheduler(BlockManager(10, BLOCK_SIZE), SchedulerLimits())
    old = _sequence(0, tuple(range(35)), most=1)
    scheduler.add([old])
    _compute(scheduler.schedule(), scheduler)
    assert scheduler.blocks.num_used == 0
    new = _sequence(1, tuple(range(100, 136)))
    scheduler.add([new])
    assert scheduler.schedule() == [Work(new, 36)]


def test_a_preempted_sequence_finds_its_own_blocks() -> None:
    scheduler = Scheduler(BlockManager(8, BLOCK_SIZE), SchedulerLimits())
    old, young = _sequence(0, tuple(range(15)), most=5), _sequence(1, tuple(range(50, 63)))
    for sequence in (old, young):
        scheduler.add([sequence])
    while not young.num_preemptions:
        _compute(scheduler.schedule(), scheduler)
    while young not in scheduler.running:
        step = scheduler.schedule()
        _compute(step, scheduler)
    assert young.num_computed >= 8 and next(w.num_tokens for w in step if w.sequence is young) < 8


# The engine.


async def test_a_second_request_finds_the_first_ones_prefix_and_says_the_same(engine: BatchingEngine) -> None:
    first = await collect(engine, ask(LONG, 16, logprobs=2))
    second = await collect(engine, ask(LONG, 16, logprobs=2))
    assert second.tokens == first.tokens and second.logprobs == first.logprobs
    assert first.summary is not None and first.summary.num_cached == 0
    assert second.summary is not None and second.summary.num_cached == 100
    longer = await collect(engine, ask((*LONG, *first.tokens[0]), 4))  # a turn more: what was sampled is there too
    assert longer.summary is not None and longer.summary.num_cached == 116
    stats = engine.stats()
    assert (stats.prefix_query_tokens_total, stats.prefix_hit_tokens_total) == (101 + 101 + 117, 216)
    assert stats.blocks_used == 0


async def test_nothing_is_shared_between_tenants_or_adapters(engine: BatchingEngine) -> None:
    adapters = [toy_adapter(f"toy:{name}", seed) for seed, name in enumerate("ab")]
    for adapter in adapters:
        await engine.load_adapter(adapter)
    base = ask(LONG, 8)
    askers = [replace(base, cache_salt=salt) for salt in ("", "acme", "umbrella")]
    askers += [replace(base, adapter=adapter.spec.id) for adapter in adapters]
    for _ in range(2):
        found = [await collect(engine, request) for request in askers]
    alone = make_engine()
    for adapter in adapters:
        await alone.load_adapter(adapter)
    for request, got in zip(askers, found, strict=True):
        assert got.tokens == (await collect(alone, replace(request, cache_salt=request.request_id))).tokens
    await alone.close()
    fresh = make_engine()
    await fresh.load_adapter(adapters[0])
    for number, request in enumerate(askers[:4]):  # each the first of its kind
        summary = (await collect(fresh, request)).summary
        assert summary is not None and summary.num_cached == 0, number
    await fresh.close()


async def test_prompt_log_probabilities_are_computed_all_the_same(engine: BatchingEngine) -> None:
    request = ask(LONG, 4, prompt_logprobs=1)
    first, second = await collect(engine, request), await collect(engine, request)
    assert first.started is not None and len(first.started.prompt_logprobs) == len(LONG) - 1
    assert second.started == first.started and second.tokens == first.tokens
    assert second.summary is not None and second.summary.num_cached == 0
    after = await collect(engine, ask(LONG, 4))  # but others find what it computed
    assert after.summary is not None and after.summary.num_cached == 100


async def test_many_completions_of_one_prompt_equal_each_alone(engine: BatchingEngine) -> None:
    hot = SamplingParams(temperature=1.2, seed=5)
    four = await collect(engine, ask(LONG, 10, n=4, sampling=hot))
    assert four.summary is not None and four.summary.num_cached == 0
    assert engine.stats().prefix_hit_tokens_total == 300
    cold = make_engine()
    again = await collect(cold, ask(LONG, 10, n=2, sampling=hot))
    assert again.tokens == {index: four.tokens[index] for index in (0, 1)}
    await cold.close()


async def test_a_thousand_random_cancels_leave_no_block_in_use() -> None:
    engine = make_engine(num_blocks=120, max_waiting=2000)
    streams = []
    for number in range(1000):
        prompt = PROMPTS[number % len(PROMPTS)] + LONG[: number % 50]
        streams.append(engine.submit(ask(prompt, 1 + number % 60, cache_salt=str(number % 3)), lambda _: None))
        if number % 7 == 0:
            await asyncio.sleep(0.001)  # some run, some wait
        streams[(number * 31) % len(streams)].cancel()
    for number, stream in enumerate(streams):
        if number % 3:
            stream.cancel()
        _ = [event async for event in stream]
    stats = engine.stats()
    assert (stats.blocks_used, stats.running_sequences, stats.waiting_sequences) == (0, 0, 0)
    assert (await collect(engine, ask(LONG, 8))).tokens == (await collect(engine, ask(LONG, 8, cache_salt="z"))).tokens
    await engine.close()


async def test_a_stop_in_the_middle_of_a_block_spoils_nothing(engine: BatchingEngine) -> None:
    tokens = (await collect(engine, ask(LONG, 30))).tokens[0]
    for most in range(1, 12):
        got = await collect(engine, ask(LONG, stop=StopParams(max_tokens=most, ignore_eos=True)))
        assert got.tokens[0] == tokens[:most]
