"""The metrics, each as a function of texts. ROUGE is rouge_score's and BLEU is sacrebleu's: here they get their names.

`target` is one reference or several; with several the best one counts. Importing this module loads nltk and sacrebleu
(about 2 s and up to 200 MB): only the process that scores does so. Nothing is ever downloaded.

Exact match and F1: Rajpurkar et al. 2016 (SQuAD). ROUGE: Lin 2004. BLEU: Papineni et al. 2002, Post 2018.
"""

import math
import re
import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics.bleu import BLEU

MAX_ORDER = 4  # of BLEU's n-grams

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclass(frozen=True, slots=True)
class Rouge:
    """Precision, recall and F-measure of one kind of ROUGE, each from 0 to 1."""

    precision: float
    recall: float
    fmeasure: float


@dataclass(frozen=True, slots=True)
class BleuCounts:
    """What one answer adds to a corpus's BLEU: lengths in tokens, and n-grams matched and in all, for n from 1 to 4."""

    prediction_length: int
    target_length: int
    matched: tuple[int, ...]
    in_all: tuple[int, ...]


def normalized(text: str) -> str:
    """Returns a text as SQuAD compares it: lower case, without punctuation and English articles, single spaces."""
    text = text.lower().translate(_PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", text).split())


def exact_match(*, prediction: str, target: str | Sequence[str]) -> float:
    """Returns 1 where the prediction equals a target after `normalized`, else 0."""
    found = normalized(prediction)
    return float(any(found == normalized(wanted) for wanted in _several(target)))


def f1(*, prediction: str, target: str | Sequence[str]) -> float:
    """Returns the F1 of the words that prediction and target share, after `normalized`; the best target's.

    Where one of the two has no word left, 1 if neither has and else 0, as SQuAD 2.0 has it.
    """
    found = normalized(prediction).split()
    return max(_word_f1(found, normalized(wanted).split()) for wanted in _several(target))


def rouge(*, prediction: str, target: str | Sequence[str], stem: bool = True) -> dict[str, Rouge]:
    """Returns {"rouge1": ..., "rougeL": ...}; of several targets the one with the best F-measure, for each kind.

    `stem` takes the ends off English words (Porter). What is neither a letter a to z nor a digit separates words.
    """
    scores = _rouge_scorer(stem).score_multi(list(_several(target)), prediction)
    return {kind: Rouge(float(s.precision), float(s.recall), float(s.fmeasure)) for kind, s in scores.items()}


def bleu(*, prediction: str, target: str | Sequence[str]) -> float:
    """Returns the BLEU of one sentence, from 0 to 100: sacrebleu.sentence_bleu with its defaults."""
    return float(_bleu_scorer().sentence_score(prediction, _several(target)).score)


def corpus_bleu(*, predictions: Sequence[str], targets: Sequence[str | Sequence[str]]) -> float:
    """Returns the BLEU of a corpus, from 0 to 100: sacrebleu.corpus_bleu with its defaults.

    `targets` has one entry for each prediction, which may name several references (and not the same number each).
    """
    counts = [bleu_counts(prediction=p, target=t) for p, t in zip(predictions, targets, strict=True)]
    return bleu_of_counts(
        sum(c.prediction_length for c in counts),
        sum(c.target_length for c in counts),
        [sum(c.matched[n] for c in counts) for n in range(MAX_ORDER)],
        [sum(c.in_all[n] for c in counts) for n in range(MAX_ORDER)],
    )


def bleu_counts(*, prediction: str, target: str | Sequence[str]) -> BleuCounts:
    """Returns what one answer adds to the BLEU of its corpus (tokens of mteval-v13a, case kept)."""
    found = _bleu_scorer().sentence_score(prediction, _several(target))
    return BleuCounts(found.sys_len, found.ref_len, tuple(found.counts), tuple(found.totals))


def bleu_of_counts(prediction_length: int, target_length: int, matched: Sequence[int], in_all: Sequence[int]) -> float:
    """Returns the BLEU of summed counts, with sacrebleu's default smoothing ("exp")."""
    found = BLEU.compute_bleu(list(matched), list(in_all), prediction_length, target_length, smooth_method="exp")
    return float(found.score)


def bits_per_byte(*, logprobs: Sequence[float], num_bytes: int) -> float:
    """Returns the bits that a model needs for each byte of a text: natural log probabilities of its tokens, summed.

    `num_bytes` counts the bytes (UTF-8) of those tokens alone; it must be above 0.
    """
    return -math.fsum(logprobs) / math.log(2) / num_bytes


def _several(target: str | Sequence[str]) -> Sequence[str]:
    targets = [target] if isinstance(target, str) else target
    if not targets:
        raise ValueError("there is no target to compare with")
    return targets


def _word_f1(found: list[str], wanted: list[str]) -> float:
    if not found or not wanted:
        return float(found == wanted)
    num_shared = sum((Counter(found) & Counter(wanted)).values())
    if num_shared == 0:
        return 0.0
    precision, recall = num_shared / len(found), num_shared / len(wanted)
    return 2 * precision * recall / (precision + recall)


@cache
def _rouge_scorer(stem: bool) -> RougeScorer:
    return RougeScorer(["rouge1", "rougeL"], use_stemmer=stem)


@cache
def _bleu_scorer() -> BLEU:
    return BLEU(effective_order=True)  # which a single sentence needs; the counts are the same without
