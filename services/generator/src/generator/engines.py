"""The engine that the settings ask for, with its tokenizer: the part of the composition root that chooses.

What only one engine needs is imported where that one is made: the others run without it, torch above all.
"""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from chassis.errors import Code, PlatformError
from generator.api import accounting
from generator.api.grammars import GrammarDesk
from generator.api.metering import MeteredCompiler
from generator.backends import native_runner
from generator.backends.hf_tokenizer import HfTokenizer
from generator.backends.llguidance_grammar import LlguidanceCompiler, byte_tokenizer, load_tokenizer
from generator.backends.native_runner.library import load_library
from generator.backends.native_runner.weights import find_pack
from generator.core.adapters import AdapterLimits
from generator.core.batching import BatchingEngine
from generator.core.blocks import BlockManager
from generator.core.engine import Engine, Runner
from generator.core.requests import ModelSpec
from generator.core.scheduler import SchedulerLimits
from generator.core.steps import StepReport
from generator.core.text import Tokenizer
from generator.settings import GeneratorSettings
from modelstore import Manifest

log = logging.getLogger(__name__)

OnStep = Callable[[StepReport], None]
_SERVICE = "generator"
_GRAMMAR_WORKERS = 2


class ServedEngine(Engine, Protocol):
    """An engine with a life: start it on the loop, watch it, close it when the servers have stopped."""

    def start(self) -> None: ...

    async def watch(self) -> None:
        """Returns when the engine was closed; raises what only a restart of the process mends."""
        ...

    async def close(self) -> None: ...


class SizedRunner(Runner, Protocol):
    """A runner that says how much memory for keys and values it has got."""

    @property
    def num_blocks(self) -> int: ...

    @property
    def block_size(self) -> int: ...


class ModelRunner(SizedRunner, Protocol):
    """A runner of a real model; `dtype_name` says what its weights are."""

    @property
    def dtype_name(self) -> str: ...


@dataclass(frozen=True, slots=True)
class Chosen:
    """An engine that is not started yet. `is_ready` says whether it can answer now.

    `grammars` compiles for the engines of ours, and is to be closed; vLLM compiles its own.
    """

    engine: ServedEngine
    tokenizer: Tokenizer
    is_ready: Callable[[], bool] = lambda: True
    grammars: GrammarDesk | None = None


async def choose(settings: GeneratorSettings, on_step: OnStep = lambda report: None) -> Chosen:
    """Makes the engine. Blocks a thread for as long as a model takes to load. Raises PlatformError.

    on_step: told of every step of an engine of ours; vLLM's steps are its own.
    """
    match settings.engine:
        case "vllm":
            return await asyncio.to_thread(make_vllm_engine, settings)
        case "toy":
            return await asyncio.to_thread(make_toy_engine, settings, on_step)
        case "torch":
            load = load_torch
        case "native":
            load = load_native
        case "auto":
            load = load_native if can_run_native(settings) else load_torch
    runner, tokenizer = await asyncio.to_thread(load, settings)
    compiler = await asyncio.to_thread(_make_compiler, settings, runner.model)
    return _batching(settings, runner, tokenizer, compiler, on_step)


def can_run_native(settings: GeneratorSettings) -> bool:
    """Says whether the model has packed weights and this processor a build of the kernels."""
    if find_pack(settings.model_dir, settings.weights) is None:
        return False
    try:
        load_library()
    except PlatformError as error:
        log.warning("native engine unavailable", extra={"cause": error.message})
        return False
    return True


def load_native(settings: GeneratorSettings) -> tuple[SizedRunner, Tokenizer]:
    """Loads the model's packed weights and warms them up. Blocks. Raises PlatformError."""
    # Running sequences may bring drafts into a step, on top of the tokens that the scheduler counts.
    most = max(settings.max_step_tokens, settings.max_running) + settings.max_background_tokens
    most += settings.max_running * settings.max_drafts
    options = native_runner.RunnerOptions(
        max_model_len=settings.max_model_len,
        kv_cache_bytes=settings.kv_cache_mb * 1024 * 1024,
        num_threads=settings.num_threads,
        max_step_tokens=most,
        max_sequences=settings.max_running,
        weights=settings.weights,
        activations=settings.activations,
    )
    return _load(settings, partial(native_runner.make_runner, settings.model_dir, options))


