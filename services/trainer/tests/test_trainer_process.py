"""The trainer as a process on a real bus, killed while it works. Gateway and generator are stand-ins behind gRPC."""

import asyncio
import hashlib
import json
import os
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
import tiny_base
from pressroom.common.v1 import common_pb2
from pressroom.events.v1 import events_pb2
from pressroom.gateway.v1 import gateway_pb2, gateway_pb2_grpc
from pressroom.generator.v1 import generator_pb2, generator_pb2_grpc
from pressroom.trainer.v1 import trainer_pb2, trainer_pb2_grpc

from chassis import context, rpc
from chassis.bus import Received
from chassis.nats_bus import NatsBus
from contracts.subjects import CONTROL_REQUEST_CANCEL, EVENTS_MODEL_PUBLISHED, JOBS_TRAIN, PROGRESS_ALL, STREAMS
from modelstore.manifest import MANIFEST_NAME, sha256_of
from testkit import eventually
from testkit.processes import ServiceProcess
from testkit.servers import NatsServer

AT_ONCE = str(Path(__file__).with_name("trainer_at_once.py"))
pytestmark = [pytest.mark.integration, pytest.mark.timeout(590)]

FINAL = {common_pb2.JOB_STATUS_SUCCEEDED, common_pb2.JOB_STATUS_FAILED, common_pb2.JOB_STATUS_CANCELLED}
FILE = tiny_base.chats({f"How old is number {i}?": f"It is {i * i} years old." for i in range(9)})
LONG_JOB = '{"n_epochs": 50, "batch_size": 1}'  # 450 steps


