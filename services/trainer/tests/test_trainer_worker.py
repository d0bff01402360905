"""The worker over a bus in memory: how jobs end, what is published, what a crash or a cancellation leaves."""

import asyncio
import errno
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from pressroom.common.v1 import common_pb2
from pressroom.events.v1 import events_pb2
from trainer_fakes import NUM_STEPS, FakeEnd, Workshop

from chassis.bus import DEAD_PREFIX
from chassis.errors import Code, PlatformError
from contracts.subjects import CONTROL_REQUEST_CANCEL, EVENTS_MODEL_PUBLISHED, JOBS_TRAIN, progress
from modelstore import Manifest
from modelstore.manifest import MANIFEST_NAME, sha256_of
from testkit import eventually
from testkit.bus_suite import consuming
from testkit.fake_bus import FakeBus
from trainer.api.consumers import DURABLE
from trainer.core.ports import RunFolder

SUCCEEDED, FAILED, CANCELLED = (
    common_pb2.JOB_STATUS_SUCCEEDED,
    common_pb2.JOB_STATUS_FAILED,
    common_pb2.JOB_STATUS_CANCELLED,
)


@pytest.fixture
def bus() -> FakeBus:
    return FakeBus()


@pytest.fixture
def workshop(bus: FakeBus, tmp_path: Path) -> Workshop:
    return Workshop(tmp_path, bus)


@pytest.fixture
async def working(bus: FakeBus, workshop: Workshop) -> AsyncIterator[Workshop]:
    listening = asyncio.create_task(bus.listen(CONTROL_REQUEST_CANCEL, workshop.cancellations.handle))
    async with consuming(bus, JOBS_TRAIN, workshop.worker.handle, durable=DURABLE, max_deliver=50, backoff_s=(0.01,)):
        yield workshop
    listening.cancel()


def job(**fields: Any) -> events_pb2.TrainJob:
    told = {"job_id": "ftjob-1", "tenant": "acme", "model": "base", "training_file_id": "file-1", "suffix": "facts"}
    return events_pb2.TrainJob(**(told | fields))


async def submit(bus: FakeBus, **fields: Any) -> None:
    message = job(**fields)
    await bus.publish(JOBS_TRAIN, message.SerializeToString(), message_id=f"train-{message.job_id}")


def reports(bus: FakeBus, job_id: str = "ftjob-1") -> list[events_pb2.JobProgress]:
    return [events_pb2.JobProgress.FromString(stored.payload) for stored in bus.stored(progress(job_id))]


async def ended(bus: FakeBus, job_id: str = "ftjob-1") -> events_pb2.JobProgress:
    def last() -> events_pb2.JobProgress | None:
        found = reports(bus, job_id)
        return found[-1] if found and found[-1].status in (SUCCEEDED, FAILED, CANCELLED) else None

    return await eventually(last, timeout_s=20)


async def cancel(bus: FakeBus, job_id: str = "ftjob-1") -> None:
    await bus.broadcast(CONTROL_REQUEST_CANCEL, events_pb2.RequestCancel(id=job_id).SerializeToString())


async def test_a_job_ends_with_a_published_loaded_and_announced_adapter(bus: FakeBus, working: Workshop) -> None:
    await submit(bus)
    end = await ended(bus)
    assert (end.status, end.done, end.total, end.error) == (SUCCEEDED, NUM_STEPS, NUM_STEPS, "")
    result = json.loads(end.result_json)
    folder = working.store / result["adapter"]["path"]
    assert result == {
        "fine_tuned_model": "base:facts",
        "trained_tokens": 120,
        "final_loss": 0.25,
        "adapter": {"path": "adapters/ftjob-1", "manifest_sha256": sha256_of(folder / MANIFEST_NAME)},
    }
    manifest = Manifest.load(folder)
    manifest.verify()
    assert (manifest.id, manifest.kind) == ("base:facts", "adapter")
    assert dict(manifest.config) == {
        "base": "base",
        "base_version": "0123456789ab",
        "base_weights_sha256": "ab" * 32,
        "tenant": "acme",
        "job_id": "ftjob-1",
        "rank": 8,
        "alpha": 16,
        "target_modules": ["q_proj"],
    }
    (event,) = [events_pb2.ModelPublished.FromString(m.payload) for m in bus.stored(EVENTS_MODEL_PUBLISHED)]
    assert (event.id, event.base, event.path) == ("base:facts", "base", "adapters/ftjob-1")
    assert event.manifest_sha256 == result["adapter"]["manifest_sha256"]
    assert list(working.serving.loaded) == ["base:facts"]
    await eventually(lambda: not bus.stored(JOBS_TRAIN))
    kept = {path.name for path in (working.folder / "runs" / "ftjob-1").iterdir()}
    assert kept == {"run.json", "events.jsonl", "steps.jsonl"}, "checkpoints and the file are gone, the history is not"
    assert working.tracker.num_followed == 1


