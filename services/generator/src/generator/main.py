"""Composition root of the generator: with engines.py the only file that knows every concrete class."""

import sys

from pressroom.generator.v1 import generator_pb2_grpc

from chassis.app import App
from chassis.bus import StreamSpec
from chassis.nats_bus import NatsBus
from chassis.settings import load_settings
from contracts import subjects
from generator import engines
from generator.api import accounting, consumers
from generator.api.grpc import GeneratorServicer
from generator.api.metering import EngineMeter
from generator.backends.adapter_store import FolderAdapterStore
from generator.core.library import AdapterLibrary
from generator.core.requests import ModelSpec
from generator.settings import GeneratorSettings
from modelstore import Manifest

# Seconds that the engine's thread may wait for the event loop to hand over the interpreter; Python's own 0.005 is as
# long as a step.
_SWITCH_INTERVAL_S = 0.0005


def main() -> int:
    settings = load_settings(GeneratorSettings)
    sys.setswitchinterval(_SWITCH_INTERVAL_S)

    async def setup(app: App) -> None:
        meter = EngineMeter(app.name)
        chosen = await engines.choose(settings, meter.on_step)
        engine = chosen.engine
        engine.start()
        app.on_close(engine.close)
        app.spawn("engine", engine.watch())
        app.ready_when("engine", chosen.is_ready)
        if chosen.grammars is not None:
            app.on_close(chosen.grammars.close)
        library = AdapterLibrary(engine, _store(settings, engine.model), accounting.count_adapter_load)

        async def drain() -> None:
            engine.drain()

        app.on_drain(drain)
        app.set_queue_depth(lambda: engine.stats().waiting_sequences)
        meter.watch(engine.stats, lambda: len(library.specs()))
        await library.load_all()  # before the ports open: a restart must not make a tuned model unknown for a while
        app.add_grpc(
            generator_pb2_grpc.add_GeneratorServiceServicer_to_server,
            GeneratorServicer(engine, library, chosen.tokenizer, meter, chosen.grammars),
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


def _store(settings: GeneratorSettings, model: ModelSpec) -> FolderAdapterStore | None:
    if settings.store_dir is None:
        return None
    manifest = Manifest.load(settings.model_dir)
    return FolderAdapterStore(
        settings.store_dir,
        model.id,
        model.version,
        engines.adapter_limits(settings).max_bytes,
        base_weights_sha256=manifest.weights_sha256,
        earlier_versions=manifest.config.get("earlier_versions", ()),
    )


if __name__ == "__main__":
    sys.exit(main())
