"""A run as the trainer remembers it: what was ordered, how far it is, what happened."""

import re
from dataclasses import dataclass, field
from enum import StrEnum

from chassis.errors import Code, PlatformError

MAX_EVENTS = 1_000  # the newest are told
_ID = re.compile(r"^[A-Za-z0-9][A-Za-z0-9_-]{0,99}$")
_TENANT = re.compile(r"^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$")
_MODEL = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")
_SUFFIX = re.compile(r"^[a-z0-9][a-z0-9-]{0,63}$")


class RunStatus(StrEnum):
    """State of a run."""

    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_final(self) -> bool:
        """Nothing follows this state."""
        return self is not RunStatus.RUNNING


@dataclass(frozen=True, slots=True)
class TrainOrder:
    """What was ordered. `seed` decides everything random."""

    job_id: str
    tenant: str
    model: str
    file_id: str
    file_sha256: str
    suffix: str
    hyperparameters_json: str
    seed: int

    @property
    def fine_tuned_model(self) -> str:
        """Id that requests will name."""
        return f"{self.model}:{self.suffix or self.job_id}"


@dataclass(slots=True)
class Run:
    """One run; kept in its folder, changed by the worker alone."""

    order: TrainOrder
    created_unix_ms: int
    status: RunStatus = RunStatus.RUNNING
    error: str = ""
    total_steps: int = 0
    plan: dict[str, object] = field(default_factory=dict)
    # Deaths of the child by the step that it was at; a run that was resumed goes on counting.
    deaths: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Step:
    """One optimizer step: the mean loss of a learned token, and the tokens it read, padding left out."""

    step: int  # counted from 1
    loss: float
    num_tokens: int
    learning_rate: float
    at_unix_ms: int


@dataclass(frozen=True, slots=True)
class RunEvent:
    """Something that happened, for people. The id is the same when the same thing is told again."""

    id: str
    at_unix_ms: int
    level: str  # "info", "warn" or "error"
    type: str  # "message" or "metrics"
    message: str
    data: dict[str, object] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Adapter:
    """A published adapter. `path` is relative to the model store; the sha256 is of its manifest."""

    id: str
    base: str
    path: str
    manifest_sha256: str
    job_id: str
    tenant: str
    created_unix_s: int
    trained_tokens: int
    final_loss: float


def check_job_id(job_id: str) -> str:
    """Returns an id that may name a folder and a subject; raises INVALID_ARGUMENT for any other."""
    if not _ID.match(job_id):
        raise PlatformError(Code.INVALID_ARGUMENT, "job_id: letters, digits, _ and -, at most 100", param="job_id")
    return job_id


def check_order(order: TrainOrder) -> None:
    """Raises INVALID_ARGUMENT for names that are none."""
    check_job_id(order.job_id)
    if not _TENANT.match(order.tenant):
        raise PlatformError(Code.INVALID_ARGUMENT, "tenant: letters, digits, _ and -, at most 64", param="tenant")
    if ":" in order.model:
        message = f"model: {order.model[:200]} is finetuned already; finetune its base instead"
        raise PlatformError(Code.INVALID_ARGUMENT, message, param="model")
    if not _MODEL.match(order.model):
        raise unknown_model(order.model)
    if order.suffix and not _SUFFIX.match(order.suffix):
        message = "suffix: small letters, digits and -, at most 64, beginning with a letter or a digit"
        raise PlatformError(Code.INVALID_ARGUMENT, message, param="suffix")


def unknown_model(model: str) -> PlatformError:
    """Makes the error for a base that cannot be finetuned here."""
    message = f"model: there is no model {model[:200]!r} that can be finetuned"
    return PlatformError(Code.NOT_FOUND, message, param="model", reason="model_not_found")