async def test_without_a_suffix_the_model_is_named_for_its_job(bus: FakeBus, working: Workshop) -> None:
    await submit(bus, suffix="")
    assert json.loads((await ended(bus)).result_json)["fine_tuned_model"] == "base:ftjob-1"


async def test_progress_is_told_and_one_job_runs_at_a_time(bus: FakeBus, working: Workshop) -> None:
    working.trainings.pause_s = 0.2
    await submit(bus)
    await submit(bus, job_id="ftjob-2", suffix="")
    await ended(bus, "ftjob-2")
    assert working.trainings.most_running == 1
    running = [r for r in reports(bus) if r.status == common_pb2.JOB_STATUS_RUNNING]
    assert {r.total for r in running} >= {NUM_STEPS} and max(r.done for r in running) > 0
    assert [r.sequence for r in reports(bus)] == sorted({r.sequence for r in reports(bus)})


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"training_file_id": "file-9"}, "no such file"),
        ({"suffix": "Not This"}, "suffix: small letters, digits and -"),
        ({"model": "base:facts"}, "finetuned already"),
        ({"model": "../base"}, "no model '../base' that can be finetuned"),
        ({"tenant": "a b"}, "tenant: "),
    ],
)
async def test_a_job_that_cannot_be_done_fails_with_the_reason(
    bus: FakeBus, working: Workshop, fields: dict[str, str], why: str
) -> None:
    await submit(bus, **fields)
    end = await ended(bus)
    assert end.status == FAILED and why in end.error
    assert working.published() == [] and not bus.stored(EVENTS_MODEL_PUBLISHED)


async def test_what_the_child_refuses_is_told_to_the_client(bus: FakeBus, working: Workshop) -> None:
    working.trainings.refusal = {"kind": "refused", "code": "INVALID_ARGUMENT", "message": "training_file: line 7: no"}
    await submit(bus)
    end = await ended(bus)
    assert (end.status, end.error, working.trainings.num_children) == (FAILED, "training_file: line 7: no", 1)
    assert working.published() == []


async def test_a_disk_that_is_full_in_the_child_fails_the_job(bus: FakeBus, working: Workshop) -> None:
    working.trainings.refusal = {"kind": "no_space", "message": "the disk is full"}
    await submit(bus)
    end = await ended(bus)
    assert end.status == FAILED and "the disk is full; nothing was published" in end.error
    assert [p.name for p in (working.folder / "runs" / "ftjob-1").glob("*.safetensors")] == []


