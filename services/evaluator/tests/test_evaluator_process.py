"""The evaluator as a process on a real bus, killed while it works.

Gateway and generator are stand-ins behind real gRPC servers in this process.
"""

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from evaluator_fakes import ANSWERS, TASK
from pressroom.common.v1 import common_pb2
from pressroom.evaluator.v1 import evaluator_pb2, evaluator_pb2_grpc
from pressroom.events.v1 import events_pb2
from pressroom.gateway.v1 import gateway_pb2, gateway_pb2_grpc
from pressroom.generator.v1 import generator_pb2, generator_pb2_grpc

from chassis import context, rpc
from chassis.bus import Received
from chassis.errors import Code, PlatformError
from chassis.nats_bus import NatsBus
from contracts.subjects import CONTROL_REQUEST_CANCEL, JOBS_EVALUATE, PROGRESS_ALL, STREAMS
from testkit import eventually
from testkit.processes import ServiceProcess
from testkit.servers import NatsServer

pytestmark = pytest.mark.integration

SUCCEEDED, FAILED = common_pb2.JOB_STATUS_SUCCEEDED, common_pb2.JOB_STATUS_FAILED
FINAL = {SUCCEEDED, FAILED, common_pb2.JOB_STATUS_CANCELLED}


class Gateway(gateway_pb2_grpc.GraphServiceServicer, gateway_pb2_grpc.FileServiceServicer):
    """Answers and files of tenant acme; `pause_s` makes it slow enough to be interrupted, `away` refuses."""

    def __init__(self) -> None:
        self.pause_s = 0.0
        self.is_away = False
        self.asked: list[str] = []
        self.num_cut_off = 0

    async def Answer(self, request: gateway_pb2.AnswerRequest, _: object) -> gateway_pb2.AnswerResponse:
        assert context.current().tenant == "acme"
        if self.is_away:
            raise PlatformError(Code.UNAVAILABLE, "on its way back")
        question = request.messages[-1].content
        try:
            await asyncio.sleep(self.pause_s)
        except asyncio.CancelledError:
            self.num_cut_off += 1
            raise
        self.asked.append(question)
        return gateway_pb2.AnswerResponse(text=ANSWERS[question], model_version="v1")

    async def ReadFile(
        self, request: gateway_pb2.ReadFileRequest, _: object
    ) -> AsyncIterator[gateway_pb2.ReadFileResponse]:
        assert context.current().tenant == "acme"
        yield gateway_pb2.ReadFileResponse(data=(TASK if request.file_id == "file_1" else "metrics: [").encode())


class Generator(generator_pb2_grpc.GeneratorServiceServicer):
    """Predicts every byte with half a chance."""

    async def ListModels(self, request: object, _: object) -> generator_pb2.ListModelsResponse:
        return generator_pb2.ListModelsResponse(models=[generator_pb2.ServedModel(id="small", base="small")])

    async def Tokenize(self, request: generator_pb2.TokenizeRequest, _: object) -> generator_pb2.TokenizeResponse:
        return generator_pb2.TokenizeResponse(token_ids=list(request.text.encode()), context_length=64)

    async def Generate(
        self, request: generator_pb2.GenerateRequest, _: object
    ) -> AsyncIterator[generator_pb2.GenerateResponse]:
        scores = [generator_pb2.TokenLogprob(logprob=-0.6931472, token_bytes=b"x") for _ in request.token_ids.ids]
        yield generator_pb2.GenerateResponse(started=generator_pb2.Started(prompt_logprobs=scores))


@dataclass
class System:
    """The process and all around it."""

    process: ServiceProcess
    bus: NatsBus
    gateway: Gateway
    reports: list[events_pb2.JobProgress] = field(default_factory=list)

    async def submit(self, job_id: str, file_id: str = "file_1", task: str = "") -> None:
        job = events_pb2.EvaluateJob(job_id=job_id, tenant="acme", model="small", task=task, task_file_id=file_id)
        await self.bus.publish(JOBS_EVALUATE, job.SerializeToString(), message_id=f"evaluate-{job_id}")

    async def on_progress(self, received: Received) -> None:
        self.reports.append(events_pb2.JobProgress.FromString(received.payload))

    async def ended(self, job_id: str, timeout_s: float = 60) -> events_pb2.JobProgress:
        def last() -> events_pb2.JobProgress | None:
            return next((r for r in self.reports if r.job_id == job_id and r.status in FINAL), None)

        return await eventually(last, timeout_s=timeout_s)