def load_torch(settings: GeneratorSettings) -> tuple[SizedRunner, Tokenizer]:
    """Loads the model in torch and warms it up. Blocks for seconds. Raises PlatformError."""
    try:
        from generator.backends.torch_runner import RunnerOptions, make_runner
    except ImportError as error:
        message = f"the engine torch cannot run here ({error}): use GENERATOR_ENGINE=native, or the GPU image"
        raise PlatformError(Code.FAILED_PRECONDITION, message, retryable=False) from error

    options = RunnerOptions(
        max_model_len=settings.max_model_len,
        kv_cache_bytes=settings.kv_cache_mb * 1024 * 1024,
        block_size=settings.block_size,
        num_threads=settings.num_threads,
        dtype=settings.dtype,
        device=settings.device,
        max_sequences=settings.max_running,
    )
    return _load(settings, partial(make_runner, settings.model_dir, options))


def _load(settings: GeneratorSettings, make: Callable[..., ModelRunner]) -> tuple[SizedRunner, Tokenizer]:
    """Verifies the model's files before anything reads them, then makes a runner and warms it up."""
    manifest = Manifest.load(settings.model_dir)
    manifest.verify()
    runner = make(model_id=manifest.id, version=manifest.version, created_unix_s=manifest.created_unix_s)
    runner.warm_up()
    log.info("model loaded", extra={"model": manifest.id, "dtype": runner.dtype_name, "kv_blocks": runner.num_blocks})
    return runner, HfTokenizer.load(settings.model_dir)


def make_toy_engine(settings: GeneratorSettings, on_step: OnStep = lambda report: None) -> Chosen:
    """Makes the engine without weights: for tests and simulations of the rest of the system."""
    from generator.backends.toy import ByteTokenizer, ToyRunner

    tokenizer = ByteTokenizer()
    num_blocks = settings.max_running * settings.max_model_len // settings.block_size + 1
    runner = ToyRunner(num_blocks, settings.block_size, settings.max_model_len, settings.model_dir.name)
    return _batching(settings, runner, tokenizer, _make_compiler(settings), on_step)


def make_vllm_engine(settings: GeneratorSettings) -> Chosen:
    """Makes the engine that has vLLM do the work; reads the tokenizer, and asks vLLM nothing yet."""
    from generator.backends.vllm_engine import VllmClient, VllmEngine, VllmOptions, make_model

    manifest = Manifest.load(settings.model_dir)
    created = manifest.created_unix_s
    model = make_model(settings.model_dir, manifest.id, manifest.version, settings.max_model_len, created)
    key = settings.vllm_api_key.get_secret_value() if settings.vllm_api_key else None
    client = VllmClient(settings.vllm_url, key, settings.vllm_silence_s)
    tokenizer = HfTokenizer.load(settings.model_dir)
    options = VllmOptions(
        settings.vllm_model, settings.max_waiting, settings.vllm_adapter_dir, adapter_limits(settings)
    )
    engine = VllmEngine(client, model, tokenizer, options)
    return Chosen(engine, tokenizer, lambda: engine.is_ready)


def adapter_limits(settings: GeneratorSettings) -> AdapterLimits:
    """Returns the bounds of what adapters may take."""
    return AdapterLimits(settings.max_adapters, settings.adapter_memory_mb * 1024 * 1024)


def _make_compiler(settings: GeneratorSettings, model: ModelSpec | None = None) -> LlguidanceCompiler:
    """Makes the compiler of grammars with its processes, for bytes where there is no model. Blocks for 0.3 s."""
    compiler = LlguidanceCompiler(
        byte_tokenizer() if model is None else load_tokenizer(settings.model_dir, model),
        timeout_s=settings.grammar_timeout_s,
        max_cached=settings.grammar_cache_size,
        num_workers=_GRAMMAR_WORKERS,
    )
    compiler.start()
    return compiler


def _batching(
    settings: GeneratorSettings,
    runner: SizedRunner,
    tokenizer: Tokenizer,
    compiler: LlguidanceCompiler,
    on_step: OnStep,
) -> Chosen:
    limits = SchedulerLimits(
        max_running=settings.max_running,
        max_waiting=settings.max_waiting,
        max_step_tokens=settings.max_step_tokens,
        max_mixed_prefill_tokens=settings.max_mixed_prefill_tokens,
        max_slowdown=settings.max_slowdown,
        max_background_tokens=settings.max_background_tokens,
        max_drafts=settings.max_drafts if settings.speculation else 0,
        max_speculative_batch=settings.max_speculative_batch,
    )
    blocks = BlockManager(runner.num_blocks, runner.block_size, settings.prefix_caching)
    engine = BatchingEngine(
        runner, tokenizer, blocks, limits, adapter_limits(settings), grammars=compiler, on_step=on_step
    )
    # A new process, where one was killed, comes on top of the budget.
    metered = MeteredCompiler(compiler, accounting.SERVICE)
    desk = GrammarDesk(metered, timeout_s=3 * settings.grammar_timeout_s, num_threads=_GRAMMAR_WORKERS)
    return Chosen(engine, tokenizer, grammars=desk)
