"""Decides at every step which sequences run and for how many tokens. Knows no model and no clock.

Continuous batching: a sequence joins as soon as there is room and leaves as soon as it has finished. There is no
prefill phase: each step computes, for every chosen sequence, some of the tokens that are not computed yet, so a long
prompt goes in pieces beside the decoding of others (chunked prefill, Sarathi-Serve, arXiv 2403.02310). How large the
pieces are follows from how long steps took (core/pacing.py).

A priority below 0 is the background (evaluations, batches): beside others it gets a few tokens of a step and no more,
and it makes room for them, but no more than MAX_OVERTAKEN of them are let past it.
"""

import bisect
from dataclasses import dataclass

from chassis.errors import Code, PlatformError
from generator.core import prefixes
from generator.core.blocks import BlockManager
from generator.core.budget import StepBudget
from generator.core.pacing import StepPacer
from generator.core.sequences import Sequence, Work

_LEAST_RIGHT = 0.25  # drafts that must be right on average, however cheap they are


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    """Bounds of a step and of the queue, in sequences and tokens."""

    max_running: int = 32
    max_waiting: int = 256
    max_step_tokens: int = 128
    # Beside decodes. A prompt of which no more is missing goes in as fast as it can: a step or two that are longer. A
    # longer one would make streams stutter, so it goes in pieces with which steps take max_slowdown times as long.
    max_mixed_prefill_tokens: int = 256
    max_slowdown: float = 1.8
    # Of all background sequences together, prompts and decodes, beside others. Eight rows more make a decoding step a
    # quarter longer on two cores, 64 make it three times as long.
    max_background_tokens: int = 8
    # Drafts cost rows, and rows are cheap only where few decode.
    max_drafts: int = 4  # for each sequence; 0 for no speculation
    max_speculative_batch: int = 4


