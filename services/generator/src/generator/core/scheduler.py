"""Decides at every step which sequences run and for how many tokens. Knows no model and no clock.

Continuous batching: a sequence joins as soon as there is room and leaves as soon as it has finished. There is no
prefill phase: each step computes, for every chosen sequence, some of the tokens that are not computed yet, so a long
prompt goes in pieces beside the decoding of others (chunked prefill, Sarathi-Serve, arXiv 2403.02310).

A priority below 0 is the background (evaluations, batches): beside others it gets a few tokens of a step and no more,
and it makes room for them, but no more than MAX_OVERTAKEN of them are let past it.
"""

import bisect
from dataclasses import dataclass

from chassis.errors import Code, PlatformError
from generator.core.blocks import BlockManager
from generator.core.sequences import Sequence, Work


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    """Bounds of a step and of the queue, in sequences and tokens."""

    max_running: int = 32
    max_waiting: int = 256
    # A step without decodes may prefill more tokens at once; beside decodes it must stay short, or streams stutter.
    max_step_tokens: int = 128
    max_mixed_prefill_tokens: int = 64
    # Of all background sequences together, prompts and decodes, beside others. Eight rows more make a decoding step a
    # quarter longer on two cores, 64 make it three times as long.
    max_background_tokens: int = 8


@dataclass(slots=True)
class _Budget:
    """Tokens that are left in a step: for prompts, and for the background where it is not alone (else None)."""

    prefill: int
    background: int | None

    def tokens_for(self, sequence: Sequence) -> int:
        """Returns how many tokens a sequence may compute; a decode of the foreground is never held back."""
        missing = len(sequence.token_ids) - sequence.num_computed
        if sequence.is_background and self.background is not None:
            return min(missing, self.background)
        if missing == 1 and sequence.num_computed:
            return 1
        return min(missing, self.prefill)

    def take(self, sequence: Sequence, num_tokens: int) -> None:
        """Books what a sequence got."""
        if sequence.is_background and self.background is not None:
            self.background -= num_tokens
        elif len(sequence.token_ids) - sequence.num_computed > 1 or not sequence.num_computed:
            self.prefill -= num_tokens


class Scheduler:
    """Owns the waiting queue, the running list and the blocks. Not thread-safe: the engine guards it.

    Invariants: a sequence is waiting, running or gone; only running ones hold blocks; the first in order is never
    preempted, so as long as one full context fits into the blocks every sequence ends.
    """

    def __init__(self, blocks: BlockManager, limits: SchedulerLimits) -> None:
        self.blocks = blocks
        self._limits = limits
        self.waiting: list[Sequence] = []  # sorted by order
        self.running: list[Sequence] = []  # sorted by order
        self.num_preemptions = 0

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

    def schedule(self) -> list[Work]:
        """Plans the next step: first what runs, in order, then new sequences. Empty where nothing waits or runs."""
        self._make_room()
        budget = self._budget()
        step: list[Work] = []
        preempted = False
        for sequence in tuple(self.running):
            if sequence not in self.running:  # preempted for one before it
                continue
            num_tokens = budget.tokens_for(sequence)
            if num_tokens <= 0:
                continue
            while not self.blocks.grow(sequence.table, sequence.num_computed + num_tokens):
                preempted = True
                if self._preempt_last() is sequence:
                    break
            else:
                step.append(Work(sequence, num_tokens))
                budget.take(sequence, num_tokens)
        if not preempted:  # room that a preemption made belongs to those who run
            self._admit(step, budget)
        return step

    def _budget(self) -> "_Budget":
        is_shared = any(not s.is_background for place in (self.running, self.waiting) for s in place)
        decoding = [s for s in self.running if len(s.token_ids) - s.num_computed == 1]
        prefill = self._limits.max_step_tokens - len(decoding)
        if any(not s.is_background or not is_shared for s in decoding):
            prefill = min(prefill, self._limits.max_mixed_prefill_tokens)
        return _Budget(prefill, self._limits.max_background_tokens if is_shared else None)

    def _make_room(self) -> None:
        """Sends sequences of the background back while the first that waits finds no room because of them."""
        while self.waiting and not self.waiting[0].yields and self.running and self.running[-1].yields:
            if len(self.running) < self._limits.max_running and self._has_blocks_for(self.waiting[0]):
                return
            self._preempt_last()

    def _admit(self, step: list[Work], budget: "_Budget") -> None:
        """Admits in strict order: the first that does not fit holds back all behind it, so nobody starves."""
        while self.waiting and len(self.running) < self._limits.max_running:
            sequence = self.waiting[0]
            num_tokens = budget.tokens_for(sequence)
            if num_tokens <= 0 and sequence.is_background and not sequence.yields:
                num_tokens = 1  # it has waited long enough, and must not hold back others for want of a token
            if num_tokens <= 0 or not self._has_blocks_for(sequence):
                return
            grown = self.blocks.grow(sequence.table, num_tokens)
            assert grown
            self.waiting.pop(0)
            bisect.insort(self.running, sequence, key=lambda s: s.order)
            step.append(Work(sequence, num_tokens))
            budget.take(sequence, num_tokens)
            self._note_overtaken(sequence)

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
        return self.blocks.blocks_for(len(sequence.token_ids) + 1) <= self._free_of_claims()

    def _free_of_claims(self) -> int:
        """Free blocks less those that running prompts will still need."""
        claimed = sum(max(0, self.blocks.blocks_for(len(s.token_ids)) - len(s.table)) for s in self.running)
        return self.blocks.num_free - claimed

    def _preempt_last(self) -> Sequence:
        """Sends the last in order back to the queue; it will be computed anew (preemption by recompute)."""
        victim = self.running.pop()
        self.blocks.release(victim.table)
        victim.num_computed = 0
        victim.num_preemptions += 1
        self.num_preemptions += 1
        bisect.insort(self.waiting, victim, key=lambda s: s.order)
        return victim
