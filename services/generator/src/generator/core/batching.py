"""Our engine: a thread that plans a step, lets a runner compute it, and hands out what came of it.

Knows nothing of models or transports. One lock guards the scheduler and the requests; the thread holds it to plan and
to hand out (well under a millisecond a step) but not while the runner computes, so the event loop never waits for
arithmetic. A cancel marks its request and takes effect before the next step is planned.
"""

import asyncio
import logging
import threading
import time
from collections.abc import Callable
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
from generator.core.engine import EngineStats, OutOfMemory, Runner
from generator.core.grammar import GrammarCompiler
from generator.core.outbox import Outbox
from generator.core.register import Register
from generator.core.requests import GenerationRequest, ModelSpec
from generator.core.scheduler import Scheduler, SchedulerLimits
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
        self._speculates = limits.max_drafts > 0
        self._adapters = AdapterTable(adapter_limits)
        self._outbox = Outbox(self._adapters.tell_unused)
        self._register = Register(self._scheduler, self._adapters, self._outbox, clock)
        self._draining = False
        self._closing = False
        self._failure: BaseException | None = None
        self._work = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._ended = asyncio.Event()

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
            request,
            self.model,
            self._vocabulary,
            adapter,
            self._cancel_active,
            on_settled,
            self._clock(),
            self._speculates,
        )
        with self._work:
            if self._draining or self._failure is not None:
                raise PlatformError(Code.UNAVAILABLE, "the generator is shutting down", retry_after_s=1.0)
            self._register.add(active)
            self._work.notify()
        return active.stream

    def cancel(self, request_id: str) -> int:
        """See Engine.cancel."""
        with self._work:
            found = [a for a in self._register.actives() if a.request.request_id == request_id]
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
            scheduler, register = self._scheduler, self._register
            return EngineStats(
                running_sequences=len(scheduler.running),
                waiting_sequences=len(scheduler.waiting),
                blocks_used=scheduler.blocks.num_used,
                blocks_total=scheduler.blocks.num_blocks,
                prompt_tokens_total=register.num_prompt_tokens,
                completion_tokens_total=register.num_completion_tokens,
                preemptions_total=scheduler.num_preemptions,
                prefix_query_tokens_total=scheduler.num_looked_up,
                prefix_hit_tokens_total=scheduler.num_found,
                loaded_adapters=len(self._adapters),
                adapter_bytes=self._adapters.size_bytes,
                adapter_evictions_total=self._adapters.num_evicted,
                draft_tokens_total=register.num_draft_tokens,
                accepted_tokens_total=register.num_accepted_tokens,
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
            for active in self._register.actives():
                active.is_cancelled = True
            self._work.notify()
        await asyncio.to_thread(self._thread.join, _JOIN_TIMEOUT_S)

    def _cancel_active(self, active: Active) -> None:
        with self._work:
            active.is_cancelled = True
            self._work.notify()

    # The engine's thread.

    def _run(self) -> None:
        try:
            while not (self._closing and not self._register.actives()):
                self._step()
        except BaseException as error:  # the last edge: whatever it is, nobody may wait for a dead thread
            log.critical("engine thread died", exc_info=error)
            with self._work:
                self._failure = error
                for active in self._register.actives():
                    self._register.fail(
                        active, PlatformError(Code.INTERNAL, "the engine failed; its log has the cause")
                    )
            self._outbox.deliver()
        finally:
            self._outbox.call(self._ended.set)

    def _step(self) -> None:
        with self._work:
            self._register.reap()
            started_s = self._stopwatch()
            step = self._scheduler.schedule()
            schedule_s = self._stopwatch() - started_s
            self._register.note_admissions(step)
            if not step and not self._outbox.has_endings and not self._closing:
                self._work.wait(_IDLE_WAIT_S)
        self._outbox.deliver()
        if not step:
            return
        started_s = self._stopwatch()
        try:
            outcomes = self._runner.execute(step)
        except OutOfMemory as error:
            with self._work:
                self._register.fail_largest(step, error)
        else:
            execute_s = self._stopwatch() - started_s
            done = report(step, outcomes, schedule_s, execute_s, self._runner.step_times)
            self._scheduler.pacer.note(done)
            with self._work:
                before = self._register.num_completion_tokens
                for work, outcome in zip(step, outcomes, strict=True):
                    self._register.take(work, outcome)
                num_entered = self._register.num_completion_tokens - before
            self._on_step(replace(done, num_entered=num_entered))
        self._outbox.deliver()
