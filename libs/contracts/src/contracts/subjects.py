"""The one table of the bus: every subject with its message type, stream, producer and consumers.

Code, docs and permissions are derived from it or checked against it.
"""

from dataclasses import dataclass
from typing import Literal

from google.protobuf.message import Message
from pressroom.events.v1 import events_pb2

PREFIX = "pressroom."
_DAY_S = 86_400.0
_GIB = 1024**3


@dataclass(frozen=True, slots=True)
class Stream:
    """A JetStream stream; field meanings are those of chassis.bus.Stream."""

    name: str
    subjects: tuple[str, ...]
    retention: Literal["limits", "workqueue"]
    max_age_s: float
    max_bytes: int


@dataclass(frozen=True, slots=True)
class Subject:
    """One row: what is said, by whom, to whom. `stream` is None for a broadcast that nothing stores."""

    subject: str
    message: type[Message]
    stream: str | None
    producer: str
    consumers: tuple[str, ...]


STREAMS: tuple[Stream, ...] = (
    Stream("EVENTS", (PREFIX + "events.>",), "limits", 7 * _DAY_S, 2 * _GIB),
    Stream("JOBS", (PREFIX + "jobs.>",), "workqueue", 0, _GIB // 2),
    Stream("PROGRESS", (PREFIX + "progress.>",), "limits", 3600.0, _GIB // 4),
    Stream("DEAD", (PREFIX + "dead.>",), "limits", 30 * _DAY_S, _GIB // 4),
)

EVENTS_REQUEST_COMPLETED = PREFIX + "events.request.completed"
EVENTS_GUARD_FLAGGED = PREFIX + "events.guard.flagged"
EVENTS_DOCUMENT_INDEXED = PREFIX + "events.document.indexed"
EVENTS_DRIFT_DETECTED = PREFIX + "events.drift.detected"
EVENTS_MODEL_PUBLISHED = PREFIX + "events.model.published"
EVENTS_MODEL_PROMOTED = PREFIX + "events.model.promoted"
EVENTS_MODEL_ROLLEDBACK = PREFIX + "events.model.rolledback"
JOBS_INGEST = PREFIX + "jobs.ingest"
JOBS_BATCH = PREFIX + "jobs.batch"
JOBS_TRAIN = PREFIX + "jobs.train"
JOBS_EVALUATE = PREFIX + "jobs.evaluate"
PROGRESS_ALL = PREFIX + "progress.*"
CONTROL_KEYS_REVOKED = PREFIX + "control.keys.revoked"
CONTROL_REQUEST_CANCEL = PREFIX + "control.request.cancel"

SUBJECTS: tuple[Subject, ...] = (
    Subject(EVENTS_REQUEST_COMPLETED, events_pb2.RequestCompleted, "EVENTS", "gateway", ("monitor",)),
    Subject(EVENTS_GUARD_FLAGGED, events_pb2.GuardFlagged, "EVENTS", "gateway", ("monitor",)),
    Subject(EVENTS_DOCUMENT_INDEXED, events_pb2.DocumentIndexed, "EVENTS", "retriever", ()),
    Subject(EVENTS_DRIFT_DETECTED, events_pb2.DriftDetected, "EVENTS", "monitor", ("trainer",)),
    Subject(EVENTS_MODEL_PUBLISHED, events_pb2.ModelPublished, "EVENTS", "trainer", ("generator",)),
    Subject(EVENTS_MODEL_PROMOTED, events_pb2.ModelPromoted, "EVENTS", "gateway", ("generator",)),
    Subject(EVENTS_MODEL_ROLLEDBACK, events_pb2.ModelRolledBack, "EVENTS", "gateway", ("generator",)),
    Subject(JOBS_INGEST, events_pb2.IngestJob, "JOBS", "gateway", ("retriever",)),
    Subject(JOBS_BATCH, events_pb2.BatchJob, "JOBS", "gateway", ("gateway",)),
    Subject(JOBS_TRAIN, events_pb2.TrainJob, "JOBS", "gateway", ("trainer",)),
    Subject(JOBS_EVALUATE, events_pb2.EvaluateJob, "JOBS", "gateway", ("evaluator",)),
    Subject(PROGRESS_ALL, events_pb2.JobProgress, "PROGRESS", "retriever, trainer, evaluator", ("gateway",)),
    Subject(CONTROL_KEYS_REVOKED, events_pb2.KeysRevoked, None, "gateway", ("gateway",)),
    Subject(
        CONTROL_REQUEST_CANCEL,
        events_pb2.RequestCancel,
        None,
        "gateway",
        ("gateway", "generator", "retriever", "trainer", "evaluator"),
    ),
)


def progress(job_id: str) -> str:
    """Returns the subject on which one job's progress is told."""
    return f"{PREFIX}progress.{job_id}"
