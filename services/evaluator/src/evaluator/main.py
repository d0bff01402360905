"""Composition root of the evaluator."""

import sys

from pressroom.evaluator.v1 import evaluator_pb2_grpc

from chassis.app import App
from chassis.nats_bus import NatsBus
from chassis.settings import load_settings
from contracts.subjects import JOBS_EVALUATE, STREAMS
from evaluator.api.consumers import DURABLE, EvaluateWorker
from evaluator.api.grpc import EvaluatorServicer
from evaluator.settings import EvaluatorSettings


def main() -> int:
    """Runs the evaluator; returns the exit status."""
    settings = load_settings(EvaluatorSettings)

    async def setup(app: App) -> None:
        bus = NatsBus.connect(settings.nats_url, "evaluator", STREAMS)
        app.on_close(bus.close)
        app.ready_when("bus", lambda: bus.connected)
        app.set_queue_depth(lambda: bus.backlog)
        app.spawn("jobs", bus.consume(JOBS_EVALUATE, durable=DURABLE, handler=EvaluateWorker(bus).handle))
        app.add_grpc(
            evaluator_pb2_grpc.add_EvaluatorServiceServicer_to_server,
            EvaluatorServicer(),
            "pressroom.evaluator.v1.EvaluatorService",
        )

    return App("evaluator", settings).run(setup)


if __name__ == "__main__":
    sys.exit(main())
