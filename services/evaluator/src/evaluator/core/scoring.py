"""Scores answers: every metric of a task over its samples, with confidence intervals. Pure, and not quick."""

from collections.abc import Callable, Sequence

import numpy as np

from evaluator.core import metrics
from evaluator.core.intervals import Floats, interval
from evaluator.core.results import MetricValue, Scored, ScoringOrder, TextBits

_SHARE = (0.0, 1.0)
_BLEU_RANGE = (0.0, 100.0)
_BITS_RANGE = (0.0, 8.0)  # a byte costs 8 bits without any model


def score(order: ScoringOrder) -> dict[str, MetricValue]:
    """Returns the values of the order's metrics by name; a ROUGE gives three: F-measure, precision and recall."""
    values: dict[str, MetricValue] = {}
    for name in order.metrics:
        if name in ("rouge1", "rougeL"):
            values |= _rouge(name, order.answers)
        elif name == "bleu":
            values[name] = _bleu(order.answers)
        elif name == "bits_per_byte":
            values[name] = _bits_per_byte(order.texts)
        else:
            values[name] = _mean([_PER_ANSWER[name](answer) for answer in order.answers])
    return values


_PER_ANSWER: dict[str, Callable[[Scored], float]] = {
    "exact_match": lambda answer: metrics.exact_match(prediction=answer.prediction, target=answer.references),
    "f1": lambda answer: metrics.f1(prediction=answer.prediction, target=answer.references),
}


def _rouge(kind: str, answers: Sequence[Scored]) -> dict[str, MetricValue]:
    found = [metrics.rouge(prediction=answer.prediction, target=answer.references)[kind] for answer in answers]
    return {
        kind: _mean([one.fmeasure for one in found]),
        f"{kind}_precision": _mean([one.precision for one in found]),
        f"{kind}_recall": _mean([one.recall for one in found]),
    }


def _mean(scores: Sequence[float]) -> MetricValue:
    rows = np.array([[score, 1.0] for score in scores])
    return MetricValue(*interval(rows, _ratio, bounds=_SHARE), len(rows))


def _bleu(answers: Sequence[Scored]) -> MetricValue:
    counts = [metrics.bleu_counts(prediction=answer.prediction, target=answer.references) for answer in answers]
    rows = np.array([[c.prediction_length, c.target_length, *c.matched, *c.in_all] for c in counts], dtype=float)

    def corpus(sums: Floats) -> Floats:
        split = 2 + metrics.MAX_ORDER
        whole = [[int(number) for number in row] for row in sums]
        return np.array([metrics.bleu_of_counts(row[0], row[1], row[2:split], row[split:]) for row in whole])

    return MetricValue(*interval(rows, corpus, bounds=_BLEU_RANGE), len(rows))


def _bits_per_byte(texts: Sequence[TextBits]) -> MetricValue:
    rows = np.array([[text.bits, float(text.num_bytes)] for text in texts])
    return MetricValue(*interval(rows, _ratio, bounds=_BITS_RANGE), len(rows))


def _ratio(sums: Floats) -> Floats:
    ratio: Floats = sums[:, 0] / sums[:, 1]
    return ratio
