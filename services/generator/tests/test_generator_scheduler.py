"""Properties of blocks and scheduler under random arrivals, lengths, cancels and too little memory."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chassis.errors import Code, PlatformError
from generator.core.blocks import BlockManager
from generator.core.requests import GenerationRequest
from generator.core.scheduler import Scheduler, SchedulerLimits
from generator.core.sequences import MAX_OVERTAKEN, Sequence, Work

BLOCK_SIZE = 4


def _sequence(arrival: int, num_prompt: int, most: int = 8, priority: int = 0) -> Sequence:
    tokens = tuple(range(100 * arrival, 100 * arrival + num_prompt))  # no prefix in common
    request = GenerationRequest(f"r{arrival}", tokens, priority=priority)
    return Sequence(request, 0, arrival, 0, most)


def _compute(step: list[Work]) -> list[Sequence]:
    """Does what a runner and the engine do; returns the sequences that have all their tokens."""
    for work in step:
        samples = work.samples
        work.sequence.num_computed = work.end
        if samples:
            work.sequence.token_ids.append(0)
    return [w.sequence for w in step if w.sequence.num_new >= w.sequence.max_new_tokens]


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 20)), max_size=60))
def test_blocks_are_free_or_in_one_table(actions: list[tuple[int, int]]) -> None:
    blocks = BlockManager(9, BLOCK_SIZE)
    tables: list[list[int]] = [[] for _ in range(4)]
    for which, num_tokens in actions:
        if which == 4:
            blocks.release(tables[num_tokens % 4])
            continue
        before = list(tables[which])
        grown = blocks.grow(tables[which], num_tokens)
        assert tables[which][: len(before)] == before
        assert not grown or len(tables[which]) * BLOCK_SIZE >= num_tokens
        assert grown or tables[which] == before
        held = [block for table in tables for block in table]
        assert len(held) == len(set(held)) == blocks.num_used
    for table in tables:
        blocks.release(table)
    assert blocks.num_free == 9


@settings(deadline=None, max_examples=100)
@given(st.data())
def test_any_load_ends_in_order_and_gives_all_blocks_back(data: st.DataObject) -> None:
    context = 24
    blocks = BlockManager(data.draw(st.integers(7, 20)), BLOCK_SIZE)
    limits = SchedulerLimits(
        max_running=data.draw(st.integers(1, 5)),
        max_waiting=100,
        max_step_tokens=data.draw(st.integers(6, 40)),
        max_mixed_prefill_tokens=data.draw(st.integers(1, 16)),
        max_background_tokens=data.draw(st.integers(1, 9)),
    )
    scheduler = Scheduler(blocks, limits)
    shapes = data.draw(
        st.lists(
            st.tuples(
                st.integers(0, 30),  # the step at which it comes
                st.integers(1, context - 1),  # tokens of the prompt
                st.integers(1, context - 1),  # tokens that it wants
                st.integers(-2, 1),  # priority
            ),
            min_size=1,
            max_size=12,
        )
    )
    cancels = data.draw(st.lists(st.integers(0, 60), max_size=4))
    shapes.sort(key=lambda shape: shape[0])
    todo = [
        (step, _sequence(i, prompt, min(most, context - prompt), priority))
        for i, (step, prompt, most, priority) in enumerate(shapes)
    ]
    left = {sequence.arrival for _, sequence in todo}
    for now in range(2000):
        while todo and todo[0][0] <= now:
            scheduler.add([todo.pop(0)[1]])
        if now in cancels and scheduler.running:
            cancelled = scheduler.running[now % len(scheduler.running)]
            scheduler.remove(cancelled)
            left.discard(cancelled.arrival)
        idle = not scheduler.running and not scheduler.waiting
        step = scheduler.schedule()
        assert bool(step) != idle  # where there is something to do, something is done
        _check_step(step, scheduler, limits)
        for sequence in _compute(step):
            scheduler.remove(sequence)
            left.discard(sequence.arrival)
        if not left:
            break
    assert not left, "some sequence starved"
    assert blocks.num_used == 0


def _check_step(step: list[Work], scheduler: Scheduler, limits: SchedulerLimits) -> None:
    assert len(scheduler.running) <= limits.max_running
    assert scheduler.running == sorted(scheduler.running, key=lambda s: s.order)
    assert all(not s.table and s.num_computed == 0 for s in scheduler.waiting)
    held = [block for s in scheduler.running for block in s.table]
    assert len(held) == len(set(held)) == scheduler.blocks.num_used
    for work in step:
        assert work.num_tokens > 0 and work.end <= len(work.sequence.token_ids)
        assert len(work.sequence.table) * BLOCK_SIZE >= work.end
        assert work.sequence in scheduler.running
    decodes = [w for w in step if w.num_tokens == 1 and w.samples]
    prefilled = sum(w.num_tokens for w in step if w not in decodes)
    if any(not s.is_background for s in (*scheduler.running, *scheduler.waiting)):
        background = sum(w.num_tokens for w in step if w.sequence.is_background)
        patient = sum(1 for s in scheduler.running if s.is_background and not s.yields)
        assert background <= limits.max_background_tokens + patient
        prefilled = sum(w.num_tokens for w in step if w not in decodes and not w.sequence.is_background)
    assert prefilled <= limits.max_step_tokens


def test_equal_priorities_are_admitted_in_order_of_arrival() -> None:
    scheduler = Scheduler(BlockManager(50, BLOCK_SIZE), SchedulerLimits(max_running=2))
    sequences = [_sequence(i, 5, most=2) for i in range(6)]
    for sequence in sequences:
        scheduler.add([sequence])
    order: list[int] = []
    while scheduler.running or scheduler.waiting:
        step = scheduler.schedule()
        order += [w.sequence.arrival for w in step if w.sequence.arrival not in order]
        for done in _compute(step):
            scheduler.remove(done)
    assert order == [0, 1, 2, 3, 4, 5]


def test_a_short_request_does_not_overtake_a_long_one_that_waits_for_blocks() -> None:
    scheduler = Scheduler(BlockManager(10, BLOCK_SIZE), SchedulerLimits())
    running, long, short = _sequence(0, 20), _sequence(1, 30), _sequence(2, 1)
    scheduler.add([running])
    scheduler.schedule()
    scheduler.add([long])
    scheduler.add([short])
    assert scheduler.schedule() == [Work(running, 20)]
    assert scheduler.waiting == [long, short]


def test_a_higher_priority_goes_first() -> None:
    scheduler = Scheduler(BlockManager(50, BLOCK_SIZE), SchedulerLimits(max_running=1))
    low, high = _sequence(0, 5), _sequence(1, 5, priority=1)
    scheduler.add([low])
    scheduler.add([high])
    assert [w.sequence for w in scheduler.schedule()] == [high]


def test_a_long_prompt_goes_in_pieces_beside_decodes() -> None:
    limits = SchedulerLimits(max_step_tokens=100, max_mixed_prefill_tokens=8)
    scheduler = Scheduler(BlockManager(50, BLOCK_SIZE), limits)
    decoding, long = _sequence(0, 4), _sequence(1, 20)
    scheduler.add([decoding])
    _compute(scheduler.schedule())
    scheduler.add([long])
    pieces = []
    for _ in range(3):
        step = scheduler.schedule()
        assert Work(decoding, 1) in step
        pieces += [w.num_tokens for w in step if w.sequence is long]
        _compute(step)
    assert pieces == [8, 8, 4]


def test_the_youngest_is_preempted_and_keeps_its_tokens() -> None:
    scheduler = Scheduler(BlockManager(4, BLOCK_SIZE), SchedulerLimits())
    old, young = _sequence(0, 7), _sequence(1, 7)
    scheduler.add([old])
    scheduler.add([young])
    _compute(scheduler.schedule())
    _compute(scheduler.schedule())
    tokens = list(young.token_ids)
    assert [w.sequence for w in scheduler.schedule()] == [old]  # the ninth token needs a block more
    assert (scheduler.waiting, young.num_computed, young.table) == ([young], 0, [])
    assert young.token_ids == tokens and scheduler.num_preemptions == 1


def test_a_full_queue_is_overloaded_and_takes_all_or_none() -> None:
    scheduler = Scheduler(BlockManager(4, BLOCK_SIZE), SchedulerLimits(max_waiting=3))
    scheduler.add([_sequence(0, 1), _sequence(1, 1)])
    with pytest.raises(PlatformError) as raised:
        scheduler.add([_sequence(2, 1), _sequence(3, 1)])
    assert raised.value.code is Code.OVERLOADED and raised.value.retryable
    assert len(scheduler.waiting) == 2


# The background: priorities below 0.


def test_the_background_adds_one_row_for_each_sequence_that_decodes() -> None:
    scheduler = Scheduler(BlockManager(50, BLOCK_SIZE), SchedulerLimits())
    background = [_sequence(i, 5, priority=-1) for i in range(2)]
    scheduler.add(background)
    _compute(scheduler.schedule())
    chat = _sequence(2, 20)
    scheduler.add([chat])
    assert scheduler.schedule()[-1] == Work(chat, 20)  # its prompt is not cut for the background's decodes
    for _ in range(3):
        _compute(scheduler.schedule())
    step = scheduler.schedule()
    assert step[0] == Work(chat, 1) and sorted(w.num_tokens for w in step) == [1, 1, 1]


def test_a_prompt_of_the_background_goes_in_small_pieces_beside_others_and_whole_alone() -> None:
    limits = SchedulerLimits(max_background_tokens=3)
    scheduler = Scheduler(BlockManager(50, BLOCK_SIZE), limits)
    chat, background = _sequence(0, 5, most=4), _sequence(1, 40, priority=-1)
    scheduler.add([chat])
    _compute(scheduler.schedule())
    scheduler.add([background])
    pieces = []
    while chat in scheduler.running:
        step = scheduler.schedule()
        assert step[0] == Work(chat, 1)
        pieces += [w.num_tokens for w in step[1:]]
        for done in _compute(step):
            scheduler.remove(done)
    assert pieces == [3, 3, 3] and scheduler.schedule() == [Work(background, 31)]


def test_the_background_makes_room_for_others_and_goes_on_later() -> None:
    for blocks, limits in ((4, SchedulerLimits()), (50, SchedulerLimits(max_running=1))):
        scheduler = Scheduler(BlockManager(blocks, BLOCK_SIZE), limits)
        background, chat = _sequence(0, 13, most=3, priority=-1), _sequence(1, 5, most=2)
        scheduler.add([background])
        _compute(scheduler.schedule())
        scheduler.add([chat])
        step = scheduler.schedule()
        assert [w.sequence for w in step] == [chat] and scheduler.waiting == [background]
        ended: list[Sequence] = []
        while scheduler.running or scheduler.waiting:
            done = _compute(step)
            for sequence in done:
                scheduler.remove(sequence)
            ended += done
            step = scheduler.schedule()
        assert ended == [chat, background] and scheduler.blocks.num_used == 0


def test_only_so_many_are_let_past_the_background() -> None:
    """Chats without end, one at a time in a batch of one: the background still gets its turn, once, and finishes."""
    scheduler = Scheduler(BlockManager(50, BLOCK_SIZE), SchedulerLimits(max_running=1))
    background = _sequence(0, 30, most=4, priority=-1)
    scheduler.add([_sequence(1, 5, most=2)])
    _compute(scheduler.schedule())
    scheduler.add([background])
    ended: list[int] = []
    for number in range(2, 400):
        if len(scheduler.waiting) < 3:
            scheduler.add([_sequence(number, 5, most=2)])
        for done in _compute(scheduler.schedule()):
            scheduler.remove(done)
            ended.append(done.arrival)
    assert MAX_OVERTAKEN <= ended.index(0) <= MAX_OVERTAKEN + 3
    assert background.num_preemptions == 0
