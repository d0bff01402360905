"""Runs in MLflow on its SQLite store: mirrored beside the work, whatever is killed."""

import asyncio
import json
import sqlite3
import struct
import sys
from pathlib import Path

import pytest

from testkit import eventually
from trainer.backends import run_files
from trainer.backends.run_folders import DirectoryRun, DirectoryRuns
from trainer.backends.tracking.process import MlflowTracker
from trainer.core.runs import RunStatus, Step, TrainOrder

# MLflow's first start alone takes 13 s of a quiet core.
pytestmark = [pytest.mark.integration, pytest.mark.timeout(590)]

AT_ONCE = (
    "import sys, chassis.priority; chassis.priority.lower = lambda: None; "
    "from trainer.backends.tracking.mirror import main; sys.exit(main(sys.argv))"
)


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tracker at normal priority, so that a test need not wait for idle cores."""
    monkeypatch.setattr("trainer.backends.tracking.process._COMMAND", (sys.executable, "-c", AT_ONCE))


PLAN = {"n_epochs": 2, "batch_size": 3, "learning_rate_multiplier": 1.0, "num_examples": 6, "seed": 7}


def add_steps(run: DirectoryRun, first: int, last: int) -> None:
    with run_files.StepsFile(run.path) as steps:
        for step in range(first, last + 1):
            steps.append(Step(step, 1.0 / step, 30, 1e-3, 1_700_000_000_000 + step))


def checkpoint_at(run: DirectoryRun, step: int) -> None:
    header = json.dumps({"__metadata__": {"step": str(step)}}).encode()
    (run.path / run_files.CHECKPOINT).write_bytes(struct.pack("<Q", len(header)) + header)


def query(database: Path, sql: str) -> list[tuple[object, ...]]:
    if not database.exists():
        return []
    with sqlite3.connect(f"file:{database}?mode=ro", uri=True, timeout=30) as connection:
        return connection.execute(sql).fetchall()


async def test_a_run_is_mirrored_once_although_the_tracker_was_killed(tmp_path: Path) -> None:
    order = TrainOrder("ftjob-1", "acme", "base", "file-1", "0" * 64, "facts", "", 7)
    run, folder = DirectoryRuns(tmp_path / "runs", max_runs=9).begin(order)
    run.plan, run.total_steps = dict(PLAN), 6
    folder.save(run)
    add_steps(folder, 1, 4)
    checkpoint_at(folder, 3)
    tracker = MlflowTracker("", tmp_path, "finetuning")
    database = tmp_path / "mlflow.db"

    following = asyncio.create_task(tracker.follow(folder))
    told = "SELECT step FROM metrics WHERE key = 'train_loss' ORDER BY step"
    await eventually(lambda: query(database, told) == [(1,), (2,), (3,)], timeout_s=250, interval_s=0.5)
    following.cancel()  # as when the trainer dies: the process is killed
    await asyncio.wait({following})

    add_steps(folder, 5, 6)
    run.status = RunStatus.SUCCEEDED
    folder.save(run)
    await tracker.follow(folder)
    assert query(database, told) == [(step,) for step in range(1, 7)], "neither gap nor double"
    ((run_id, status),) = query(database, "SELECT run_uuid, status FROM runs")
    assert (run_id, status) == (folder.tracker_run_id(), "FINISHED")
    params = dict(query(database, "SELECT key, value FROM params"))
    assert params == {name: str(value) for name, value in PLAN.items()}
    tags = dict(query(database, "SELECT key, value FROM tags"))
    assert tags["fine_tuned_model"] == "base:facts" and tags["job_id"] == "ftjob-1"


async def test_a_tracker_that_cannot_be_reached_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    order = TrainOrder("ftjob-1", "acme", "base", "file-1", "", "", "", 7)
    _, folder = DirectoryRuns(tmp_path / "runs", max_runs=9).begin(order)
    await MlflowTracker("nonsense://nowhere", tmp_path, "finetuning").follow(folder)
    assert "a run is not tracked" in caplog.text
