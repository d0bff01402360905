"""Composition root of the generator: the only file that knows every concrete class."""

import asyncio
import logging
import sys

from pressroom.generator.v1 import generator_pb2_grpc

from chassis import metrics
from chassis.app import App
from chassis.bus import StreamSpec
from chassis.nats_bus import NatsBus
from chassis.settings import load_settings
from contracts import subjects
from generator.api import accounting, consumers
from generator.api.grammars import GrammarDesk
from generator.api.grpc import GeneratorServicer
from generator.backends.adapter_store import FolderAdapterStore
from generator.backends.hf_tokenizer import HfTokenizer
from generator.backends.llguidance_grammar import LlguidanceCompiler, load_tokenizer
from generator.backends.torch_runner import TorchRunner, make_runner
from generator.backends.torch_runner.runner import RunnerOptions
from generator.core.adapters import AdapterLimits
from generator.core.batching import BatchingEngine
from generator.core.blocks import BlockManager
from generator.core.library import AdapterLibrary
from generator.core.scheduler import SchedulerLimits
from generator.settings import GeneratorSettings
from modelstore import Manifest

log = logging.getLogger(__name__)

_GRAMMAR_WORKERS = 2


def load(settings: GeneratorSettings) -> tuple[TorchRunner, HfTokenizer]:
    """Verifies the model's files, then loads and warms it. Blocks for seconds. Raises PlatformError."""
    manifest = Manifest.load(settings.model_dir)
    manifest.verify()
    options = RunnerOptions(
        max_model_len=settings.max_model_len,
        kv_cache_bytes=settings.kv_cache_mb * 1024 * 1024,
        block_size=settings.block_size,
        num_threads=settings.num_threads,
        dtype=settings.dtype,
    )
    runner = make_runner(
        settings.model_dir,
        options,
        model_id=manifest.id,
        version=manifest.version,
        created_unix_s=manifest.created_unix_s,
    )
    runner.warm_up()
    return runner, HfTokenizer.load(settings.model_dir)


def main() -> int:
    settings = load_settings(GeneratorSettings)

    async def setup(app: App) -> None:
        runner, tokenizer = await asyncio.to_thread(load, settings)
        log.info(
            "model loaded",
            extra={"model": runner.model.id, "dtype": runner.dtype_name, "kv_blocks": runner.num_blocks},
        )
        limits = SchedulerLimits(
            max_running=settings.max_running,
            max_waiting=settings.max_waiting,
            max_step_tokens=settings.max_step_tokens,
            max_mixed_prefill_tokens=settings.max_mixed_prefill_tokens,
            max_background_tokens=settings.max_background_tokens,
        )
        adapter_limits = AdapterLimits(settings.max_adapters, settings.adapter_memory_mb * 1024 * 1024)
        blocks = BlockManager(runner.num_blocks, runner.block_size, settings.prefix_caching)
        compiler = await asyncio.to_thread(_grammars, settings, runner)
        engine = BatchingEngine(runner, tokenizer, blocks, limits, adapter_limits, compiler)
        engine.start()
        app.on_close(engine.close)
        app.spawn("engine", engine.watch())
        library = AdapterLibrary(engine, _store(settings, runner, adapter_limits), accounting.count_adapter_load)

        async def drain() -> None:
            engine.drain()

        app.on_drain(drain)
        app.set_queue_depth(lambda: engine.stats().waiting_sequences)
        metrics.RUNNING_SEQUENCES.labels(app.name).set_function(lambda: engine.stats().running_sequences)
        metrics.WAITING_SEQUENCES.labels(app.name).set_function(lambda: engine.stats().waiting_sequences)
        metrics.LOADED_ADAPTERS.labels(app.name).set_function(lambda: len(engine.adapters()))
        await library.load_all()  # before the ports open: a restart must not make a tuned model unknown for a while
        app.add_grpc(
            generator_pb2_grpc.add_GeneratorServiceServicer_to_server,
            GeneratorServicer(engine, library, tokenizer, _desk(app, settings, compiler)),
            "pressroom.generator.v1.GeneratorService",
        )
        streams = [StreamSpec(s.name, s.subjects, s.retention, s.max_age_s, s.max_bytes) for s in subjects.STREAMS]
        bus = NatsBus.connect(settings.nats_url, app.name, streams)
        app.on_close(bus.close)
        app.spawn("cancels", bus.listen(subjects.CONTROL_REQUEST_CANCEL, consumers.make_cancel_handler(engine)))
        app.spawn(
            "published-models",
            bus.consume(
                subjects.EVENTS_MODEL_PUBLISHED,
                durable=f"generator-{settings.instance}",
                handler=consumers.make_published_handler(library),
            ),
        )

    return App("generator", settings).run(setup)


def _grammars(settings: GeneratorSettings, runner: TorchRunner) -> LlguidanceCompiler:
    """Makes the compiler of grammars with its processes. Blocks for a fraction of a second."""
    compiler = LlguidanceCompiler(
        load_tokenizer(settings.model_dir, runner.model),
        timeout_s=settings.grammar_timeout_s,
        max_cached=settings.grammar_cache_size,
        num_workers=_GRAMMAR_WORKERS,
    )
    compiler.start()
    return compiler


def _desk(app: App, settings: GeneratorSettings, compiler: LlguidanceCompiler) -> GrammarDesk:
    # A new process, where one was killed, comes on top of the budget.
    desk = GrammarDesk(compiler, timeout_s=3 * settings.grammar_timeout_s, num_threads=_GRAMMAR_WORKERS)

    async def close() -> None:
        await asyncio.to_thread(desk.close)
        await asyncio.to_thread(compiler.close)

    app.on_close(close)
    return desk


def _store(settings: GeneratorSettings, runner: TorchRunner, limits: AdapterLimits) -> FolderAdapterStore | None:
    if settings.store_dir is None:
        return None
    return FolderAdapterStore(settings.store_dir, runner.model.id, runner.model.version, limits.max_bytes)


if __name__ == "__main__":
    sys.exit(main())
