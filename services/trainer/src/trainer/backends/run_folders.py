"""Runs kept as folders below the data folder. Implements core.ports.RunFolders and RunFolder; see run_files."""

import contextlib
import dataclasses
import json
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer.backends import run_files
from trainer.backends.durable_files import remove_tree, write_whole
from trainer.core.runs import MAX_EVENTS, Run, RunEvent, RunStatus, Step, TrainOrder, check_job_id

log = logging.getLogger(__name__)

# What stays of a run that has ended.
_HISTORY = (run_files.RUN, run_files.EVENTS, run_files.STEPS, run_files.TRACKED)


class DirectoryRun:
    """One run's folder."""

    def __init__(self, path: Path) -> None:
        self._path = path

    @property
    def path(self) -> Path:
        return self._path

    def load(self) -> Run | None:
        """Returns what is known of the run; None where there is none, or it cannot be read."""
        try:
            fields = json.loads((self.path / run_files.RUN).read_text(encoding="utf-8"))
            order = TrainOrder(**fields.pop("order"))
            return Run(order=order, status=RunStatus(fields.pop("status")), **fields)
        except FileNotFoundError:
            return None
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            log.error("a run cannot be read", extra={"folder": self.path.name, "error": repr(error)})
            return None

    def save(self, run: Run) -> None:
        write_whole(self.path / run_files.RUN, json.dumps(dataclasses.asdict(run)).encode())

    def add_event(self, event: RunEvent) -> None:
        with (self.path / run_files.EVENTS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(dataclasses.asdict(event)) + "\n")

    def events(self) -> list[RunEvent]:
        """Returns the newest events, oldest first; of those with one id the first."""
        found: dict[str, RunEvent] = {}
        for fields in run_files.read_lines(self.path / run_files.EVENTS):
            with contextlib.suppress(TypeError):
                event = RunEvent(**fields)
                found.setdefault(event.id, event)
        return list(found.values())[-MAX_EVENTS:]

    def steps(self) -> list[Step]:
        return run_files.read_steps(self.path / run_files.STEPS)

    def tracker_run_id(self) -> str:
        """Returns the run's id in the experiment tracker; empty before it has one."""
        try:
            return str(json.loads((self.path / run_files.TRACKED).read_text())["run_id"])
        except (OSError, ValueError, KeyError, TypeError):
            return ""

    def write_input(self, data: bytes, spec: Mapping[str, Any]) -> None:
        write_whole(self.path / run_files.INPUT, data)
        write_whole(self.path / run_files.SPEC, json.dumps(spec).encode())

    def prune(self) -> None:
        remove_tree(self.path / run_files.ADAPTER)
        for path in self.path.iterdir():
            if path.name not in _HISTORY:
                if path.is_dir():
                    remove_tree(path)
                else:
                    path.unlink(missing_ok=True)


class DirectoryRuns:
    """All runs. `max_runs`: ended ones that are kept."""

    def __init__(self, folder: Path, *, max_runs: int) -> None:
        self._folder = folder
        self._max_runs = max_runs

    def begin(self, order: TrainOrder) -> tuple[Run, DirectoryRun]:
        folder = DirectoryRun(self._folder / check_job_id(order.job_id))
        folder.path.mkdir(parents=True, exist_ok=True)
        run = folder.load()
        if run is None or run.order != order:
            run = Run(order, created_unix_ms=int(time.time() * 1000))
            folder.save(run)
        return run, folder

    def find(self, job_id: str) -> tuple[Run, DirectoryRun] | None:
        """Returns a run by its job. Raises INVALID_ARGUMENT for what is no id."""
        folder = DirectoryRun(self._folder / check_job_id(job_id))
        run = folder.load()
        return (run, folder) if run is not None else None

    def prune(self) -> None:
        if not self._folder.is_dir():
            return
        ended: list[tuple[int, Path]] = []
        for path in self._folder.iterdir():
            run = DirectoryRun(path).load()
            if run is not None and run.status.is_final:
                ended.append((run.created_unix_ms, path))
        ended.sort(reverse=True)
        for _, path in ended[self._max_runs :]:
            remove_tree(path)
