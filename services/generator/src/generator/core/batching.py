"""Our engine: a thread that plans a step, lets a runner compute it, and hands out what came of it.

Knows nothing of models or transports. One lock guards the scheduler and the requests; the thread holds it to plan and
to hand out (well under a millisecond a step) but not while the runner computes, so the event loop never waits for
arithmetic. A cancel marks its request and takes effect before the next step is planned.
"""

import asyncio
import contextvars
import logging
import random
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from chassis.errors import Code, PlatformError
from generator.core import requests
from generator.core.blocks import BlockManager
from generator.core.completion import Completion
from generator.core.engine import EngineStats, OutOfMemory, Runner
from generator.core.events import Done, Event, Finished, FinishReason, Started, Summary
from generator.core.requests import GenerationRequest, ModelSpec
from generator.core.scheduler import Scheduler, SchedulerLimits
from generator.core.sequences import Outcome, Sequence, Work
from generator.core.stream import OnSettled, TokenStream
from generator.core.text import Vocabulary

log = logging.getLogger(__name__)

_IDLE_WAIT_S = 1.0  # an idle engine looks at deadlines this often; work wakes it at once
_JOIN_TIMEOUT_S = 10.0


@dataclass(slots=True, eq=False)
class _Active:
    """A request that is in the engine: its sequences, their texts and the way back to its reader."""

    request: GenerationRequest
    stream: TokenStream
    on_settled: OnSettled
    context: contextvars.Context
    arrived_s: float
    sequences: list[Sequence]
    completions: list[Completion]
    is_cancelled: bool = False
    is_started: bool = False
    admitted_s: float | None = None
    first_token_s: float | None = None
    early: list[Event] = field(default_factory=list)  # events of other completions that must wait for `started`

    @property
    def is_finished(self) -> bool:
        return all(completion.reason is not None for completion in self.completions)


