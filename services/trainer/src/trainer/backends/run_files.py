"""The files of one run's folder: their names, and the curve of steps, written by the child and read by everybody.

run.json        what is known of the run (trainer)         events.jsonl   what happened (trainer)
spec.json, training.jsonl   what the child reads (trainer) steps.jsonl    one line for each step (child)
checkpoint.safetensors, adapter/   what it makes (child)   lock           held by the one child that runs
tracked.json    its run in the experiment tracker (tracker)
"""

import dataclasses
import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any

from trainer.backends.durable_files import write_whole
from trainer.core.runs import Step

RUN = "run.json"
EVENTS = "events.jsonl"
STEPS = "steps.jsonl"
SPEC = "spec.json"
INPUT = "training.jsonl"
CHECKPOINT = "checkpoint.safetensors"
ADAPTER = "adapter"
LOCK = "lock"
TRACKED = "tracked.json"


class StepsFile:
    """Appends steps. What lies behind a checkpoint is cut off on resuming, so that the curve has no gap or double."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / STEPS
        self._file = self._path.open("a", encoding="utf-8")

    def cut_to(self, step: int) -> None:
        """Keeps the first steps alone. Raises ValueError where one of them is missing."""
        kept = read_steps(self._path)[:step]
        if len(kept) != step:
            raise ValueError(f"{self._path.name} has {len(kept)} steps where the checkpoint has {step}")
        self._file.close()
        write_whole(self._path, "".join(map(_line, kept)).encode())
        self._file = self._path.open("a", encoding="utf-8")

    def append(self, step: Step) -> None:
        """Adds a step; readers see it at once."""
        self._file.write(_line(step))
        self._file.flush()

    def sync(self) -> None:
        """Brings all of it to the disk: to be called before the checkpoint that relies on it."""
        os.fsync(self._file.fileno())

    def __enter__(self) -> "StepsFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.close()


def read_steps(path: Path) -> list[Step]:
    """Returns the steps of a file that may be growing: up to the first line that is not whole or not the next."""
    steps: list[Step] = []
    for fields in read_lines(path):
        try:
            step = Step(**fields)
        except TypeError:
            break
        if step.step != len(steps) + 1:
            break
        steps.append(step)
    return steps


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Returns the JSON objects of a file of lines; a last one that was cut off by a crash is left out."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return []
    rows: list[dict[str, Any]] = []
    for line in text.splitlines():
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            rows.append(value)
    return rows


def checkpoint_step(folder: Path) -> int:
    """Returns the step that the run's checkpoint covers, from its header alone; 0 where there is none."""
    try:
        with (folder / CHECKPOINT).open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        return int(header["__metadata__"]["step"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def _line(step: Step) -> str:
    return json.dumps(dataclasses.asdict(step)) + "\n"
