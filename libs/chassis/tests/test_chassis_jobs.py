"""What workers of jobs share: reports, cancellations, when a job is given up, and the files that they read."""

import asyncio
import hashlib
from collections.abc import AsyncIterator

import grpc.aio
import pytest
from pressroom.common.v1 import common_pb2
from pressroom.events.v1 import events_pb2
from pressroom.gateway.v1 import gateway_pb2, gateway_pb2_grpc

from chassis import context, rpc
from chassis.bus import Received
from chassis.errors import Code, PlatformError
from chassis.jobs import MAX_DELIVER, Cancellations, JobCancelled, Reporter, check_attempt, final_reason
from chassis.uploads import GrpcFiles
from contracts.jobs import decode_cancel, encode_progress, open_file
from contracts.subjects import CONTROL_REQUEST_CANCEL, PROGRESS_ALL
from testkit.fake_bus import FakeBus


def reports(bus: FakeBus) -> list[events_pb2.JobProgress]:
    return [events_pb2.JobProgress.FromString(stored.payload) for stored in bus.stored(PROGRESS_ALL)]


async def test_progress_is_told_twice_a_second_at_most_and_the_end_always() -> None:
    bus, now = FakeBus(), [0.0]
    reporter = Reporter(bus, encode_progress, "job_1", 1, clock=lambda: now[0])
    await reporter.running()
    for done in range(10):
        now[0] = done * 0.1
        await reporter.running(done, 10)
    await reporter.ended("succeeded", result_json="{}")
    told = [(r.status, r.done, r.total) for r in reports(bus)]
    running, succeeded = common_pb2.JOB_STATUS_RUNNING, common_pb2.JOB_STATUS_SUCCEEDED
    assert told == [(running, 0, 0), (running, 0, 10), (running, 5, 10), (succeeded, 9, 10)]


async def test_reports_of_a_later_attempt_count_from_higher_up() -> None:
    bus = FakeBus()
    for attempt in (1, 2):
        await Reporter(bus, encode_progress, "job_1", attempt).ended("failed", error="why")
    first, second = reports(bus)
    assert first.sequence < second.sequence and second.error == "why"


async def test_a_cancelled_job_is_remembered_until_it_has_ended() -> None:
    cancellations = Cancellations(decode_cancel)
    payload = events_pb2.RequestCancel(id="job_1").SerializeToString()
    await cancellations.handle(Received(CONTROL_REQUEST_CANCEL, payload, "", 1, {}))
    cancellations.check("job_2")
    with pytest.raises(JobCancelled):
        cancellations.check("job_1")
    cancellations.forget("job_1")
    cancellations.check("job_1")
    with pytest.raises(PlatformError, match="could not be read"):
        await cancellations.handle(Received(CONTROL_REQUEST_CANCEL, b"\xff", "", 1, {}))


async def test_the_work_of_a_job_is_cut_off_as_soon_as_it_is_cancelled() -> None:
    cancellations, was_cut = Cancellations(decode_cancel), []

    async def work(answer: str | None) -> str | None:
        try:
            return answer or await asyncio.Event().wait()  # type: ignore[return-value, func-returns-value]
        except asyncio.CancelledError:
            was_cut.append(True)
            raise

    assert await cancellations.run("job_1", work("done")) == "done"
    running = asyncio.create_task(cancellations.run("job_1", work(None)))
    for job_id in ("job_2", "job_1"):
        await asyncio.sleep(0.01)
        assert not running.done()
        payload = events_pb2.RequestCancel(id=job_id).SerializeToString()
        await cancellations.handle(Received(CONTROL_REQUEST_CANCEL, payload, "", 1, {}))
    with pytest.raises(JobCancelled):
        await running
    assert was_cut


def test_what_may_pass_is_tried_again_and_what_cannot_is_final_at_once() -> None:
    away, bad = PlatformError(Code.UNAVAILABLE, "away"), PlatformError(Code.INVALID_ARGUMENT, "bad")
    assert final_reason(away, 1, "trainer") is None
    assert final_reason(away, MAX_DELIVER, "trainer") == f"given up after {MAX_DELIVER} attempts: away"
    assert final_reason(bad, 1, "trainer") == "bad"
    assert final_reason(ValueError("x"), 1, "trainer") is None
    assert final_reason(ValueError("x"), 5, "trainer") == "an unexpected error; the trainer's log has the cause"
    check_attempt(MAX_DELIVER)
    with pytest.raises(PlatformError, match="cut off"):
        check_attempt(MAX_DELIVER + 1)


class Files(gateway_pb2_grpc.FileServiceServicer):
    async def ReadFile(
        self, request: gateway_pb2.ReadFileRequest, _: object
    ) -> AsyncIterator[gateway_pb2.ReadFileResponse]:
        if request.file_id != "file_1" or context.current().tenant != "acme":
            raise PlatformError(Code.NOT_FOUND, "no such file")
        for piece in (b"one ", b"two"):
            yield gateway_pb2.ReadFileResponse(data=piece)


@pytest.fixture
async def channel() -> AsyncIterator[grpc.aio.Channel]:
    server = rpc.make_server("gateway")
    gateway_pb2_grpc.add_FileServiceServicer_to_server(Files(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with rpc.connect(f"127.0.0.1:{port}") as channel:
        yield channel
    await server.stop(0)


async def test_a_file_is_read_whole_and_what_is_not_the_upload_is_refused(channel: grpc.aio.Channel) -> None:
    files = GrpcFiles(channel, open_file, timeout_s=10, max_bytes=7)
    with context.use(context.RequestContext("", "acme")):
        assert await files.read("file_1", hashlib.sha256(b"one two").hexdigest()) == b"one two"
        with pytest.raises(PlatformError) as caught:
            await files.read("file_1", "0" * 64)
        assert caught.value.code is Code.DATA_LOSS
        with pytest.raises(PlatformError) as caught:
            await GrpcFiles(channel, open_file, timeout_s=10, max_bytes=6).read("file_1", "")
        assert caught.value.code is Code.PAYLOAD_TOO_LARGE
    with pytest.raises(PlatformError) as caught:
        await files.read("file_1", "")
    assert caught.value.code is Code.NOT_FOUND, "another tenant's file is none"
