"""TrainerService: runs with their curve and events, versions of models; each tenant sees its own."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from pressroom.common.v1 import common_pb2
from pressroom.trainer.v1 import trainer_pb2 as pb
from pressroom.trainer.v1 import trainer_pb2_grpc
from trainer_fakes import Workshop

from chassis import context, rpc
from chassis.errors import Code, PlatformError
from testkit.fake_bus import FakeBus
from trainer.api.grpc import TrainerServicer
from trainer.core.ports import Watcher
from trainer.core.runs import RunEvent, RunStatus, TrainOrder


class Quiet(Watcher):
    """Follows nothing."""

    def check(self) -> None: ...

    async def report(self, done: int, total: int) -> None: ...


def order(job_id: str, tenant: str = "acme", suffix: str = "facts") -> TrainOrder:
    return TrainOrder(job_id, tenant, "base", "file-1", "", suffix, "", seed=1)


@pytest.fixture
async def workshop(tmp_path: Path) -> Workshop:
    workshop = Workshop(tmp_path, FakeBus())
    for number, one in enumerate([order("ftjob-1"), order("ftjob-2"), order("ftjob-3", "other", "theirs")]):
        finetuner = workshop.worker._finetuner
        await finetuner.run(one, Quiet())
        await finetuner.finish(one, RunStatus.SUCCEEDED)
        path = workshop.store / "adapters" / one.job_id / "manifest.json"
        # Three in one second: their order is told by the manifest's time alone.
        text = path.read_text()
        at = text.index('"created_unix_s": ') + len('"created_unix_s": ')
        path.write_text(f"{text[:at]}{1_700_000_000 + number}{text[text.index(',', at) :]}")
    return workshop


@pytest.fixture
async def stub(workshop: Workshop) -> AsyncIterator[trainer_pb2_grpc.TrainerServiceStub]:
    server = rpc.make_server("trainer")
    servicer = TrainerServicer(workshop.runs, workshop.adapters)
    trainer_pb2_grpc.add_TrainerServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with rpc.connect(f"127.0.0.1:{port}") as channel:
        yield trainer_pb2_grpc.TrainerServiceStub(channel)
    await server.stop(0)


async def get_run(stub: trainer_pb2_grpc.TrainerServiceStub, job_id: str, tenant: str = "acme") -> pb.GetRunResponse:
    with context.use(context.RequestContext("req", tenant)):
        async with rpc.call("trainer.GetRun", timeout_s=10) as call:
            request = pb.GetRunRequest(job_id=job_id)
            return await stub.GetRun(request, timeout=call.timeout_s, metadata=call.metadata)


async def versions(
    stub: trainer_pb2_grpc.TrainerServiceStub, tenant: str, base: str = ""
) -> list[tuple[str, str, str]]:
    with context.use(context.RequestContext("req", tenant)):
        async with rpc.call("trainer.ListModelVersions", timeout_s=10) as call:
            request = pb.ListModelVersionsRequest(base=base)
            answer = await stub.ListModelVersions(request, timeout=call.timeout_s, metadata=call.metadata)
    return [(one.id, one.path, one.stage) for one in answer.versions]


async def test_a_run_has_its_curve_its_events_and_its_tokens(stub: trainer_pb2_grpc.TrainerServiceStub) -> None:
    run = await get_run(stub, "ftjob-1")
    assert (run.step, run.total_steps, run.status) == (4, 4, common_pb2.JOB_STATUS_SUCCEEDED)
    assert list(run.losses) == pytest.approx([1, 1 / 2, 1 / 3, 1 / 4]) and run.trained_tokens == 120
    assert len({event.id for event in run.events}) == len(run.events)
    assert [event.at_unix_ms for event in run.events] == sorted(event.at_unix_ms for event in run.events)
    metrics = [event for event in run.events if event.type == "metrics"]
    assert len(metrics) == 4 and '"train_loss": 0.25' in metrics[-1].data_json
    assert run.events[-1].message == "The job has successfully completed"


@pytest.mark.parametrize(("job_id", "tenant"), [("ftjob-9", "acme"), ("ftjob-3", "acme"), ("ftjob-1", "other")])
async def test_an_unknown_run_and_anothers_run_look_the_same(
    stub: trainer_pb2_grpc.TrainerServiceStub, job_id: str, tenant: str
) -> None:
    with pytest.raises(PlatformError, match=f"no training run {job_id}") as caught:
        await get_run(stub, job_id, tenant)
    assert caught.value.code is Code.NOT_FOUND


async def test_a_job_id_that_is_a_path_is_refused(stub: trainer_pb2_grpc.TrainerServiceStub) -> None:
    with pytest.raises(PlatformError) as caught:
        await get_run(stub, "../ftjob-1")
    assert caught.value.code is Code.INVALID_ARGUMENT


async def test_versions_come_newest_first_and_the_older_of_one_id_are_retired(
    stub: trainer_pb2_grpc.TrainerServiceStub,
) -> None:
    own = [("base:facts", "adapters/ftjob-2", "published"), ("base:facts", "adapters/ftjob-1", "retired")]
    assert await versions(stub, "acme") == own
    assert await versions(stub, "acme", base="another") == []
    assert await versions(stub, "other", base="base") == [("base:theirs", "adapters/ftjob-3", "published")]


async def test_of_very_many_events_the_newest_are_told(
    stub: trainer_pb2_grpc.TrainerServiceStub, workshop: Workshop
) -> None:
    _, folder = workshop.runs.begin(order("ftjob-1"))
    for number in range(1_200):
        folder.add_event(RunEvent(f"more-{number}", number, "info", "message", "text"))
    events = (await get_run(stub, "ftjob-1")).events
    assert len(events) == 1_000 and events[-1].id == "more-1199"


def test_no_call_of_the_proto_was_forgotten() -> None:
    (service,) = pb.DESCRIPTOR.services_by_name.values()
    assert {method.name for method in service.methods} <= set(vars(TrainerServicer))
