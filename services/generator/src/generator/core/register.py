"""The requests that are in the engine, and what a step's outcomes mean for each: events, its end, its account.

Not thread-safe: the engine's lock guards it. Nothing here waits; what is to be told goes into the outbox.
"""

import logging
from collections.abc import Callable, Iterable

from chassis.errors import Code, PlatformError
from generator.core.active import Active
from generator.core.adapters import AdapterTable
from generator.core.completion import Completion
from generator.core.engine import OutOfMemory
from generator.core.events import Done, Event, Finished, FinishReason, Started, Summary
from generator.core.outbox import Outbox
from generator.core.scheduler import Scheduler
from generator.core.sequences import Outcome, Sampled, Sequence, Work

log = logging.getLogger(__name__)


class Register:
    """One entry for each unfinished sequence. It adds and removes them in the scheduler, and counts tokens."""

    def __init__(
        self, scheduler: Scheduler, adapters: AdapterTable, outbox: Outbox, clock: Callable[[], float]
    ) -> None:
        self._scheduler = scheduler
        self._adapters = adapters
        self._outbox = outbox
        self._clock = clock
        self._active_of: dict[Sequence, Active] = {}
        self._num_arrived = 0
        self.num_prompt_tokens = 0
        self.num_completion_tokens = 0
        self.num_draft_tokens = 0
        self.num_accepted_tokens = 0

    def actives(self) -> list[Active]:
        """Returns the unfinished requests, in order of arrival."""
        return list(dict.fromkeys(self._active_of.values()))

    def add(self, active: Active) -> None:
        """Queues a request. Raises PlatformError(OVERLOADED), with nothing changed, where the queue is full."""
        self._num_arrived += 1
        for sequence in active.sequences:
            sequence.arrival = self._num_arrived
        self._scheduler.add(active.sequences)
        self._active_of.update(dict.fromkeys(active.sequences, active))
        if active.adapter is not None:
            self._adapters.acquire(active.adapter)

    def reap(self) -> None:
        """Ends what was cancelled and what nobody waits for any more, before blocks are given out."""
        now_s = self._clock()
        for active in self.actives():
            deadline_s = active.request.deadline_unix_s
            if active.is_cancelled:
                self._end_all(active, FinishReason.CANCELLED)
            elif deadline_s is not None and now_s >= deadline_s:
                self._end_all(active, FinishReason.DEADLINE)

    def note_admissions(self, step: list[Work]) -> None:
        """Notes which requests run for the first time in a step."""
        for work in step:
            active = self._active_of[work.sequence]
            if active.admitted_s is not None:
                continue
            active.admitted_s = self._clock()
            self.num_prompt_tokens += len(active.request.prompt_ids)
            if active.request.prompt_logprobs is None:
                self._start(active)

    def _start(self, active: Active) -> None:
        active.is_started = True
        scores = tuple(active.sequences[0].prompt_logprobs)
        early, active.early = active.early, []
        self._push(active, [Started(len(active.request.prompt_ids), scores, active.model_version), *early])

    def take(self, work: Work, outcome: Outcome) -> None:
        """Enters the outcome of one work: progress, prompt scores, the new tokens, perhaps the end."""
        sequence = work.sequence
        active = self._active_of.get(sequence)
        if active is None:  # its request failed with another of its sequences, in this very step
            return
        sequence.num_computed = work.end
        sequence.prompt_logprobs.extend(outcome.prompt_logprobs)
        if not active.is_started and sequence.index == 0 and sequence.num_computed >= sequence.num_prompt:
            self._start(active)
        completion = active.completions[sequence.index]
        if work.drafts and sequence.lookup is not None:
            sequence.lookup.note(len(outcome.tokens) - 1)
            self.num_draft_tokens += len(work.drafts)
            self.num_accepted_tokens += len(outcome.tokens) - 1
        try:
            for place, sampled in enumerate(outcome.tokens):
                sequence.num_computed += place > 0  # the token before was a draft: its keys and values are there
                self._add(active, sequence, completion, sampled)
                if completion.reason is not None:  # what was sampled past a stop does not exist
                    break
        except PlatformError as error:
            self.fail(active, error)
            return
        self._scheduler.seal(sequence)
        if sequence.max_new_tokens == 0 and sequence.num_computed == sequence.num_prompt:
            completion.end(FinishReason.LENGTH)
        if completion.reason is not None:
            self._finish(active, sequence, completion)

    def _add(self, active: Active, sequence: Sequence, completion: Completion, sampled: Sampled) -> None:
        """Enters one token. Raises PlatformError where a grammar cannot go on."""
        if active.first_token_s is None:
            active.first_token_s = self._clock()
        sequence.token_ids.append(sampled.token_id)
        if sequence.matcher is not None:  # first of all: an end token may be all that is left where a mask failed
            sequence.matcher.accept(sampled.token_id)
        self.num_completion_tokens += 1  # with the completion's own count, also where the matcher raised
        deltas = [completion.add(sampled.token_id, sampled.logprob)]
        if sequence.matcher is not None and completion.reason is None and sequence.matcher.is_done:
            deltas.append(completion.end(FinishReason.STOP))
        shown = [delta for delta in deltas if delta is not None]
        if shown:
            self._push(active, shown)

    def _finish(self, active: Active, sequence: Sequence, completion: Completion) -> None:
        """Frees a sequence and tells its end; with the last one the request is done."""
        assert completion.reason is not None
        self._drop(sequence)
        self._push(active, [Finished(completion.index, completion.reason, completion.stop_match)])
        if active.is_finished:
            if not active.is_started:  # ended before its prompt was read
                self._start(active)
            summary = self._settle(active, [c.reason for c in active.completions if c.reason is not None])
            self._push(active, [Done(summary)])

    def _end_all(self, active: Active, reason: FinishReason) -> None:
        for sequence, completion in zip(active.sequences, active.completions, strict=True):
            if completion.reason is None:
                delta = completion.end(reason)
                if delta is not None:
                    self._push(active, [delta])
                self._finish(active, sequence, completion)

    def fail(self, active: Active, error: PlatformError) -> None:
        """Ends a request with an error in place of the rest of its events."""
        for sequence, completion in zip(active.sequences, active.completions, strict=True):
            if completion.reason is None:
                completion.reason = FinishReason.ERROR
                self._drop(sequence)
        active.stream.fail(error)
        self._outbox.wake(active.stream)
        self._settle(active, [FinishReason.ERROR] * active.request.n)

    def fail_largest(self, step: list[Work], error: OutOfMemory) -> None:
        """Out of memory is the error of the request that asked for most; the others' step is planned again."""
        largest = max(step, key=lambda work: (work.num_tokens, len(work.sequence.token_ids)))
        active = self._active_of[largest.sequence]
        log.error("step ran out of memory", extra={"num_tokens": largest.num_tokens, "cause": str(error)})
        message = "the engine ran out of memory for this request"
        self.fail(active, PlatformError(Code.OVERLOADED, message, reason="out_of_memory", retry_after_s=1.0))

    def _drop(self, sequence: Sequence) -> None:
        self._scheduler.remove(sequence)
        del self._active_of[sequence]

    def _settle(self, active: Active, reasons: list[FinishReason]) -> Summary:
        """Notes that a request has ended: it holds nothing any more, and its end will be told on the loop."""
        summary = active.summarise(reasons, self._clock())
        self._outbox.settle(active, summary)
        if active.adapter is not None and self._adapters.release(active.adapter):
            self._outbox.leave(active.adapter)
        return summary

    def _push(self, active: Active, events: Iterable[Event]) -> None:
        if not active.is_started:
            active.early.extend(events)
            return
        active.stream.push(events)
        self._outbox.wake(active.stream)
