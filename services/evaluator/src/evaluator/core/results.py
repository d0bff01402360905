"""What an evaluation yields: kept answers, and the values of the metrics."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer to one question of a task."""

    index: int
    text: str
    model_version: str


@dataclass(frozen=True, slots=True)
class TextBits:
    """How well a model predicted one text: bits in all, and the bytes that they stand for."""

    index: int
    bits: float
    num_bytes: int
    model_version: str


@dataclass(frozen=True, slots=True)
class MetricValue:
    """A metric over n samples with its 95% confidence interval."""

    value: float
    low: float
    high: float
    n: int


@dataclass(frozen=True, slots=True)
class Scored:
    """One answer and what it is compared with."""

    prediction: str
    references: Sequence[str]


@dataclass(frozen=True, slots=True)
class ScoringOrder:
    """Everything that scoring needs."""

    metrics: Sequence[str]
    answers: Sequence[Scored]
    texts: Sequence[TextBits]


@dataclass(frozen=True, slots=True)
class Result:
    """The end of one evaluation."""

    job_id: str
    tenant: str
    model: str
    task: str
    metrics: Mapping[str, MetricValue]

    def as_json(self) -> dict[str, dict[str, object]]:
        """The metrics as clients see them."""
        return {
            name: {"value": metric.value, "ci95": [metric.low, metric.high], "n": metric.n}
            for name, metric in self.metrics.items()
        }
