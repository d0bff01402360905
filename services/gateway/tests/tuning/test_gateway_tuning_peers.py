"""Trainer and evaluator behind real gRPC, uploads as workers read them, and a database of the version before."""

import pytest
from pressroom.evaluator.v1 import evaluator_pb2, evaluator_pb2_grpc
from pressroom.gateway.v1 import gateway_pb2, gateway_pb2_grpc
from pressroom.trainer.v1 import trainer_pb2, trainer_pb2_grpc

from chassis import context, rpc
from chassis.context import RequestContext
from chassis.errors import Code, PlatformError
from gateway.api.grpc_files import FileServicer
from gateway.backends.evaluator_tasks import EvaluatorTasks
from gateway.backends.sqlite import Database
from gateway.backends.sqlite_documents import SqliteDocuments
from gateway.backends.sqlite_finetuning import SqliteFinetunes
from gateway.backends.sqlite_jobs import SqliteJobs
from gateway.backends.sqlite_outbox import SqliteOutbox
from gateway.backends.sqlite_schema import MIGRATIONS
from gateway.backends.trainer_runs import TrainerRuns
from gateway.core.evaluations import Task
from gateway.core.finetuning import Run, RunEvent
from gateway.core.jobs import JobStatus, Report

pytestmark = pytest.mark.integration

BASE = "smollm2-135m-instruct"


class Trainer(trainer_pb2_grpc.TrainerServiceServicer):
    def __init__(self):
        self.tenants = []

    async def GetRun(self, request, _):
        self.tenants.append(context.current().tenant)
        if request.job_id != "ftjob-1":
            raise PlatformError(Code.NOT_FOUND, "no such run")
        return trainer_pb2.GetRunResponse(
            step=2,
            total_steps=3,
            losses=[2.5, 1.25],
            trained_tokens=77,
            tracker_run_id="r",
            events=[
                trainer_pb2.RunEvent(
                    id="a", at_unix_ms=5, level="info", type="metrics", message="m", data_json='{"x":1}'
                ),
                trainer_pb2.RunEvent(id="b", at_unix_ms=6, level="loud", type="odd", message="n", data_json="{torn"),
                trainer_pb2.RunEvent(id="c", at_unix_ms=7, level="error", type="message", message="o", data_json="[1]"),
            ],
        )


class Evaluator(evaluator_pb2_grpc.EvaluatorServiceServicer):
    async def ListTasks(self, request, _):
        task = evaluator_pb2.Task(name="facts", version="2", metrics=["f1"], description="d", num_samples=4)
        return evaluator_pb2.ListTasksResponse(tasks=[task])


