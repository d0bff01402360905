"""Our engine: a thread that plans a step, lets a runner compute it, and hands out what came of it.

Knows nothing of models or transports. One lock guards the scheduler and the requests; the thread holds it to plan and
to hand out (well under a millisecond a step) but not while the runner computes, so the event loop never waits for
arithmetic. A cancel marks its request and takes effect before the next step is planned.
"""

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import replace

from chassis.errors import Code, PlatformError
from generator.core import probe, requests
from generator.core.active import Active, make_active
from generator.core.adapters import (
    AdapterFiles,
    AdapterLimits,
    AdapterSpec,
    AdapterTable,
    LoadedAdapter,
    not_loaded,
)
from generator.core.blocks import BlockManager
from generator.core.completion import Completion
from generator.core.engine import EngineStats, OutOfMemory, Runner
from generator.core.events import Done, Event, Finished, FinishReason, Started, Summary
from generator.core.grammar import GrammarCompiler
from generator.core.outbox import Outbox
from generator.core.requests import GenerationRequest, ModelSpec
from generator.core.scheduler import Scheduler, SchedulerLimits
from generator.core.sequences import Outcome, Sampled, Sequence, Work
from generator.core.steps import StepReport, report
from generator.core.stream import OnSettled, TokenStream
from generator.core.text import Vocabulary

log = logging.getLogger(__name__)

_IDLE_WAIT_S = 1.0  # an idle engine looks at deadlines this often; work wakes it at once
_JOIN_TIMEOUT_S = 10.0


