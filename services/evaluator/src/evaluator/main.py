"""Composition root of the evaluator: the only file that knows every concrete class."""

import asyncio
import sys

from pressroom.evaluator.v1 import evaluator_pb2_grpc

from chassis import rpc
from chassis.app import App
from chassis.jobs import ACK_WAIT_S, BACKOFF_S, MAX_DELIVER_OF_BUS, Cancellations
from chassis.nats_bus import NatsBus
from chassis.settings import load_settings
from chassis.uploads import GrpcFiles
from contracts.jobs import decode_cancel, open_file
from contracts.subjects import CONTROL_REQUEST_CANCEL, JOBS_EVALUATE, STREAMS
from evaluator.api.consumers import DURABLE, EvaluateWorker
from evaluator.api.grpc import EvaluatorServicer
from evaluator.backends.answer_files import AnswerFiles
from evaluator.backends.grpc_generator import GrpcGenerator
from evaluator.backends.grpc_graph import GrpcGraph
from evaluator.backends.result_files import ResultFiles
from evaluator.backends.scoring.runner import ChildScorer
from evaluator.backends.task_folders import SHIPPED, TaskFolders
from evaluator.core.evaluation import Evaluator, Policy
from evaluator.settings import EvaluatorSettings


def main() -> int:
    """Runs the evaluator; returns the exit status."""
    settings = load_settings(EvaluatorSettings)

    async def setup(app: App) -> None:
        folders = [SHIPPED] if settings.tasks_dir is None else [SHIPPED, settings.tasks_dir]
        tasks = TaskFolders(folders, max_bytes=settings.max_task_bytes)
        journals = AnswerFiles(settings.data_dir / "answers")
        results = ResultFiles(settings.data_dir / "results", max_results=settings.max_results)
        await asyncio.to_thread(journals.prepare)
        await asyncio.to_thread(results.prepare)
        app.add_grpc(
            evaluator_pb2_grpc.add_EvaluatorServiceServicer_to_server,
            EvaluatorServicer(tasks, results),
            "pressroom.evaluator.v1.EvaluatorService",
        )
        gateway, generator = rpc.connect(settings.gateway_addr), rpc.connect(settings.generator_addr)
        app.on_close(gateway.close)
        app.on_close(generator.close)
        evaluator = Evaluator(
            tasks=tasks,
            files=GrpcFiles(gateway, open_file, timeout_s=settings.file_timeout_s, max_bytes=settings.max_task_bytes),
            graph=GrpcGraph(gateway, timeout_s=settings.answer_timeout_s),
            generator=GrpcGenerator(generator, timeout_s=settings.prediction_timeout_s),
            journals=journals,
            scorer=ChildScorer(timeout_s=settings.score_timeout_s),
            results=results,
            policy=Policy(settings.concurrency, settings.patience_s),
        )
        _start_worker(app, settings, evaluator)

    return App("evaluator", settings).run(setup)


def _start_worker(app: App, settings: EvaluatorSettings, evaluator: Evaluator) -> None:
    """Lets the evaluator take jobs from the bus, one after the other."""
    bus = NatsBus.connect(settings.nats_url, "evaluator", STREAMS)
    app.on_close(bus.close)
    app.ready_when("bus", lambda: bus.connected)
    app.set_queue_depth(lambda: bus.backlog)
    cancellations = Cancellations(decode_cancel)
    worker = EvaluateWorker(bus, evaluator, cancellations)
    app.spawn("cancellations", bus.listen(CONTROL_REQUEST_CANCEL, cancellations.handle))
    app.spawn(
        "jobs",
        bus.consume(
            JOBS_EVALUATE,
            durable=DURABLE,
            handler=worker.handle,
            max_deliver=MAX_DELIVER_OF_BUS,
            ack_wait_s=ACK_WAIT_S,
            backoff_s=BACKOFF_S,
        ),
    )


if __name__ == "__main__":
    sys.exit(main())
