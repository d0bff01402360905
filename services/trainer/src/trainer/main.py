"""Composition root of the trainer: the only file that knows every concrete class."""

import sys

from pressroom.trainer.v1 import trainer_pb2_grpc

from chassis import rpc
from chassis.app import App
from chassis.jobs import ACK_WAIT_S, BACKOFF_S, MAX_DELIVER_OF_BUS, Cancellations
from chassis.nats_bus import NatsBus
from chassis.settings import load_settings
from chassis.uploads import GrpcFiles
from contracts.jobs import decode_cancel, open_file
from contracts.subjects import CONTROL_REQUEST_CANCEL, JOBS_TRAIN, STREAMS
from trainer.api.consumers import DURABLE, TrainWorker
from trainer.api.grpc import TrainerServicer
from trainer.backends.adapter_store import AdapterStore
from trainer.backends.bus_events import BusAnnouncer
from trainer.backends.child_processes import ChildProcesses
from trainer.backends.grpc_generator import GrpcGenerator
from trainer.backends.run_folders import DirectoryRuns
from trainer.backends.tracking.process import MlflowTracker
from trainer.core.finetune import FinetunePolicy, Finetuner
from trainer.settings import TrainerSettings


def main() -> int:
    """Runs the trainer; returns the exit status."""
    settings = load_settings(TrainerSettings)

    async def setup(app: App) -> None:
        bus = NatsBus.connect(settings.nats_url, "trainer", STREAMS)
        app.on_close(bus.close)
        app.ready_when("bus", lambda: bus.connected)
        app.set_queue_depth(lambda: bus.backlog)
        runs = DirectoryRuns(settings.data_dir / "runs", max_runs=settings.max_runs)
        adapters = AdapterStore(settings.store_dir)
        cancellations = Cancellations(decode_cancel)
        worker = TrainWorker(bus, _finetuner(app, settings, bus, runs, adapters), cancellations)
        app.spawn("cancellations", bus.listen(CONTROL_REQUEST_CANCEL, cancellations.handle))
        app.spawn(
            "jobs",
            bus.consume(
                JOBS_TRAIN,
                durable=DURABLE,
                handler=worker.handle,
                max_deliver=MAX_DELIVER_OF_BUS,
                ack_wait_s=ACK_WAIT_S,
                backoff_s=BACKOFF_S,
            ),
        )
        app.add_grpc(
            trainer_pb2_grpc.add_TrainerServiceServicer_to_server,
            TrainerServicer(runs, adapters),
            "pressroom.trainer.v1.TrainerService",
        )

    return App("trainer", settings).run(setup)


def _finetuner(
    app: App, settings: TrainerSettings, bus: NatsBus, runs: DirectoryRuns, adapters: AdapterStore
) -> Finetuner:
    gateway, generator = rpc.connect(settings.gateway_addr), rpc.connect(settings.generator_addr)
    app.on_close(gateway.close)
    app.on_close(generator.close)
    child = {
        "store_dir": str(settings.store_dir.resolve()),
        "num_threads": settings.num_threads,
        "dtype": settings.dtype,
        "checkpoint_interval_s": settings.checkpoint_interval_s,
        "max_file_bytes": settings.max_file_bytes,
        "max_examples": settings.max_examples,
        "max_example_tokens": settings.max_example_tokens,
    }
    policy = FinetunePolicy(
        child=child,
        file_patience_s=settings.file_patience_s,
        acknowledge_patience_s=settings.acknowledge_patience_s,
        tracker_patience_s=settings.tracker_patience_s,
    )
    return Finetuner(
        GrpcFiles(gateway, open_file, timeout_s=settings.file_timeout_s, max_bytes=settings.max_file_bytes),
        runs,
        ChildProcesses(),
        adapters,
        BusAnnouncer(bus),
        GrpcGenerator(generator, load_timeout_s=settings.load_timeout_s),
        MlflowTracker(settings.tracking_uri, settings.data_dir, settings.experiment),
        policy,
    )


if __name__ == "__main__":
    sys.exit(main())
