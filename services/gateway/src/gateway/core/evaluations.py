"""Evaluation jobs: a model or graph is asked the questions of a task by the evaluator.

Knows nothing of HTTP, SQLite, gRPC or the bus.
"""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from chassis.errors import Code, PlatformError
from gateway.core import creation
from gateway.core.jobs import Job
from gateway.core.outbox import Message
from gateway.core.uploads import Upload, UploadStore, file_not_found, is_upload_id

TYPE = "evaluate"
MAX_UNFINISHED_JOBS = 100  # of one tenant; they are run one after the other

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Task:
    """A task that the evaluator has."""

    name: str
    version: str
    metrics: Sequence[str]
    description: str
    num_samples: int

    @property
    def names(self) -> tuple[str, str]:
        """What a request can call it."""
        return (self.name, f"{self.name}@{self.version}")


@dataclass(frozen=True, slots=True)
class Evaluation:
    """An evaluation job: `task` names one of the evaluator's, or `upload` is the client's own."""

    job: Job
    model: str
    task: str
    upload: Upload | None


class EvaluationStore(Protocol):
    """Where evaluation jobs are kept. A write is durable when it returns."""

    async def submit(self, evaluation: Evaluation, message: Message) -> None:
        """Writes job and message in one transaction.

        Raises NOT_FOUND where the file is gone, RATE_LIMITED where the tenant has MAX_UNFINISHED_JOBS already.
        """
        ...

    async def job(self, tenant: str, job_id: str) -> Job | None:
        """Returns the tenant's job."""
        ...


class Tasks(Protocol):
    """What the evaluator tells of its tasks."""

    async def all(self) -> Sequence[Task]:
        """Returns them; raises PlatformError, UNAVAILABLE when it is away."""
        ...


class Evaluations:
    """Takes orders for evaluations."""

    def __init__(
        self,
        store: EvaluationStore,
        uploads: UploadStore,
        tasks: Tasks,
        evaluate_message: Callable[[Evaluation], Message],
        *,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._store = store
        self._uploads = uploads
        self._tasks = tasks
        self._evaluate_message = evaluate_message
        self._now = now

    async def submit(self, tenant: str, key_id: str, model: str, task: str) -> Evaluation:
        """Orders an evaluation; the caller has seen that the tenant may ask the model. Raises NOT_FOUND."""
        upload = None
        if is_upload_id(task):
            upload = await self._uploads.get(tenant, task)
            if upload is None:
                raise file_not_found(task, "task")
        else:
            await self._check(task)
        job_id = f"job_{creation.new_id('job')}"
        if creation.may_exist() and (existing := await self._store.job(tenant, job_id)):
            return Evaluation(existing, model, "" if upload else task, upload)
        job = Job(
            job_id,
            tenant,
            TYPE,
            int(self._now() * 1000),
            file_id=upload.upload_id if upload else None,
            key_id=key_id,
        )
        evaluation = Evaluation(job, model, "" if upload else task, upload)
        await self._store.submit(evaluation, self._evaluate_message(evaluation))
        return evaluation

    async def tasks(self) -> Sequence[Task]:
        """The tasks that the evaluator has; raises PlatformError, UNAVAILABLE when it is away."""
        return await self._tasks.all()

    async def _check(self, task: str) -> None:
        """Refuses an unknown task at the door where the evaluator answers; else the job will fail and say it."""
        try:
            known = await self._tasks.all()
        except PlatformError as error:
            _log.info("task is not checked: the evaluator does not answer", extra={"error": repr(error)})
            return
        if not any(task in one.names for one in known):
            there_are = ", ".join(sorted(one.name for one in known)) or "none"
            raise PlatformError(
                Code.NOT_FOUND,
                f"no such task: {task[:100]!r}; there are: {there_are}",
                param="task",
                reason="task_not_found",
            )