class Files(gateway_pb2_grpc.FileServiceServicer):
    """Uploads of tenant acme."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}

    async def ReadFile(
        self, request: gateway_pb2.ReadFileRequest, _: object
    ) -> AsyncIterator[gateway_pb2.ReadFileResponse]:
        assert context.current().tenant == "acme"
        yield gateway_pb2.ReadFileResponse(data=self.files[request.file_id])


class Generator(generator_pb2_grpc.GeneratorServiceServicer):
    """Loads what stands in the store under the sha256 that it is told."""

    def __init__(self, store: Path) -> None:
        self._store = store
        self.loads: list[str] = []

    async def LoadAdapter(
        self, request: generator_pb2.LoadAdapterRequest, _: object
    ) -> generator_pb2.LoadAdapterResponse:
        manifest = self._store / request.path / MANIFEST_NAME
        assert sha256_of(manifest) == request.manifest_sha256
        self.loads.append(request.adapter)
        return generator_pb2.LoadAdapterResponse()


@dataclass
class System:
    """The process and all around it."""

    trainer: ServiceProcess
    bus: NatsBus
    files: Files
    generator: Generator
    store: Path
    data: Path
    stub: trainer_pb2_grpc.TrainerServiceStub
    reports: list[events_pb2.JobProgress] = field(default_factory=list)
    published: list[events_pb2.ModelPublished] = field(default_factory=list)

    async def submit(self, job_id: str, data: bytes, hyperparameters_json: str = "") -> None:
        self.files.files[f"file-{job_id}"] = data
        job = events_pb2.TrainJob(
            job_id=job_id,
            tenant="acme",
            model=tiny_base.MODEL,
            training_file_id=f"file-{job_id}",
            training_file_sha256=hashlib.sha256(data).hexdigest(),
            hyperparameters_json=hyperparameters_json,
        )
        await self.bus.publish(JOBS_TRAIN, job.SerializeToString(), message_id=f"train-{job_id}")

    async def on_progress(self, received: Received) -> None:
        self.reports.append(events_pb2.JobProgress.FromString(received.payload))

    async def on_published(self, received: Received) -> None:
        self.published.append(events_pb2.ModelPublished.FromString(received.payload))

    async def ended(self, job_id: str) -> events_pb2.JobProgress:
        def last() -> events_pb2.JobProgress | None:
            return next((r for r in self.reports if r.job_id == job_id and r.status in FINAL), None)

        return await eventually(last, timeout_s=300)

    async def run(self, job_id: str) -> trainer_pb2.GetRunResponse:
        with context.use(context.RequestContext("req_1", "acme")):
            async with rpc.call("trainer.GetRun", timeout_s=10) as call:
                request = trainer_pb2.GetRunRequest(job_id=job_id)
                return await self.stub.GetRun(request, timeout=10, metadata=call.metadata)

    async def has_checkpoint(self, job_id: str) -> None:
        await eventually((self.data / "runs" / job_id / "checkpoint.safetensors").exists, timeout_s=200)

    def children(self) -> list[psutil.Process]:
        return psutil.Process(self.trainer.pid).children()


@pytest.fixture
async def system(nats: NatsServer, tmp_path: Path) -> AsyncIterator[System]:
    store = tiny_base.write(tmp_path / "store")
    files, generator = Files(), Generator(store)
    server = rpc.make_server("standin")
    gateway_pb2_grpc.add_FileServiceServicer_to_server(files, server)
    generator_pb2_grpc.add_GeneratorServiceServicer_to_server(generator, server)
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    settings = {
        "NATS_URL": nats.url,
        "GATEWAY_ADDR": address,
        "GENERATOR_ADDR": address,
        "DATA_DIR": tmp_path / "data",
        "STORE_DIR": store,
        "NUM_THREADS": 1,
        "CHECKPOINT_INTERVAL_S": 0.2,
        "TRACKING_URI": "none",
    }
    trainer = ServiceProcess("trainer", settings, argv=(sys.executable, AT_ONCE))
    bus = NatsBus.connect(nats.url, "test", STREAMS)
    channel = rpc.connect(trainer.address)
    stub = trainer_pb2_grpc.TrainerServiceStub(channel)
    system = System(trainer, bus, files, generator, store, tmp_path / "data", stub)
    hearing = [
        asyncio.create_task(bus.consume(PROGRESS_ALL, durable="test-progress", handler=system.on_progress)),
        asyncio.create_task(bus.consume(EVENTS_MODEL_PUBLISHED, durable="test-events", handler=system.on_published)),
    ]
    await eventually(lambda: bus.connected, timeout_s=30)
    await asyncio.to_thread(trainer.start)
    yield system
    await asyncio.to_thread(trainer.stop)
    for task in hearing:
        task.cancel()
    await bus.close()
    await channel.close()
    await server.stop(0)


async def test_kill9_of_trainer_and_child_loses_no_step_and_doubles_none(system: System) -> None:
    """Then: a bad file and a cancellation on the same process, which costs less than a process for each."""
    await system.submit("ftjob-a", FILE, LONG_JOB)
    await system.has_checkpoint("ftjob-a")
    orphans = system.children()
    await asyncio.to_thread(system.trainer.kill9)
    await asyncio.to_thread(system.trainer.start)
    assert orphans, "a child was training"
    # What the child of the killed trainer did until it noticed is part of the run, or done again.
    await eventually(
        lambda: any(r.job_id == "ftjob-a" and r.sequence > 2_000_000 for r in system.reports), timeout_s=90
    )
    await eventually(system.children, timeout_s=60)
    (child,) = system.children()
    os.kill(child.pid, 9)
    end = await system.ended("ftjob-a")
    assert end.status == common_pb2.JOB_STATUS_SUCCEEDED, end.error
    run = await system.run("ftjob-a")
    assert (run.step, run.total_steps, len(run.losses)) == (450, 450, 450)
    messages = [event.message for event in run.events]
    assert any("goes on from the checkpoint" in message for message in messages), messages
    result = json.loads(end.result_json)
    assert result["fine_tuned_model"] == "tiny:ftjob-a" and result["trained_tokens"] == run.trained_tokens
    assert {event.manifest_sha256 for event in system.published} == {result["adapter"]["manifest_sha256"]}
    assert len(system.published) == 1 and system.generator.loads == ["tiny:ftjob-a"]

    await system.submit("ftjob-b", FILE + b"nonsense\n" + FILE)
    end = await system.ended("ftjob-b")
    assert end.status == common_pb2.JOB_STATUS_FAILED and "line 10: it is not valid JSON" in end.error

    await system.submit("ftjob-c", FILE, LONG_JOB)
    await system.has_checkpoint("ftjob-c")
    cancel = events_pb2.RequestCancel(id="ftjob-c", reason="test")
    await system.bus.broadcast(CONTROL_REQUEST_CANCEL, cancel.SerializeToString())
    end = await system.ended("ftjob-c")
    assert end.status == common_pb2.JOB_STATUS_CANCELLED
    assert system.children() == [] and len(system.published) == 1
    assert [path.name for path in (system.store / "adapters").iterdir()] == ["ftjob-a"]
    assert {path.name for path in (system.data / "runs" / "ftjob-c").iterdir()} == {
        "run.json",
        "events.jsonl",
        "steps.jsonl",
    }