class BatchingEngine:
    """Continuous batching over a Runner. Start it on the event loop; close it when the servers have stopped."""

    def __init__(
        self,
        runner: Runner,
        vocabulary: Vocabulary,
        blocks: BlockManager,
        limits: SchedulerLimits,
        adapter_limits: AdapterLimits = AdapterLimits(),
        grammars: GrammarCompiler | None = None,
        on_step: Callable[[StepReport], None] = lambda _: None,
        clock: Callable[[], float] = time.time,
        stopwatch: Callable[[], float] = time.perf_counter,
    ) -> None:
        """`on_step` hears of every step, on the engine's thread: it may neither block nor raise."""
        if blocks.num_blocks * blocks.block_size <= runner.model.context_length:
            raise PlatformError(
                Code.FAILED_PRECONDITION,
                f"KV memory holds {blocks.num_blocks * blocks.block_size} tokens, fewer than one context of "
                f"{runner.model.context_length}: raise kv_cache_mb or lower max_model_len",
            )
        self._runner = runner
        self._model = runner.model
        if grammars is not None:
            self._model = replace(runner.model, capabilities=runner.model.capabilities | {"grammar"})
        self.grammars = grammars  # for api: what compiles a request's grammar before it is submitted
        self._vocabulary = vocabulary
        self._on_step = on_step
        self._clock = clock
        self._stopwatch = stopwatch
        self._scheduler = Scheduler(blocks, limits)
        self._adapters = AdapterTable(adapter_limits)
        self._requests: dict[Sequence, Active] = {}  # one entry for each unfinished sequence
        self._num_arrived = 0
        self._prompt_tokens_total = 0
        self._completion_tokens_total = 0
        self._draining = False
        self._closing = False
        self._failure: BaseException | None = None
        self._work = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._ended = asyncio.Event()
        self._outbox = Outbox(self._adapters.tell_unused)

    # The event loop's side.

    @property
    def model(self) -> ModelSpec:
        return self._model

    def start(self) -> None:
        """Starts the thread. Needs a running loop; warm the runner up first."""
        self._outbox.attach()
        self._thread.start()

    def submit(self, request: GenerationRequest, on_settled: OnSettled) -> TokenStream:
        """See Engine.submit."""
        requests.check(request, self.model)
        assert request.grammar is None or request.compiled is not None
        with self._work:
            adapter = self._adapters.get(request.adapter) if request.adapter else None
        if request.adapter and adapter is None:
            raise not_loaded(request.adapter)
        return self._submit(request, on_settled, adapter)

    def _submit(self, request: GenerationRequest, on_settled: OnSettled, adapter: LoadedAdapter | None) -> TokenStream:
        active = make_active(
            request, self.model, self._vocabulary, adapter, self._cancel_active, on_settled, self._clock()
        )
        with self._work:
            if self._draining or self._failure is not None:
                raise PlatformError(Code.UNAVAILABLE, "the generator is shutting down", retry_after_s=1.0)
            self._num_arrived += 1
            for sequence in active.sequences:
                sequence.arrival = self._num_arrived
            self._scheduler.add(active.sequences)
            self._requests.update(dict.fromkeys(active.sequences, active))
            if adapter is not None:
                self._adapters.acquire(adapter)
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

    def adapters(self) -> tuple[AdapterSpec, ...]:
        """See AdapterHost.adapters."""
        with self._work:
            return self._adapters.specs()

    async def load_adapter(self, files: AdapterFiles, *, may_evict: bool = True) -> AdapterSpec:
        """See AdapterHost.load_adapter. Weights are read on a thread and swapped in between two steps."""
        spec = files.spec
        with self._work:
            loaded = self._adapters.get(spec.id)
            if loaded is not None and loaded.spec.manifest_sha256 == spec.manifest_sha256:
                return loaded.spec
            self._adapters.check_room(spec.id, may_evict=may_evict)
        adapter = LoadedAdapter(spec, await asyncio.to_thread(self._runner.read_adapter, files))
        with self._work:
            evicted = self._adapters.enter(adapter, may_evict=may_evict)
        for gone in evicted:
            log.info("adapter evicted", extra={"adapter": gone.id, "version": gone.version, "for": spec.id})
        try:
            # Under no id yet: a client can have the adapter only when its probe was answered.
            await probe.read_probe(spec, self._submit(probe.probe_request(spec, self.model), lambda _: None, adapter))
            with self._work:
                self._adapters.put(adapter)
        finally:
            with self._work:
                self._adapters.drop(adapter)
        return spec

    async def adapter_freed(self) -> None:
        """See AdapterHost.adapter_freed."""
        await self._adapters.freed()

    async def unload_adapter(self, adapter_id: str) -> None:
        """See AdapterHost.unload_adapter."""
        with self._work:
            adapter = self._adapters.remove(adapter_id)
        if adapter is None:
            raise not_loaded(adapter_id)
        while True:
            adapter.unused.clear()
            with self._work:
                if not adapter.num_users:
                    return
            await adapter.unused.wait()

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
                prefix_query_tokens_total=scheduler.num_looked_up,
                prefix_hit_tokens_total=scheduler.num_found,
                loaded_adapters=len(self._adapters),
                adapter_bytes=self._adapters.size_bytes,
                adapter_evictions_total=self._adapters.num_evicted,
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

    def _actives(self) -> list[Active]:
        return list(dict.fromkeys(self._requests.values()))

    def _cancel_active(self, active: Active) -> None:
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
            self._outbox.deliver()
        finally:
            self._outbox.call(self._ended.set)

    def _step(self) -> None:
        with self._work:
            self._reap()
            started_s = self._stopwatch()
            step = self._scheduler.schedule()
            schedule_s = self._stopwatch() - started_s
            self._note_admissions(step)
            if not step and not self._outbox.has_endings and not self._closing:
                self._work.wait(_IDLE_WAIT_S)
        self._outbox.deliver()
        if not step:
            return
        started_s = self._stopwatch()
        try:
            outcomes = self._runner.execute(step)
        except OutOfMemory as error:
            self._fail_largest(step, error)
        else:
            execute_s = self._stopwatch() - started_s
            done = report(step, outcomes, schedule_s, execute_s, self._runner.step_times)
            with self._work:
                for work, outcome in zip(step, outcomes, strict=True):
                    self._take(work, outcome)
            self._on_step(done)
        self._outbox.deliver()

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

    def _start(self, active: Active) -> None:
        active.is_started = True
        scores = tuple(active.sequences[0].prompt_logprobs)
        early, active.early = active.early, []
        self._push(active, [Started(len(active.request.prompt_ids), scores, active.model_version), *early])

    def _take(self, work: Work, outcome: Outcome) -> None:
        """Enters the outcome of one work: progress, prompt scores, the new tokens, perhaps the end."""
        sequence = work.sequence
        active = self._requests.get(sequence)
        if active is None:  # its request failed with another of its sequences, in this very step
            return
        sequence.num_computed = work.end
        sequence.prompt_logprobs.extend(outcome.prompt_logprobs)
        if not active.is_started and sequence.index == 0 and sequence.num_computed >= sequence.num_prompt:
            self._start(active)
        completion = active.completions[sequence.index]
        try:
            for place, sampled in enumerate(outcome.tokens):
                sequence.num_computed += place > 0  # the token before was a draft: its keys and values are there
                self._add(active, sequence, completion, sampled)
                if completion.reason is not None:  # what was sampled past a stop does not exist
                    break
        except PlatformError as error:
            self._fail(active, error)
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
        self._completion_tokens_total += 1
        sequence.token_ids.append(sampled.token_id)
        deltas = [completion.add(sampled.token_id, sampled.logprob)]
        if sequence.matcher is not None and completion.reason is None:
            sequence.matcher.accept(sampled.token_id)
            if sequence.matcher.is_done:
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

    def _fail(self, active: Active, error: PlatformError) -> None:
        """Ends a request with an error in place of the rest of its events."""
        for sequence, completion in zip(active.sequences, active.completions, strict=True):
            if completion.reason is None:
                completion.reason = FinishReason.ERROR
                self._drop(sequence)
        active.stream.fail(error)
        self._outbox.wake(active.stream)
        self._settle(active, [FinishReason.ERROR] * active.request.n)

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
