"""The engine that a vLLM server computes for: our contract, its batches.

One HTTP stream for each completion, so that each can end by itself: at a stop string, which is found here, or at a
cancel. vLLM's scheduler decides who runs; here it is bounded how many wait for their first token. All of it runs on
the event loop, on one task a request.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from chassis.errors import Code, PlatformError
from generator.backends.vllm_engine.adapters import AdapterFolder, VllmAdapter, check_whole
from generator.backends.vllm_engine.client import ServedModel, VllmClient
from generator.backends.vllm_engine.generation import Generation, Totals
from generator.backends.vllm_engine.lookout import Lookout
from generator.backends.vllm_engine.model import with_adapters
from generator.core import probe, requests
from generator.core.active import Active, make_active
from generator.core.adapters import AdapterFiles, AdapterLimits, AdapterSpec, AdapterTable, LoadedAdapter, not_loaded
from generator.core.engine import EngineStats
from generator.core.events import FinishReason
from generator.core.requests import GenerationRequest, ModelSpec
from generator.core.stream import OnSettled, TokenStream
from generator.core.text import Vocabulary

log = logging.getLogger(__name__)

_LOOK_S = 1.0  # between two looks at vLLM's health
_CLOSE_S = 10.0


@dataclass(frozen=True, slots=True)
class VllmOptions:
    """`model_name` is what vLLM calls the model, "" for the only base it serves; max_waiting counts sequences."""

    model_name: str = ""
    max_waiting: int = 256
    adapter_dir: Path | None = None
    adapter_limits: AdapterLimits = field(default_factory=AdapterLimits)
    look_s: float = _LOOK_S


class VllmEngine:
    """See core.engine.Engine. Not ready before vLLM answers, and while it does not."""

    def __init__(
        self,
        client: VllmClient,
        model: ModelSpec,
        vocabulary: Vocabulary,
        options: VllmOptions = VllmOptions(),
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._client = client
        self._model = with_adapters(model) if options.adapter_dir else model
        self._longest_context = model.context_length
        self._vocabulary = vocabulary
        self._options = options
        self._clock = clock
        self._name = options.model_name
        self._lookout = Lookout(client, options.model_name, self._meet)
        self._folder = AdapterFolder(client, options.adapter_dir) if options.adapter_dir else None
        self._adapters = AdapterTable(options.adapter_limits)
        self._tasks: dict[Active, asyncio.Task[None]] = {}
        self._totals = Totals()
        self._chores: set[asyncio.Task[None]] = set()
        self._draining = False
        self._looking: asyncio.Task[None] | None = None

    @property
    def model(self) -> ModelSpec:
        """The context is no longer than vLLM's, once that is known."""
        return self._model

    @property
    def is_ready(self) -> bool:
        """Whether vLLM answered when it was last asked."""
        return not self._lookout.why_not

    def start(self) -> None:
        """Nothing to start: `watch` finds vLLM."""

    def submit(self, request: GenerationRequest, on_settled: OnSettled) -> TokenStream:
        """See Engine.submit."""
        requests.check(request, self._model)
        adapter = self._adapters.get(request.adapter) if request.adapter else None
        if request.adapter and adapter is None:
            raise not_loaded(request.adapter)
        return self._submit(request, on_settled, adapter)

    def _submit(self, request: GenerationRequest, on_settled: OnSettled, adapter: LoadedAdapter | None) -> TokenStream:
        if self._draining:
            raise PlatformError(Code.UNAVAILABLE, "the generator is shutting down", retry_after_s=1.0)
        if self._lookout.why_not:
            message = f"vLLM cannot be used: {self._lookout.why_not}"
            raise PlatformError(Code.UNAVAILABLE, message, retry_after_s=1.0)
        num_waiting = self.stats().waiting_sequences
        if num_waiting + request.n > self._options.max_waiting:
            message = f"the engine's queue is full ({num_waiting} of {self._options.max_waiting} sequences wait)"
            raise PlatformError(Code.OVERLOADED, message, retry_after_s=1.0)
        active = make_active(request, self._model, self._vocabulary, adapter, self._cancel, on_settled, self._clock())
        if adapter is not None:
            self._adapters.acquire(adapter)
        name = self._name if adapter is None else _weights(adapter).name
        generation = Generation(active, self._client, name, self._model, self._totals, self._clock)
        task = asyncio.get_running_loop().create_task(generation.run())
        self._tasks[active] = task
        # Not a `finally` in the task: one that is cancelled before its first step never gets there.
        task.add_done_callback(lambda task: self._ended(active, generation, task))
        return active.stream

    def cancel(self, request_id: str) -> int:
        """See Engine.cancel."""
        found = [active for active in self._tasks if active.request.request_id == request_id]
        for active in found:
            self._cancel(active)
        return len(found)

    def stats(self) -> EngineStats:
        """See Engine.stats. Blocks and preemptions are vLLM's own, and as old as the last look at it."""
        unfinished = [c for active in self._tasks for c in active.completions if c.reason is None]
        num_running = sum(1 for completion in unfinished if completion.num_tokens)
        return EngineStats(
            running_sequences=num_running,
            waiting_sequences=len(unfinished) - num_running,
            blocks_used=self._lookout.gauges.blocks_used,
            blocks_total=self._lookout.gauges.blocks_total,
            prompt_tokens_total=self._totals.num_prompt,
            completion_tokens_total=self._totals.num_completion,
            preemptions_total=self._lookout.gauges.num_preemptions,
            prefix_query_tokens_total=self._totals.num_looked_up,
            prefix_hit_tokens_total=self._totals.num_found,
            loaded_adapters=len(self._adapters),
            adapter_bytes=self._adapters.size_bytes,
            adapter_evictions_total=self._adapters.num_evicted,
        )

    def drain(self) -> None:
        """See Engine.drain."""
        self._draining = True

    async def close(self) -> None:
        """Cancels what is left; vLLM stops computing it."""
        self._draining = True
        tasks = [*self._tasks.values(), *self._chores]
        if self._looking is not None:
            tasks.append(self._looking)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=_CLOSE_S)
        await self._client.close()

    def _cancel(self, active: Active) -> None:
        task = self._tasks.get(active)
        if task is not None and not active.is_cancelled:
            active.is_cancelled = True
            task.cancel()

    def _ended(self, active: Active, generation: Generation, task: asyncio.Task[None]) -> None:
        """Tells how a request ended."""
        del self._tasks[active]
        error = None if task.cancelled() else task.exception()
        if task.cancelled():
            summary = generation.end(FinishReason.CANCELLED)
        elif error is None or isinstance(error, TimeoutError):
            summary = generation.end(FinishReason.DEADLINE)  # the reason of what had not ended by itself
        elif isinstance(error, PlatformError):
            if error.code is Code.UNAVAILABLE:
                self._lookout.note(error.message)  # up to the next look, which may find that all is well
            summary = generation.fail(error)
        else:
            log.error("request of the vllm engine failed", exc_info=error)
            summary = generation.fail(PlatformError(Code.INTERNAL, "the engine failed; its log has the cause"))
        if active.adapter is not None and self._adapters.release(active.adapter):
            self._adapters.tell_unused(active.adapter)
            self._forget(active.adapter)
        asyncio.get_running_loop().call_soon(active.on_settled, summary, context=active.context)

    # Adapters.

    def adapters(self) -> tuple[AdapterSpec, ...]:
        """See AdapterHost.adapters."""
        return self._adapters.specs()

    async def load_adapter(self, files: AdapterFiles, *, may_evict: bool = True) -> AdapterSpec:
        """See AdapterHost.load_adapter. vLLM knows it by id and version, so that an old one can finish its requests."""
        if self._folder is None:
            raise _no_lora()
        spec = files.spec
        loaded = self._adapters.get(spec.id)
        if loaded is not None and loaded.spec.manifest_sha256 == spec.manifest_sha256:
            return loaded.spec
        self._adapters.check_room(spec.id, may_evict=may_evict)
        await asyncio.to_thread(check_whole, files)
        adapter = LoadedAdapter(spec, self._folder.locate(spec, len(files.tensors)))
        for gone in self._adapters.enter(adapter, may_evict=may_evict):
            log.info("adapter evicted", extra={"adapter": gone.id, "version": gone.version, "for": spec.id})
            self._unload_soon(self._folder.locate(gone))
        self._adapters.acquire(adapter)  # or it would be forgotten when its probe, its only user so far, has ended
        try:
            await self._folder.load(files)
            await probe.read_probe(spec, self._submit(probe.probe_request(spec, self._model), lambda _: None, adapter))
            self._adapters.put(adapter)
        finally:
            self._adapters.drop(adapter)
            self._adapters.release(adapter)
            self._forget(adapter)
        if loaded is not None:
            self._forget(loaded)
        return spec

    async def adapter_freed(self) -> None:
        """See AdapterHost.adapter_freed."""
        await self._adapters.freed()

    async def unload_adapter(self, adapter_id: str) -> None:
        """See AdapterHost.unload_adapter."""
        adapter = self._adapters.remove(adapter_id)
        if adapter is None or self._folder is None:
            raise not_loaded(adapter_id)
        while adapter.num_users:
            adapter.unused.clear()
            await adapter.unused.wait()
        await self._folder.unload(_weights(adapter))

    def _forget(self, adapter: LoadedAdapter) -> None:
        """Has vLLM forget weights that nobody uses and no new request will."""
        if not adapter.num_users and self._adapters.get(adapter.spec.id) is not adapter:
            self._unload_soon(_weights(adapter))

    def _unload_soon(self, adapter: VllmAdapter) -> None:
        assert self._folder is not None
        chore = asyncio.get_running_loop().create_task(self._folder.unload(adapter))
        self._chores.add(chore)
        chore.add_done_callback(self._chore_ended)

    def _chore_ended(self, chore: asyncio.Task[None]) -> None:
        self._chores.discard(chore)
        if not chore.cancelled() and (error := chore.exception()) is not None:
            log.warning("adapter stays in vLLM", extra={"error": repr(error)})

    # vLLM comes and goes.

    async def watch(self) -> None:
        """Looks after vLLM until the engine is closed."""
        self._looking = asyncio.get_running_loop().create_task(self._lookout.run(self._options.look_s))
        try:
            await asyncio.wait({self._looking})
        finally:
            self._looking.cancel()
        if not self._looking.cancelled():
            self._looking.result()

    async def _meet(self, served: ServedModel, models: list[ServedModel]) -> None:
        """Takes over what a vLLM that has just come serves, and gives it the adapters that it lacks."""
        self._name = served.name
        length = served.context_length or self._longest_context
        self._model = replace(self._model, context_length=min(self._longest_context, length))
        names = {model.name for model in models}
        for spec in self._adapters.specs():
            adapter = self._adapters.get(spec.id)
            if adapter is None or self._folder is None or _weights(adapter).name in names:
                continue
            try:
                await self._folder.load_again(_weights(adapter))
            except PlatformError as error:
                if error.code is Code.UNAVAILABLE:
                    raise
                self._adapters.remove(spec.id)
                log.error("adapter not loaded into the new vLLM", extra={"adapter": spec.id, "error": repr(error)})


def _weights(adapter: LoadedAdapter) -> VllmAdapter:
    assert isinstance(adapter.weights, VllmAdapter)
    return adapter.weights


def _no_lora() -> PlatformError:
    message = "this engine hands no adapters to vLLM: set GENERATOR_VLLM_ADAPTER_DIR to a folder that vLLM sees too"
    return PlatformError(Code.UNIMPLEMENTED, message, reason="unsupported")
