"""Writes down what happens in a run: its state and the events that people read."""

import json
import logging
import time
from collections.abc import Mapping
from typing import Any

from trainer.core.ports import RunFolder
from trainer.core.runs import Adapter, Run, RunEvent, RunStatus

log = logging.getLogger(__name__)

_MAX_STEP_EVENTS = 200  # of one run


class Journal:
    """One run's. Blocks for a small file; raises OSError where the disk is full."""

    def __init__(self, run: Run, folder: RunFolder) -> None:
        self.run = run
        self.folder = folder

    def validating(self) -> None:
        """The file is about to be read."""
        self._event("validating", f"Validating training file: {self.run.order.file_id}")

    def planned(self, message: Mapping[str, Any]) -> None:
        """The file is good."""
        self.run.plan = dict(message["plan"])
        self.run.total_steps = int(message["total_steps"])
        self.folder.save(self.run)
        figures = {name: message[name] for name in ("num_examples", "num_tokens", "total_steps")} | self.run.plan
        self._event("planned", f"Files validated, moving job to running: {json.dumps(figures)}", data=figures)

    def resumed(self, step: int) -> None:
        """The model is loaded."""
        if step == 0:
            self._event("started", "Fine-tuning started")
        else:
            self._event(f"resumed-{step}", f"Fine-tuning goes on from the checkpoint at step {step}", level="warn")

    def stepped(self, step: int, loss: float) -> None:
        """A step was done; of a long run not each is told."""
        total = self.run.total_steps
        if step % max(1, total // _MAX_STEP_EVENTS) == 0 or step in (1, total):
            data = {"step": step, "total_steps": total, "train_loss": loss}
            self._event(f"step-{step}", f"Step {step}/{total}: training loss={loss:.4f}", type="metrics", data=data)

    def died(self, step: int, status: int, last_words: str) -> int:
        """The child has died; returns how often it did at this step."""
        deaths = self.run.deaths.get(str(step), 0) + 1
        self.run.deaths[str(step)] = deaths
        self.folder.save(self.run)
        self._event(f"died-{step}-{deaths}", f"The training process ended with {status} at step {step}", level="warn")
        job_id = self.run.order.job_id
        log.warning(
            "training process died",
            extra={"job_id": job_id, "step": step, "status": status, "last_words": last_words[-2000:]},
        )
        return deaths

    def published(self, adapter: Adapter) -> None:
        """The adapter stands in the store."""
        self._event("published", f"New fine-tuned model created: {adapter.id}", data={"path": adapter.path})

    def acknowledged(self) -> None:
        """The engine has answered through it."""
        self._event("loaded", "The fine-tuned model answers")

    def not_acknowledged(self, why: str) -> None:
        """The engine stayed away for too long."""
        message = f"The engine did not acknowledge the model ({why}); it loads it when it is back"
        self._event("not-acknowledged", message, level="warn")
        log.warning("adapter not acknowledged", extra={"job_id": self.run.order.job_id, "error": why})

    def ended(self, status: RunStatus, error: str) -> None:
        """The run is over."""
        self.run.status, self.run.error = status, error
        self.folder.save(self.run)
        match status:
            case RunStatus.SUCCEEDED:
                self._event("succeeded", "The job has successfully completed")
            case RunStatus.CANCELLED:
                self._event("cancelled", "The job was cancelled", level="warn")
            case _:
                self._event("failed", f"The job failed: {error}", level="error")

    def _event(
        self, key: str, message: str, *, level: str = "info", type: str = "message", data: dict[str, Any] | None = None
    ) -> None:
        """Notes an event under an id that is the same whenever the same thing is told again."""
        event_id = f"ftevent-{self.run.order.job_id}-{key}"
        self.folder.add_event(RunEvent(event_id, int(time.time() * 1000), level, type, message, data or {}))