@pytest.fixture
async def system(nats: NatsServer, tmp_path: Path) -> AsyncIterator[System]:
    gateway = Gateway()
    server = rpc.make_server("standin")
    gateway_pb2_grpc.add_GraphServiceServicer_to_server(gateway, server)
    gateway_pb2_grpc.add_FileServiceServicer_to_server(gateway, server)
    generator_pb2_grpc.add_GeneratorServiceServicer_to_server(Generator(), server)
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    settings = {"NATS_URL": nats.url, "GATEWAY_ADDR": address, "GENERATOR_ADDR": address, "PATIENCE_S": 1}
    process = ServiceProcess("evaluator", settings | {"DATA_DIR": tmp_path})
    bus = NatsBus.connect(nats.url, "test", STREAMS)
    system = System(process, bus, gateway)
    progress = asyncio.create_task(bus.consume(PROGRESS_ALL, durable="test", handler=system.on_progress))
    await eventually(lambda: bus.connected, timeout_s=20)
    await asyncio.to_thread(process.start)
    yield system
    await asyncio.to_thread(process.close)
    progress.cancel()
    await bus.close()
    await server.stop(0)


async def test_kill9_in_the_middle_asks_nothing_twice_and_ends_with_the_same_result(system: System) -> None:
    await system.submit("job_whole")
    whole = await system.ended("job_whole")
    assert whole.status == SUCCEEDED, whole.error
    assert json.loads(whole.result_json)["exact_match"]["value"] == 0.5
    assert json.loads(whole.result_json)["bits_per_byte"]["value"] == pytest.approx(1.0, abs=1e-6)
    system.gateway.asked.clear()
    system.gateway.pause_s = 1.0
    await system.submit("job_killed")
    await eventually(lambda: len(system.gateway.asked) == 2, timeout_s=30)
    await asyncio.to_thread(system.process.kill9)
    system.gateway.pause_s = 0.0
    await asyncio.to_thread(system.process.start)
    end = await system.ended("job_killed")
    assert end.status == SUCCEEDED and end.result_json == whole.result_json
    # The second answer may have been on its way to the disk when the process was killed.
    assert len(system.gateway.asked) in (4, 5) and system.gateway.asked.count("France?") == 1
    async with rpc.connect(system.process.address) as channel:
        with context.use(context.RequestContext("req_1", "acme")):
            async with rpc.call("evaluator.GetResult", timeout_s=5) as call:
                stub = evaluator_pb2_grpc.EvaluatorServiceStub(channel)
                request = evaluator_pb2.GetResultRequest(job_id="job_killed")
                found = await stub.GetResult(request, timeout=5, metadata=call.metadata)
    assert {metric.name: metric.value for metric in found.metrics} == {
        name: metric["value"] for name, metric in json.loads(end.result_json).items()
    }


async def test_a_gateway_that_is_away_longer_than_one_attempt_waits_fails_no_job(system: System) -> None:
    system.gateway.is_away = True
    await system.submit("job_away")
    # One attempt waits for a second and is delivered again; its reports tell attempts apart.
    await eventually(lambda: any(r.sequence > 2_000_000 for r in system.reports), timeout_s=30)
    system.gateway.is_away = False
    assert (await system.ended("job_away")).status == SUCCEEDED


async def test_a_cancelled_job_stops_in_the_middle_of_a_question_and_a_bad_file_fails(system: System) -> None:
    system.gateway.pause_s = 60.0
    await system.submit("job_cancelled")
    await eventually(lambda: any(r.job_id == "job_cancelled" and r.total for r in system.reports), timeout_s=30)
    await asyncio.sleep(0.3)
    await system.bus.broadcast(CONTROL_REQUEST_CANCEL, events_pb2.RequestCancel(id="job_cancelled").SerializeToString())
    assert (await system.ended("job_cancelled", timeout_s=10)).status == common_pb2.JOB_STATUS_CANCELLED
    await eventually(lambda: system.gateway.num_cut_off == 1)
    await system.submit("job_bad", file_id="file_2")
    assert "task file: line" in (await system.ended("job_bad")).error
    await system.submit("job_nope", file_id="", task="nope")
    assert "there are pressroom-basics@1" in (await system.ended("job_nope")).error
