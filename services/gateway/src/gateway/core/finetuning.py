"""Finetuning jobs: from the order to the model that answers under an id of the tenant's.

The order, the claim of the new model's id and the message to the trainer are one transaction: what was answered will
be trained, and no id ever changes its owner. Knows nothing of HTTP, SQLite, gRPC or the bus.
"""

import re
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from chassis.errors import Code, PlatformError
from gateway.core import creation
from gateway.core.jobs import Job
from gateway.core.outbox import Message
from gateway.core.uploads import (
    Purpose,
    Upload,
    UploadStore,
    check_purpose,
    file_not_found,
)

TYPE = "train"
MAX_UNFINISHED_JOBS = 20  # of one tenant; they are trained one after the other
_SUFFIX = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,62}[a-z0-9])?")


@dataclass(frozen=True, slots=True)
class Hyperparameters:
    """How to train; None leaves it to the trainer ("auto")."""

    n_epochs: int | None = None
    batch_size: int | None = None
    learning_rate_multiplier: float | None = None

    def given(self) -> dict[str, int | float]:
        """Those that the client chose."""
        every = {
            "n_epochs": self.n_epochs,
            "batch_size": self.batch_size,
            "learning_rate_multiplier": self.learning_rate_multiplier,
        }
        return {name: value for name, value in every.items() if value is not None}


@dataclass(frozen=True, slots=True)
class Order:
    """What a client wants to have trained."""

    base: str
    training_file: str
    suffix: str | None = None
    seed: int | None = None
    hyperparameters: Hyperparameters = Hyperparameters()
    metadata: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Finetune:
    """A finetuning job with all that is known of it."""

    job: Job
    base: str
    model_id: str  # under which the tuned model answers once the job has succeeded
    training_upload_id: str
    suffix: str  # empty where the client gave none
    seed: int
    hyperparameters: Hyperparameters
    metadata: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class TunedModel:
    """An id that a tenant owns. is_published: a job that trained it has succeeded."""

    model_id: str
    base: str
    is_published: bool


@dataclass(frozen=True, slots=True)
class RunEvent:
    """Something that happened in a run."""

    id: str
    at_unix_ms: int
    level: str  # "info", "warn" or "error"
    type: str  # "message" or "metrics"
    message: str
    data: Mapping[str, object] | None = None


@dataclass(frozen=True, slots=True)
class Run:
    """What the trainer knows of a job. losses: one for each step so far."""

    step: int
    total_steps: int
    losses: Sequence[float]
    trained_tokens: int
    events: Sequence[RunEvent]  # oldest first
    tracker_run_id: str


class TunedModels(Protocol):
    """Which tuned models a tenant owns."""

    async def tuned(self, tenant: str, model_id: str) -> TunedModel | None:
        """Returns the tenant's model; None where nobody or another tenant owns the id."""
        ...

    async def tuned_of(self, tenant: str) -> Sequence[TunedModel]:
        """Returns all ids that the tenant owns."""
        ...


class FinetuneStore(Protocol):
    """Where finetuning jobs are kept. A write is durable when it returns."""

    async def submit(self, finetune: Finetune, message: Message) -> None:
        """Claims the model's id and writes job and message in one transaction.

        Raises CONFLICT where another tenant owns the id, NOT_FOUND where the file is gone, and RATE_LIMITED where the
        tenant has MAX_UNFINISHED_JOBS already.
        """
        ...

    async def get(self, tenant: str, job_id: str) -> Finetune | None:
        """Returns the tenant's job."""
        ...

    async def newest(self, tenant: str, *, limit: int, after: str | None) -> Sequence[Finetune]:
        """Returns the tenant's jobs, newest first, those behind `after`."""
        ...


class Runs(Protocol):
    """What the trainer tells of its runs."""

    async def get(self, job_id: str) -> Run | None:
        """Returns a run; None where the trainer has none of it. Raises PlatformError, UNAVAILABLE when it is away."""
        ...


class Finetuning:
    """Takes orders for finetuning and tells of them."""

    def __init__(
        self,
        store: FinetuneStore,
        uploads: UploadStore,
        runs: Runs,
        train_message: Callable[[Finetune, Upload], Message],
        *,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._store = store
        self._uploads = uploads
        self._runs = runs
        self._train_message = train_message
        self._now = now

    async def submit(self, tenant: str, key_id: str, order: Order) -> Finetune:
        """Orders the training; the caller has seen that the base can be tuned. Raises as FinetuneStore.submit does."""
        if order.suffix is not None:
            check_suffix(order.suffix)
        upload = await self._uploads.get(tenant, order.training_file)
        if upload is None:
            raise file_not_found(order.training_file, "training_file")
        check_purpose(upload, Purpose.FINE_TUNE, "training_file", "a training file needs the purpose 'fine-tune'")
        job_id = f"ftjob-{creation.new_id('job')}"
        if creation.may_exist() and (existing := await self._store.get(tenant, job_id)):
            return existing
        finetune = Finetune(
            job=Job(job_id, tenant, TYPE, int(self._now() * 1000), file_id=upload.upload_id, key_id=key_id),
            base=order.base,
            model_id=f"{order.base}:{order.suffix or job_id}",
            training_upload_id=upload.upload_id,
            suffix=order.suffix or "",
            seed=secrets.randbelow(2**31) if order.seed is None else order.seed,
            hyperparameters=order.hyperparameters,
            metadata=order.metadata,
        )
        await self._store.submit(finetune, self._train_message(finetune, upload))
        return finetune

    async def get(self, tenant: str, job_id: str) -> Finetune:
        """Returns the tenant's job; raises NOT_FOUND."""
        finetune = await self._store.get(tenant, job_id)
        if finetune is None:
            raise PlatformError(Code.NOT_FOUND, "no such fine-tuning job", param="fine_tuning_job_id")
        return finetune

    async def newest(self, tenant: str, *, limit: int, after: str | None) -> Sequence[Finetune]:
        """Returns the tenant's jobs, newest first."""
        return await self._store.newest(tenant, limit=limit, after=after)

    async def run(self, tenant: str, job_id: str) -> tuple[Finetune, Run | None]:
        """Returns the tenant's job and what the trainer knows of it; raises NOT_FOUND, and as Runs.get does."""
        finetune = await self.get(tenant, job_id)
        return finetune, await self._runs.get(job_id)


def check_suffix(suffix: str) -> None:
    """Raises INVALID_ARGUMENT for a suffix that could not be part of a model's id."""
    if _SUFFIX.fullmatch(suffix) is None:
        raise PlatformError(
            Code.INVALID_ARGUMENT,
            "suffix must be 1 to 64 lower-case letters, digits and hyphens, and begin and end with no hyphen",
            param="suffix",
            reason="invalid_value",
        )


def suffix_is_taken(model_id: str) -> PlatformError:
    """The error for an id that another tenant owns; it says no more than that."""
    return PlatformError(
        Code.CONFLICT,
        f"the model id {model_id!r} is taken; choose another suffix",
        param="suffix",
        reason="suffix_taken",
    )


def too_many_jobs(what: str, most: int) -> PlatformError:
    """The error for a tenant whose jobs wait in numbers."""
    return PlatformError(
        Code.RATE_LIMITED,
        f"{most} {what} jobs of yours have not ended yet; wait for one, or cancel one",
        reason="too_many_jobs",
        retry_after_s=30.0,
    )