class BatchingEngine:
    """Continuous batching over a Runner. Start it on the event loop; close it when the servers have stopped."""

    def __init__(
        self,
        runner: Runner,
        vocabulary: Vocabulary,
        blocks: BlockManager,
        limits: SchedulerLimits,
        clock: Callable[[], float] = time.time,
    ) -> None:
        if blocks.num_blocks * blocks.block_size <= runner.model.context_length:
            raise PlatformError(
                Code.FAILED_PRECONDITION,
                f"KV memory holds {blocks.num_blocks * blocks.block_size} tokens, fewer than one context of "
                f"{runner.model.context_length}: raise kv_cache_mb or lower max_model_len",
            )
        self._runner = runner
        self._vocabulary = vocabulary
        self._clock = clock
        self._scheduler = Scheduler(blocks, limits)
        self._requests: dict[Sequence, _Active] = {}  # one entry for each unfinished sequence
        self._num_arrived = 0
        self._prompt_tokens_total = 0
        self._completion_tokens_total = 0
        self._draining = False
        self._closing = False
        self._failure: BaseException | None = None
        self._work = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._ended = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        # Wake-ups of one step go to the loop in one call.
        self._to_wake: dict[TokenStream, None] = {}
        self._settled: list[tuple[_Active, Summary]] = []

    # The event loop's side.

    @property
    def model(self) -> ModelSpec:
        return self._runner.model

    def start(self) -> None:
        """Starts the thread. Needs a running loop; warm the runner up first."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def submit(self, request: GenerationRequest, on_settled: OnSettled) -> TokenStream:
        """See Engine.submit."""
        requests.check(request, self.model)
        active = self._make_active(request, on_settled)
        with self._work:
            if self._draining or self._failure is not None:
                raise PlatformError(Code.UNAVAILABLE, "the generator is shutting down", retry_after_s=1.0)
            self._num_arrived += 1
            for sequence in active.sequences:
                sequence.arrival = self._num_arrived
            self._scheduler.add(active.sequences)
            self._requests.update(dict.fromkeys(active.sequences, active))
            self._work.notify()
        return active.stream

    def cancel(self, request_id: str) -> int:
        """See Engine.cancel."""
        with self._work:
            found = [a for a in self._actives() if a.request.request_id == request_id]
            for active in found:
                active.is_cancelled = True
            self._work.notify()
        return len(found)

    def stats(self) -> EngineStats:
        """See Engine.stats."""
        with self._work:
            scheduler = self._scheduler
            return EngineStats(
                running_sequences=len(scheduler.running),
                waiting_sequences=len(scheduler.waiting),
                blocks_used=scheduler.blocks.num_used,
                blocks_total=scheduler.blocks.num_blocks,
                prompt_tokens_total=self._prompt_tokens_total,
                completion_tokens_total=self._completion_tokens_total,
                preemptions_total=scheduler.num_preemptions,
            )

    def drain(self) -> None:
        """See Engine.drain."""
        with self._work:
            self._draining = True

    async def watch(self) -> None:
        """Returns when the engine was closed; raises what its thread died of."""
        await self._ended.wait()
        if self._failure is not None:
            raise RuntimeError("the engine's thread died") from self._failure

    async def close(self) -> None:
        """Cancels what is left and ends the thread."""
        with self._work:
            self._draining = self._closing = True
            for active in self._requests.values():
                active.is_cancelled = True
            self._work.notify()
        await asyncio.to_thread(self._thread.join, _JOIN_TIMEOUT_S)

    def _make_active(self, request: GenerationRequest, on_settled: OnSettled) -> _Active:
        most = requests.max_new_tokens(request, self.model)
        eos = self.model.eos_token_ids
        suppressed = tuple(eos | frozenset(request.stop.stop_token_ids)) if request.stop.min_tokens else ()
        seed = random.getrandbits(64) if request.sampling.seed is None else request.sampling.seed
        active = _Active(
            request=request,
            stream=TokenStream(lambda: self._cancel_active(active)),
            on_settled=on_settled,
            context=contextvars.copy_context(),
            arrived_s=self._clock(),
            sequences=[Sequence(request, i, 0, seed, most, suppressed) for i in range(request.n)],
            completions=[Completion(i, request.stop, most, eos, self._vocabulary) for i in range(request.n)],
        )
        return active

    def _actives(self) -> list[_Active]:
        return list(dict.fromkeys(self._requests.values()))

    def _cancel_active(self, active: _Active) -> None:
        with self._work:
            active.is_cancelled = True
            self._work.notify()

    # The engine's thread.

    def _run(self) -> None:
        try:
            while not (self._closing and not self._requests):
                self._step()
        except BaseException as error:  # the last edge: whatever it is, nobody may wait for a dead thread
            log.critical("engine thread died", exc_info=error)
            with self._work:
                self._failure = error
                for active in self._actives():
                    self._fail(active, PlatformError(Code.INTERNAL, "the engine failed; its log has the cause"))
            self._notify()
        finally:
            self._call_on_loop(self._ended.set)

    def _step(self) -> None:
        with self._work:
            self._reap()
            step = self._scheduler.schedule()
            self._note_admissions(step)
            if not step and not self._settled and not self._closing:
                self._work.wait(_IDLE_WAIT_S)
        self._notify()
        if not step:
            return
        try:
            outcomes = self._runner.execute(step)
        except OutOfMemory as error:
            self._fail_largest(step, error)
        else:
            with self._work:
                for work, outcome in zip(step, outcomes, strict=True):
                    self._take(work, outcome)
        self._notify()

    def _reap(self) -> None:
        """Ends what was cancelled and what nobody waits for any more, before blocks are given out."""
        now_s = self._clock()
        for active in self._actives():
            deadline_s = active.request.deadline_unix_s
            if active.is_cancelled:
                self._end_all(active, FinishReason.CANCELLED)
            elif deadline_s is not None and now_s >= deadline_s:
                self._end_all(active, FinishReason.DEADLINE)

    def _note_admissions(self, step: list[Work]) -> None:
        for work in step:
            active = self._requests[work.sequence]
            if active.admitted_s is not None:
                continue
            active.admitted_s = self._clock()
            self._prompt_tokens_total += len(active.request.prompt_ids)
            if active.request.prompt_logprobs is None:
                self._start(active)

    def _start(self, active: _Active) -> None:
        active.is_started = True
        scores = tuple(active.sequences[0].prompt_logprobs)
        early, active.early = active.early, []
        self._push(active, [Started(len(active.request.prompt_ids), scores), *early])

    def _take(self, work: Work, outcome: Outcome) -> None:
        """Enters the outcome of one work: progress, prompt scores, the new token, perhaps the end."""
        sequence = work.sequence
        active = self._requests[sequence]
        sequence.num_computed = work.end
        sequence.prompt_logprobs.extend(outcome.prompt_logprobs)
        if not active.is_started and sequence.index == 0 and sequence.num_computed >= sequence.num_prompt:
            self._start(active)
        completion = active.completions[sequence.index]
        if outcome.token_id is not None:
            if active.first_token_s is None:
                active.first_token_s = self._clock()
            self._completion_tokens_total += 1
            sequence.token_ids.append(outcome.token_id)
            delta = completion.add(outcome.token_id, outcome.logprob)
            if delta is not None:
                self._push(active, [delta])
        elif sequence.max_new_tokens == 0 and sequence.num_computed == sequence.num_prompt:
            completion.end(FinishReason.LENGTH)
        if completion.reason is not None:
            self._finish(active, sequence, completion)

    def _finish(self, active: _Active, sequence: Sequence, completion: Completion) -> None:
        """Frees a sequence and tells its end; with the last one the request is done."""
        assert completion.reason is not None
        self._drop(sequence)
        self._push(active, [Finished(completion.index, completion.reason, completion.stop_match)])
        if active.is_finished:
            if not active.is_started:  # ended before its prompt was read
                self._start(active)
            summary = self._summarise(active, [c.reason for c in active.completions if c.reason is not None])
            self._push(active, [Done(summary)])
            self._settled.append((active, summary))

    def _end_all(self, active: _Active, reason: FinishReason) -> None:
        for sequence, completion in zip(active.sequences, active.completions, strict=True):
            if completion.reason is None:
                delta = completion.end(reason)
                if delta is not None:
                    self._push(active, [delta])
                self._finish(active, sequence, completion)

    def _fail(self, active: _Active, error: PlatformError) -> None:
        """Ends a request with an error in place of the rest of its events."""
        for sequence, completion in zip(active.sequences, active.completions, strict=True):
            if completion.reason is None:
                completion.reason = FinishReason.ERROR
                self._drop(sequence)
        active.stream.fail(error)
        self._to_wake[active.stream] = None
        self._settled.append((active, self._summarise(active, [FinishReason.ERROR] * active.request.n)))

    def _fail_largest(self, step: list[Work], error: OutOfMemory) -> None:
        """Out of memory is the error of the request that asked for most; the others' step is planned again."""
        with self._work:
            largest = max(step, key=lambda work: (work.num_tokens, len(work.sequence.token_ids)))
            active = self._requests[largest.sequence]
            log.error("step ran out of memory", extra={"num_tokens": largest.num_tokens, "cause": str(error)})
            message = "the engine ran out of memory for this request"
            self._fail(active, PlatformError(Code.OVERLOADED, message, reason="out_of_memory", retry_after_s=1.0))

    def _drop(self, sequence: Sequence) -> None:
        self._scheduler.remove(sequence)
        del self._requests[sequence]

    def _summarise(self, active: _Active, reasons: list[FinishReason]) -> Summary:
        return Summary(
            request_id=active.request.request_id,
            num_prompt=len(active.request.prompt_ids),
            num_completion=sum(completion.num_tokens for completion in active.completions),
            num_cached=0,
            reasons=tuple(reasons),
            num_preemptions=sum(sequence.num_preemptions for sequence in active.sequences),
            arrived_s=active.arrived_s,
            admitted_s=active.admitted_s,
            first_token_s=active.first_token_s,
            finished_s=self._clock(),
        )

    def _push(self, active: _Active, events: Iterable[Event]) -> None:
        if not active.is_started:
            active.early.extend(events)
            return
        active.stream.push(events)
        self._to_wake[active.stream] = None

    # From the thread to the loop.

    def _notify(self) -> None:
        """Hands the step's wake-ups and endings to the loop, without the lock."""
        to_wake, self._to_wake = list(self._to_wake), {}
        settled, self._settled = self._settled, []
        if to_wake:
            self._call_on_loop(_wake_all, to_wake)
        for active, summary in settled:
            self._call_on_loop(active.context.run, active.on_settled, summary)

    def _call_on_loop(self, function: Callable[..., object], *arguments: object) -> None:
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:  # the loop is closed: the process is ending and nobody reads any more
            log.debug("the loop was closed before the engine")


def _wake_all(streams: list[TokenStream]) -> None:
    for stream in streams:
        stream.wake()
