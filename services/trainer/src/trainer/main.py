"""Composition root of the trainer."""

import sys

from pressroom.trainer.v1 import trainer_pb2_grpc

from chassis.app import App
from chassis.nats_bus import NatsBus
from chassis.settings import load_settings
from contracts.subjects import JOBS_TRAIN, STREAMS
from trainer.api.consumers import DURABLE, TrainWorker
from trainer.api.grpc import TrainerServicer
from trainer.settings import TrainerSettings


def main() -> int:
    """Runs the trainer; returns the exit status."""
    settings = load_settings(TrainerSettings)

    async def setup(app: App) -> None:
        bus = NatsBus.connect(settings.nats_url, "trainer", STREAMS)
        app.on_close(bus.close)
        app.ready_when("bus", lambda: bus.connected)
        app.set_queue_depth(lambda: bus.backlog)
        app.spawn("jobs", bus.consume(JOBS_TRAIN, durable=DURABLE, handler=TrainWorker(bus).handle))
        app.add_grpc(
            trainer_pb2_grpc.add_TrainerServiceServicer_to_server,
            TrainerServicer(),
            "pressroom.trainer.v1.TrainerService",
        )

    return App("trainer", settings).run(setup)


if __name__ == "__main__":
    sys.exit(main())
