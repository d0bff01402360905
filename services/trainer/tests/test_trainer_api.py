"""The trainer answers every job and every call honestly: not available yet."""

from collections.abc import AsyncIterator

import grpc.aio
import pytest
from pressroom.common.v1 import common_pb2
from pressroom.events.v1 import events_pb2
from pressroom.trainer.v1 import trainer_pb2 as pb
from pressroom.trainer.v1 import trainer_pb2_grpc

import testkit
from chassis import rpc
from chassis.bus import DEAD_PREFIX
from chassis.errors import Code, PlatformError
from contracts.subjects import JOBS_TRAIN, progress
from testkit.bus_suite import consuming
from testkit.fake_bus import FakeBus
from trainer.api.consumers import DURABLE, NOT_AVAILABLE, TrainWorker
from trainer.api.grpc import TrainerServicer


@pytest.fixture
async def bus() -> AsyncIterator[FakeBus]:
    bus = FakeBus()
    async with consuming(bus, JOBS_TRAIN, TrainWorker(bus).handle, durable=DURABLE, backoff_s=(0.01,)):
        yield bus


async def test_a_job_is_answered_with_failed_and_then_leaves_the_queue(bus: FakeBus) -> None:
    await bus.publish(JOBS_TRAIN, events_pb2.TrainJob(job_id="job_1").SerializeToString(), message_id="job_1")
    await testkit.eventually(lambda: bus.stored(progress("job_1")) and not bus.stored(JOBS_TRAIN))
    (stored,) = bus.stored(progress("job_1"))
    answer = events_pb2.JobProgress.FromString(stored.payload)
    assert (answer.job_id, answer.status, answer.error) == ("job_1", common_pb2.JOB_STATUS_FAILED, NOT_AVAILABLE)


async def test_a_job_stays_in_the_queue_until_its_answer_is_stored() -> None:
    bus, refusals = FakeBus(), []

    class AnswersLost(FakeBus):
        async def publish(self, *args: object, **kwargs: object) -> None:
            if not refusals:
                refusals.append(args)
                raise PlatformError(Code.UNAVAILABLE, "the bus did not take a message")
            await bus.publish(*args, **kwargs)  # type: ignore[arg-type]

    worker = TrainWorker(AnswersLost())
    await bus.publish(JOBS_TRAIN, events_pb2.TrainJob(job_id="job_1").SerializeToString(), message_id="job_1")
    async with consuming(bus, JOBS_TRAIN, worker.handle, durable=DURABLE, backoff_s=(0.01,)):
        await testkit.eventually(lambda: bus.stored(progress("job_1")))
    assert len(refusals) == 1


@pytest.mark.parametrize("payload", [b"\xff not protobuf", b""])
async def test_a_job_that_cannot_be_read_is_a_dead_letter(bus: FakeBus, payload: bytes) -> None:
    await bus.publish(JOBS_TRAIN, payload, message_id="bad")
    await testkit.eventually(lambda: bus.stored(DEAD_PREFIX + JOBS_TRAIN))
    assert bus.stored("pressroom.progress.*") == []


@pytest.fixture
async def channel() -> AsyncIterator[grpc.aio.Channel]:
    server = rpc.make_server("trainer")
    trainer_pb2_grpc.add_TrainerServiceServicer_to_server(TrainerServicer(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with rpc.connect(f"127.0.0.1:{port}") as channel:
        yield channel
    await server.stop(0)


@pytest.mark.parametrize(
    ("method", "request_"),
    [("GetRun", pb.GetRunRequest(job_id="job_1")), ("ListModelVersions", pb.ListModelVersionsRequest())],
)
async def test_every_call_says_that_it_comes_later(channel: grpc.aio.Channel, method: str, request_: object) -> None:
    stub = trainer_pb2_grpc.TrainerServiceStub(channel)
    with pytest.raises(PlatformError, match="not available yet") as caught:
        async with rpc.call(f"trainer.{method}", timeout_s=5) as call:
            await getattr(stub, method)(request_, timeout=call.timeout_s, metadata=call.metadata)
    assert caught.value.code is Code.UNIMPLEMENTED


def test_no_call_of_the_proto_was_forgotten() -> None:
    (service,) = pb.DESCRIPTOR.services_by_name.values()
    assert {method.name for method in service.methods} <= set(vars(TrainerServicer))