class Scheduler:
    """Owns the waiting queue, the running list and the blocks. Not thread-safe: the engine guards it.

    Invariants: a sequence is waiting, running or gone; only running ones hold blocks; the first in order is never
    preempted, so as long as one full context fits into the blocks every sequence ends.
    """

    def __init__(self, blocks: BlockManager, limits: SchedulerLimits) -> None:
        self.blocks = blocks
        self._limits = limits
        self.pacer = StepPacer(limits.max_slowdown)
        self.waiting: list[Sequence] = []  # sorted by order
        self.running: list[Sequence] = []  # sorted by order
        self.num_preemptions = 0
        self.num_looked_up = 0  # prompt tokens of admitted sequences
        self.num_found = 0  # those of them that were in the prefix cache

    def add(self, sequences: list[Sequence]) -> None:
        """Queues a request's sequences, all or none. Raises PlatformError(OVERLOADED) where the queue is full."""
        if len(self.waiting) + len(sequences) > self._limits.max_waiting:
            raise PlatformError(
                Code.OVERLOADED,
                f"the engine's queue is full ({len(self.waiting)} of {self._limits.max_waiting} sequences wait)",
                retry_after_s=1.0,
            )
        for sequence in sequences:
            bisect.insort(self.waiting, sequence, key=lambda s: s.order)

    def remove(self, sequence: Sequence) -> None:
        """Takes a sequence out, whatever it was doing, and frees its blocks. Never between schedule and its step."""
        for place in (self.running, self.waiting):
            if sequence in place:
                place.remove(sequence)
        self.blocks.release(sequence.table)

    def seal(self, sequence: Sequence) -> None:
        """Lets others use the blocks that a sequence has filled; to be called when a step has been computed."""
        num_full = sequence.num_computed // self.blocks.block_size
        if num_full > sequence.num_sealed and self.blocks.caches_prefixes:
            self._extend_keys(sequence, num_full)
            for place in range(sequence.num_sealed, num_full):
                self.blocks.seal(sequence.table[place], sequence.block_keys[place])
            sequence.num_sealed = num_full

    def schedule(self) -> list[Work]:
        """Plans the next step: first what runs, in order, then new sequences. Empty where nothing waits or runs."""
        self._make_room()
        decoding = [s for s in self.running if len(s.token_ids) - s.num_computed == 1]
        drafts = self._propose(decoding)
        budget = self._budget(decoding, sum(map(len, drafts.values())))
        step: list[Work] = []
        preempted = False
        for sequence in tuple(self.running):
            if sequence not in self.running:  # preempted for one before it
                continue
            num_tokens = budget.tokens_for(sequence)
            if num_tokens <= 0:
                continue
            work = Work(sequence, num_tokens, drafts.get(sequence, ()))
            while not self.blocks.grow(sequence.table, work.reach):
                if work.drafts:  # a guess is not worth a preemption
                    work = Work(sequence, num_tokens)
                    continue
                preempted = True
                if self._preempt_last() is sequence:
                    break
            else:
                step.append(work)
                budget.take(sequence, num_tokens)
        if not preempted:  # room that a preemption made belongs to those who run
            self._admit(step, budget)
        return step

    def _propose(self, decoding: list[Sequence]) -> dict[Sequence, tuple[int, ...]]:
        """Returns drafts for those that decode, where few do and guesses were worth their rows before."""
        limits = self._limits
        most = min(limits.max_drafts, limits.max_step_tokens // max(1, len(decoding)) - 1)
        if not decoding or len(decoding) > limits.max_speculative_batch or most <= 0:
            return {}
        slowdown = self.pacer.slowdown(len(decoding), most)
        least_right = _LEAST_RIGHT if slowdown is None else max(_LEAST_RIGHT, (slowdown - 1) * len(decoding))
        drafts = {}
        for sequence in decoding:
            if sequence.lookup is not None and not sequence.is_suppressing and not sequence.is_background:
                room = min(most, sequence.max_new_tokens - sequence.num_new - 1)
                proposal = sequence.lookup.propose(sequence.token_ids, room, least_right)
                if proposal:
                    drafts[sequence] = proposal
        return drafts

    def _budget(self, decoding: list[Sequence], num_drafts: int) -> StepBudget:
        limits = self._limits
        is_shared = any(not s.is_background for place in (self.running, self.waiting) for s in place)
        budget = StepBudget(
            prefill=max(0, limits.max_step_tokens - len(decoding) - num_drafts),
            background=limits.max_background_tokens if is_shared else None,
        )
        num_streams = sum(1 for s in decoding if not s.is_background or not is_shared)
        if num_streams:
            budget.prefill = min(budget.prefill, limits.max_mixed_prefill_tokens)
            num_prompts = len(self.running) - len(decoding) + len(self.waiting)
            budget.long = self.pacer.prompt_tokens(num_streams + num_drafts, num_prompts)
        return budget

    def _make_room(self) -> None:
        """Sends sequences of the background back while the first that waits finds no room because of them."""
        while self.waiting and not self.waiting[0].yields and self.running and self.running[-1].yields:
            if len(self.running) < self._limits.max_running and self._has_blocks_for(self.waiting[0]):
                return
            self._preempt_last()

    def _admit(self, step: list[Work], budget: StepBudget) -> None:
        """Admits in strict order: the first that does not fit holds back all behind it, so nobody starves."""
        place = 0
        while place < len(self.waiting) and len(self.running) < self._limits.max_running:
            sequence = self.waiting[place]
            found = self._find_prefix(sequence)
            if self._is_coming(sequence, len(found)):
                place += 1
                continue
            num_cached = len(found) * self.blocks.block_size
            sequence.is_long = len(sequence.token_ids) - num_cached > self._limits.max_mixed_prefill_tokens
            num_tokens = budget.tokens_for(sequence, num_cached)
            if num_tokens <= 0 and sequence.is_background and not sequence.yields:
                num_tokens = 1  # it has waited long enough, and must not hold back others for want of a token
            if num_tokens <= 0 or not self._has_blocks_for(sequence):
                return
            self._adopt(sequence, found)
            grown = self.blocks.grow(sequence.table, sequence.num_computed + num_tokens)
            assert grown
            self.waiting.pop(place)
            bisect.insort(self.running, sequence, key=lambda s: s.order)
            step.append(Work(sequence, num_tokens))
            budget.take(sequence, num_tokens)
            self._note_overtaken(sequence)

    def _find_prefix(self, sequence: Sequence) -> list[int]:
        """Returns the cached blocks that a waiting sequence could begin with."""
        if not self.blocks.caches_prefixes:
            return []
        num_blocks = sequence.num_reusable // self.blocks.block_size
        self._extend_keys(sequence, num_blocks)
        return self.blocks.find(sequence.block_keys[:num_blocks])

    def _is_coming(self, sequence: Sequence, num_found: int) -> bool:
        """Whether one that goes first is computing the very block that a waiting one needs next.

        So the n completions of a prompt, and requests that come together with one system prompt, compute it once.
        """
        if num_found >= sequence.num_reusable // self.blocks.block_size or not sequence.block_keys:
            return False
        key, end = sequence.block_keys[num_found], (num_found + 1) * self.blocks.block_size
        return any(
            other.num_computed < end and other.block_keys[num_found : num_found + 1] == [key]
            for other in self.running
            if other.order < sequence.order
        )

    def _adopt(self, sequence: Sequence, found: list[int]) -> None:
        self.blocks.adopt(sequence.table, found)
        sequence.num_sealed = len(found)
        sequence.num_computed = len(found) * self.blocks.block_size
        if sequence.num_preemptions == 0:
            sequence.num_cached = sequence.num_computed
            self.num_looked_up += sequence.num_prompt
            self.num_found += sequence.num_cached

    def _extend_keys(self, sequence: Sequence, num_blocks: int) -> None:
        prefixes.extend(
            sequence.block_keys, sequence.cache_root, sequence.token_ids, self.blocks.block_size, num_blocks
        )

    def _note_overtaken(self, admitted: Sequence) -> None:
        """Counts, for the one in the background that has waited longest, that a later one was let past it."""
        patient = [s for s in self.waiting if s.yields and s.arrival < admitted.arrival]
        if patient:
            longest = min(patient, key=lambda s: (s.arrival, s.index))
            self.waiting.remove(longest)
            longest.num_overtaken += 1
            bisect.insort(self.waiting, longest, key=lambda s: s.order)

    def _has_blocks_for(self, sequence: Sequence) -> bool:
        """The whole prompt must fit now, though only a piece is computed: or half-read prompts preempt each other."""
        needed = self.blocks.num_needed(len(sequence.token_ids) + 1, self._find_prefix(sequence))
        return needed <= self._free_of_claims()

    def _free_of_claims(self) -> int:
        """Free blocks less those that running prompts will still need."""
        claimed = sum(max(0, self.blocks.blocks_for(len(s.token_ids)) - len(s.table)) for s in self.running)
        return self.blocks.num_free - claimed

    def _preempt_last(self) -> Sequence:
        """Sends the last in order back to the queue; it will be computed anew (preemption by recompute)."""
        victim = self.running.pop()
        self.blocks.release(victim.table)
        victim.num_computed = victim.num_sealed = 0
        victim.num_preemptions += 1
        self.num_preemptions += 1
        bisect.insort(self.waiting, victim, key=lambda s: s.order)
        return victim