async def test_a_disk_that_is_full_while_publishing_leaves_nothing(
    bus: FakeBus, working: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("trainer.backends.adapter_store.write_manifest", full)
    await submit(bus)
    end = await ended(bus)
    assert end.status == FAILED and "no room on the trainer's disk" in end.error
    assert working.published() == [] and not bus.stored(EVENTS_MODEL_PUBLISHED)


async def test_a_child_that_dies_once_is_followed_by_one_that_goes_on(bus: FakeBus, working: Workshop) -> None:
    working.trainings.deaths = [(2, FakeEnd(-9)), (3, FakeEnd(1, "boom"))]
    await submit(bus)
    assert (await ended(bus)).status == SUCCEEDED
    assert working.trainings.num_children == 3
    run, kept = working.runs.find("ftjob-1") or (None, None)
    assert run is not None and kept is not None
    assert [step.step for step in kept.steps()] == [1, 2, 3, 4]
    ids = [event.id.removeprefix("ftevent-ftjob-1-") for event in kept.events()]
    assert "died-2-1" in ids and "resumed-2" in ids and ids.count("step-2") == 1


async def test_a_child_that_dies_twice_at_one_step_fails_the_job_with_its_last_words(
    bus: FakeBus, working: Workshop
) -> None:
    working.trainings.deaths = [(2, FakeEnd(1, "first")), (2, FakeEnd(1, "Traceback\nValueError: odd"))]
    await submit(bus)
    end = await ended(bus)
    assert end.status == FAILED
    assert "ended with status 1 2 times at step 2" in end.error and "ValueError: odd" in end.error
    assert working.published() == []


@pytest.mark.parametrize("code", [Code.UNAVAILABLE, Code.DEADLINE_EXCEEDED])
async def test_a_generator_that_stays_away_does_not_fail_the_job(bus: FakeBus, working: Workshop, code: Code) -> None:
    working.serving.problem = PlatformError(code, "generator is not available")
    await submit(bus)
    assert (await ended(bus)).status == SUCCEEDED
    assert working.serving.num_loads > 1 and working.published() == ["ftjob-1"]
    _, kept = working.runs.find("ftjob-1") or (None, None)
    assert kept is not None
    (warning,) = [event for event in kept.events() if event.level == "warn"]
    assert "did not acknowledge" in warning.message


async def test_an_adapter_that_the_generator_refuses_is_taken_back(bus: FakeBus, working: Workshop) -> None:
    working.serving.problem = PlatformError(Code.FAILED_PRECONDITION, "the adapter is for another base")
    await submit(bus)
    end = await ended(bus)
    assert (end.status, end.error) == (FAILED, "the adapter is for another base")
    assert working.published() == []


async def test_a_job_cancelled_before_it_is_taken_never_runs(bus: FakeBus, working: Workshop) -> None:
    await cancel(bus)
    await eventually(lambda: "ftjob-1" in working.cancellations)
    await submit(bus)
    assert (await ended(bus)).status == CANCELLED
    assert working.trainings.num_children == 0


async def test_a_job_cancelled_while_it_trains_stops_its_child(bus: FakeBus, working: Workshop) -> None:
    working.trainings.pause_s = 5.0
    await submit(bus)
    await eventually(lambda: working.trainings.num_running)
    await cancel(bus)
    assert (await ended(bus)).status == CANCELLED
    assert working.trainings.num_running == 0 and working.published() == []
    await submit(bus, job_id="ftjob-2", suffix="other")
    working.trainings.pause_s = 0.0
    assert (await ended(bus, "ftjob-2")).status == SUCCEEDED, "the next job runs"


async def test_a_job_cancelled_while_it_is_published_is_taken_back(bus: FakeBus, working: Workshop) -> None:
    working.serving.pause_s = 5.0
    await submit(bus)
    await eventually(lambda: working.serving.num_loads)
    await cancel(bus)
    assert (await ended(bus)).status == CANCELLED
    assert working.published() == [] and working.serving.loaded == {}


async def test_a_gateway_that_is_away_delays_the_job(bus: FakeBus, working: Workshop) -> None:
    working.files.is_away = True
    await submit(bus)
    await asyncio.sleep(0.1)
    working.files.is_away = False
    assert (await ended(bus)).status == SUCCEEDED


async def test_an_end_that_the_bus_did_not_take_is_told_again_and_nothing_is_done_twice(
    bus: FakeBus, workshop: Workshop
) -> None:
    refused: list[object] = []

    class LosesTheEnd(FakeBus):
        async def publish(self, subject: str, payload: bytes, **kwargs: Any) -> None:  # type: ignore[override]
            if subject == progress("ftjob-1"):
                report = events_pb2.JobProgress.FromString(payload)
                if report.status == SUCCEEDED and not refused:
                    refused.append(report)
                    raise PlatformError(Code.UNAVAILABLE, "the bus did not take a message")
            await bus.publish(subject, payload, **kwargs)

    workshop.bus = LosesTheEnd()
    worker = workshop.make_worker()
    await submit(bus)
    async with consuming(bus, JOBS_TRAIN, worker.handle, durable=DURABLE, backoff_s=(0.01,)):
        assert (await ended(bus)).status == SUCCEEDED
    assert len(refused) == 1 and workshop.trainings.num_children == 1
    assert len(bus.stored(EVENTS_MODEL_PUBLISHED)) == 1


async def test_a_trainer_cut_off_in_the_middle_goes_on_after_its_restart(bus: FakeBus, workshop: Workshop) -> None:
    workshop.trainings.pause_s = 0.1
    await submit(bus)
    async with consuming(bus, JOBS_TRAIN, workshop.worker.handle, durable=DURABLE, backoff_s=(0.01,)):
        await eventually(lambda: any(report.done >= 1 for report in reports(bus)) or _steps(workshop) >= 2)
    assert workshop.trainings.num_running == 0, "the child went with the worker"
    before = _steps(workshop)
    async with consuming(bus, JOBS_TRAIN, workshop.make_worker().handle, durable=DURABLE, backoff_s=(0.01,)):
        end = await ended(bus)
    assert end.status == SUCCEEDED and 1 <= before < NUM_STEPS
    assert json.loads(end.result_json)["trained_tokens"] == 120, "no step was lost or doubled"


def _steps(workshop: Workshop) -> int:
    found = workshop.runs.find("ftjob-1")
    return len(found[1].steps()) if found else 0


async def test_a_cancellation_that_was_carried_out_holds_after_a_restart(bus: FakeBus, workshop: Workshop) -> None:
    class LosesTheEnd(FakeBus):
        async def publish(self, subject: str, payload: bytes, **kwargs: Any) -> None:  # type: ignore[override]
            if subject == progress("ftjob-1"):
                raise PlatformError(Code.UNAVAILABLE, "the bus did not take a message")

    workshop.trainings.pause_s = 5.0
    workshop.bus = LosesTheEnd()
    worker = workshop.make_worker()
    await submit(bus)
    async with consuming(bus, JOBS_TRAIN, worker.handle, durable=DURABLE, backoff_s=(60,)):
        await eventually(lambda: workshop.trainings.num_running)
        await workshop.cancellations.handle(_cancellation())
        await eventually(lambda: not workshop.trainings.num_running)
        await eventually(lambda: workshop.runs.find("ftjob-1")[0].status == "cancelled")  # type: ignore[index]
    workshop.bus = bus
    workshop.cancellations.forget("ftjob-1")
    async with consuming(bus, JOBS_TRAIN, workshop.make_worker().handle, durable=DURABLE, backoff_s=(0.01,)):
        assert (await ended(bus)).status == CANCELLED
    assert workshop.trainings.num_children == 1


def _cancellation() -> Any:
    from chassis.bus import Received

    payload = events_pb2.RequestCancel(id="ftjob-1").SerializeToString()
    return Received(CONTROL_REQUEST_CANCEL, payload, "", 1, {})


@pytest.mark.parametrize(
    "payload", [b"\xff not protobuf", b"", events_pb2.TrainJob(job_id="../up").SerializeToString()]
)
async def test_a_job_that_cannot_be_read_is_a_dead_letter(bus: FakeBus, working: Workshop, payload: bytes) -> None:
    await bus.publish(JOBS_TRAIN, payload, message_id="bad")
    await eventually(lambda: bus.stored(DEAD_PREFIX + JOBS_TRAIN))
    assert bus.stored("pressroom.progress.*") == []


async def test_old_runs_are_dropped_above_the_number_that_is_kept(bus: FakeBus, working: Workshop) -> None:
    for number in range(5):
        await submit(bus, job_id=f"ftjob-{number}", suffix=f"s{number}")
        await ended(bus, f"ftjob-{number}")
    kept = sorted(path.name for path in (working.folder / "runs").iterdir())
    assert kept == ["ftjob-2", "ftjob-3", "ftjob-4"]
    assert len(working.published()) == 5, "what was published stays"


async def test_a_tracker_that_fails_is_no_failure_of_the_job(bus: FakeBus, working: Workshop) -> None:
    async def follow(folder: RunFolder) -> None:
        raise RuntimeError("no tracker")

    working.tracker.follow = follow  # type: ignore[method-assign]
    await submit(bus)
    assert (await ended(bus)).status == SUCCEEDED
