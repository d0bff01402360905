"""The process that mirrors one run into MLflow until the run has ended:
`python -m trainer.backends.tracking.mirror RUN_FOLDER TRACKING_URI ARTIFACT_URI EXPERIMENT`.

It can be killed and started again: which steps MLflow has is asked of MLflow. While the run lasts, only steps that a
checkpoint covers are told, since those behind it may be done again after a crash.
"""

import json
import logging
import os
import sys
import time
from pathlib import Path
from typing import Any

from trainer.backends import child_side, run_files
from trainer.backends.durable_files import write_whole
from trainer.backends.run_folders import DirectoryRun
from trainer.core.runs import Run, RunStatus, Step

_POLL_S = 1.0
_BATCH = 1_000  # metrics in one call: MLflow's own limit
_STATUS = {RunStatus.SUCCEEDED: "FINISHED", RunStatus.FAILED: "FAILED", RunStatus.CANCELLED: "KILLED"}


class Mirror:
    """One run's. `client` is an MlflowClient."""

    def __init__(self, client: Any, folder: DirectoryRun, experiment: str, artifact_uri: str) -> None:
        self._client = client
        self._folder = folder
        self._experiment = experiment
        self._artifact_uri = artifact_uri
        self._run_id = ""
        self._num_told = 0
        self._has_plan = False

    def follow(self) -> None:
        """Returns when the run has ended and all of it is told."""
        while True:
            run = self._folder.load()  # before the steps, so that the end comes with the last of them
            if run is None:
                raise FileNotFoundError(f"{self._folder.path.name} holds no run")
            if not self._run_id:
                self._begin(run)
            self._tell(run)
            if run.status.is_final:
                self._client.set_tag(self._run_id, "error", run.error)
                self._client.set_terminated(self._run_id, _STATUS[run.status])
                return
            time.sleep(_POLL_S)

    def _begin(self, run: Run) -> None:
        self._run_id = self._folder.tracker_run_id() or self._create(run)
        history = self._client.get_metric_history(self._run_id, "train_loss")
        self._num_told = max((metric.step for metric in history), default=0)
        self._client.update_run(self._run_id, status="RUNNING")

    def _create(self, run: Run) -> str:
        order = run.order
        found = self._client.get_experiment_by_name(self._experiment)
        experiment_id = (
            found.experiment_id
            if found is not None
            else self._client.create_experiment(self._experiment, artifact_location=self._artifact_uri)
        )
        tags = {
            "job_id": order.job_id,
            "tenant": order.tenant,
            "base": order.model,
            "fine_tuned_model": order.fine_tuned_model,
            "training_file_id": order.file_id,
            "training_file_sha256": order.file_sha256,
        }
        created = self._client.create_run(
            experiment_id, start_time=run.created_unix_ms, tags=tags, run_name=order.job_id
        )
        run_id = str(created.info.run_id)
        write_whole(self._folder.path / run_files.TRACKED, json.dumps({"run_id": run_id}).encode())
        return run_id

    def _tell(self, run: Run) -> None:
        if run.plan and not self._has_plan:
            for name, value in run.plan.items():
                self._client.log_param(self._run_id, name, value)
            self._has_plan = True
        steps = self._folder.steps()
        if not run.status.is_final:
            steps = steps[: run_files.checkpoint_step(self._folder.path)]
        self._log(steps[self._num_told :])
        self._num_told = max(self._num_told, len(steps))

    def _log(self, steps: list[Step]) -> None:
        from mlflow.entities import Metric

        metrics = [
            Metric(name, value, step.at_unix_ms, step.step)
            for step in steps
            for name, value in (
                ("train_loss", step.loss),
                ("learning_rate", step.learning_rate),
                ("num_tokens", float(step.num_tokens)),
            )
        ]
        for start in range(0, len(metrics), _BATCH):
            self._client.log_batch(self._run_id, metrics=metrics[start : start + _BATCH])


def main(argv: list[str]) -> int:
    """Returns the exit status; the reason of a failure is on standard error."""
    child_side.begin()
    _, folder, uri, artifact_uri, experiment = argv
    # Telemetry and the git lookup of MLflow would reach out of the machine or start processes.
    os.environ |= {"MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true", "GIT_PYTHON_REFRESH": "quiet"}
    logging.basicConfig(level=logging.WARNING)
    from mlflow import MlflowClient

    _make_database(uri)
    client = MlflowClient(tracking_uri=uri, registry_uri=uri)
    Mirror(client, DirectoryRun(Path(folder)), experiment, artifact_uri).follow()
    return 0


def _make_database(uri: str) -> None:
    """Makes a SQLite file beside and renames it: MLflow cannot mend one whose first migration was cut off."""
    prefix = "sqlite:///"
    if not uri.startswith(prefix) or (path := Path(uri.removeprefix(prefix))).exists():
        return
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.beside")
    beside.unlink(missing_ok=True)
    make_store: Any = SqlAlchemyStore
    store = make_store(f"{prefix}{beside}", path.parent.as_uri())
    store.engine.dispose()
    os.replace(beside, path)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