@pytest.fixture
async def served(world):
    """A channel to a server that is trainer, evaluator and the gateway's own FileService."""
    server = rpc.make_server("peers")
    trainer = Trainer()
    trainer_pb2_grpc.add_TrainerServiceServicer_to_server(trainer, server)
    evaluator_pb2_grpc.add_EvaluatorServiceServicer_to_server(Evaluator(), server)
    shelves = (SqliteDocuments(world.database, world.outbox), world.kept)
    gateway_pb2_grpc.add_FileServiceServicer_to_server(FileServicer(shelves, world.files), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with rpc.connect(f"127.0.0.1:{port}") as channel:
        yield channel, trainer
    await server.stop(0)


async def test_run_comes_from_the_trainer_and_what_is_odd_in_it_is_made_sane(served):
    channel, trainer = served
    runs = TrainerRuns(channel)
    with context.use(RequestContext(tenant="acme")):
        run = await runs.get("ftjob-1")
    assert run == Run(
        2,
        3,
        (2.5, 1.25),
        77,
        (
            RunEvent("a", 5, "info", "metrics", "m", {"x": 1}),
            RunEvent("b", 6, "info", "message", "n", None),
            RunEvent("c", 7, "error", "message", "o", {"value": [1]}),
        ),
        "r",
    )
    assert trainer.tenants == ["acme"]
    assert await runs.get("ftjob-2") is None


async def test_tasks_come_from_the_evaluator(served):
    assert list(await EvaluatorTasks(served[0]).all()) == [Task("facts", "2", ("f1",), "d", 4)]


async def test_peers_that_are_away_are_unavailable():
    async with rpc.connect("127.0.0.1:1") as channel:
        for call in (TrainerRuns(channel).get("ftjob-1"), EvaluatorTasks(channel).all()):
            with pytest.raises(PlatformError) as error:
                await call
            assert error.value.code is Code.UNAVAILABLE


async def read(channel, tenant, file_id):
    stub = gateway_pb2_grpc.FileServiceStub(channel)
    with context.use(RequestContext(tenant=tenant)):
        async with rpc.call("gateway.ReadFile", timeout_s=10) as call:
            request = gateway_pb2.ReadFileRequest(file_id=file_id)
            stream = stub.ReadFile(request, timeout=call.timeout_s, metadata=call.metadata)
            return b"".join([piece.data async for piece in stream])


async def test_workers_read_uploads_of_their_tenant_even_after_one_of_its_jobs_was_cancelled(world, served):
    channel, _ = served
    file_id = await world.upload(b"line\n" * 1000)
    cancelled, _ = [await world.order(training_file=file_id) for _ in range(2)]
    await world.http().post(f"/jobs/{cancelled['id']}/cancel")
    assert await read(channel, "acme", file_id) == b"line\n" * 1000
    (path,) = world.directory.iterdir()
    for tenant, name in (("other", file_id), ("", file_id), ("acme", path.name), ("acme", "../gateway.db")):
        with pytest.raises(PlatformError) as error:
            await read(channel, tenant, name)
        assert error.value.code is Code.NOT_FOUND


async def test_database_of_the_version_before_keeps_its_jobs(tmp_path):
    path = tmp_path / "gateway.db"
    old = await Database.open(path, MIGRATIONS[:1])
    await old.write(
        lambda connection: connection.execute(
            "INSERT INTO jobs (job_id, tenant, type, status, done, total, cancel_requested, reported_unix_ms,"
            " reported_sequence, created_unix_ms) VALUES ('job_1', 'acme', 'ingest', 'running', 1, 2, 0, 5, 1, 4)"
        )
    )
    await old.close()
    database = await Database.open(path, MIGRATIONS)
    jobs = SqliteJobs(database, now=lambda: 9.0)
    job = await jobs.get("acme", "job_1")
    assert (job.status, job.done, job.key_id, job.finished_unix_ms) == (JobStatus.RUNNING, 1, "", None)
    await jobs.apply(Report("job_1", JobStatus.SUCCEEDED, at_unix_ms=6, sequence=2))
    assert (await jobs.get("acme", "job_1")).finished_unix_ms == 9_000
    await database.close()


async def test_times_of_a_job_are_ours_and_stand(world):
    clock = iter(range(10, 100, 10))
    jobs = SqliteJobs(world.database, now=lambda: float(next(clock)))
    job_id = (await world.order())["id"]
    seen = await jobs.get("acme", job_id)
    assert (seen.started_unix_ms, seen.finished_unix_ms) == (None, None) and seen.key_id
    for sequence, status in enumerate((JobStatus.RUNNING, JobStatus.RUNNING, JobStatus.FAILED, JobStatus.FAILED), 1):
        await jobs.apply(Report(job_id, status, at_unix_ms=sequence, sequence=sequence))
    seen = await jobs.get("acme", job_id)
    assert (seen.started_unix_ms, seen.finished_unix_ms) == (10_000, 30_000)


async def test_job_that_was_cancelled_before_a_worker_had_it_never_started(world):
    job_id = (await world.order())["id"]
    seen = await world.jobs.cancel("acme", job_id)
    assert seen.started_unix_ms is None and seen.finished_unix_ms is not None


async def test_what_was_answered_is_there_after_a_restart(world, tmp_path):
    """A second process opens the file while the first has not closed it: what kill -9 leaves behind."""
    job = await world.order(suffix="press")
    again = await Database.open(tmp_path / "gateway.db", MIGRATIONS)
    outbox = SqliteOutbox(again)
    finetunes = SqliteFinetunes(again, outbox)
    finetune = await finetunes.get("acme", job["id"])
    assert (finetune.model_id, finetune.seed) == (f"{BASE}:press", job["seed"])
    assert [one.message.message_id for one in await outbox.unpublished(10)] == [job["id"]]
    assert [one.model_id for one in await finetunes.tuned_of("acme")] == [f"{BASE}:press"]
    await again.close()
