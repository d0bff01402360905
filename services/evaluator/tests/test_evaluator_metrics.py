"""Metrics agree with known values, with their public implementations, and with slow references of our own."""

import re
import string
import subprocess
import sys
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
import sacrebleu
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score import rouge_scorer

from evaluator.core import metrics
from evaluator.core.intervals import RESAMPLES, interval
from evaluator.core.results import Scored, ScoringOrder, TextBits
from evaluator.core.scoring import score

ZELDA_TARGET = "The game 'The Legend of Zelda' follows the adventures of the hero Link in the magical world of Hyrule."
ZELDA_PREDICTION = (
    "Link embarks on epic quests and battles evil forces to save Princess Zelda and restore peace "
    "in the land of Hyrule."
)
PAIRS = [
    (ZELDA_PREDICTION, ZELDA_TARGET),
    ("cat hat", "the cat in the hat"),
    ("The Eiffel Tower is in Paris, France.", "Paris is where the Eiffel Tower stands."),
    ("printing presses printed printers' prints", "the printer prints what the press printed"),
    ("", "something"),
    ("exactly the same words here", "exactly the same words here"),
    ("3.14 is pi, isn't it?", "It's pi: 3.14"),
    ("Grüße aus Köln", "Grüsse aus Koeln"),
    ("word " * 40, "word"),
]
WORDS = st.lists(st.sampled_from(["the", "a", "cat", "Cat!", "hat", "sat", "on", "mat.", "7", "-", "ü"]), max_size=12)
TEXTS = WORDS.map(" ".join)


def test_rouge_of_the_zelda_pair_is_what_is_published() -> None:
    found = metrics.rouge(prediction=ZELDA_PREDICTION, target=ZELDA_TARGET, stem=True)
    assert round(found["rouge1"].precision, 4) == 0.2857 and round(found["rouge1"].recall, 4) == 0.3158
    assert round(found["rougeL"].precision, 4) == 0.2381 and round(found["rougeL"].recall, 4) == 0.2632


def test_rouge_of_the_cat_pair_is_what_is_published() -> None:
    found = metrics.rouge(prediction="cat hat", target="the cat in the hat")["rouge1"]
    assert (found.precision, found.recall) == (1.0, 0.4)


@pytest.mark.parametrize(("prediction", "target"), PAIRS)
@pytest.mark.parametrize("stem", [True, False])
def test_rouge_is_that_of_rouge_score(prediction: str, target: str, stem: bool) -> None:
    theirs = rouge_scorer.RougeScorer(["rouge1", "rougeL"], use_stemmer=stem).score(target, prediction)
    ours = metrics.rouge(prediction=prediction, target=target, stem=stem)
    for kind, found in ours.items():
        assert (found.precision, found.recall, found.fmeasure) == pytest.approx(tuple(theirs[kind]))


def test_of_several_targets_the_best_counts() -> None:
    targets = ["nothing alike", "the cat in the hat", "dog"]
    assert metrics.rouge(prediction="cat hat", target=targets) == metrics.rouge(prediction="cat hat", target=targets[1])
    assert metrics.f1(prediction="cat hat", target=targets) == metrics.f1(prediction="cat hat", target=targets[1])
    assert metrics.exact_match(prediction="Dog!", target=targets) == 1
    with pytest.raises(ValueError, match="no target"):
        metrics.f1(prediction="x", target=[])


@pytest.mark.parametrize(("prediction", "target"), PAIRS)
def test_sentence_bleu_is_sacrebleus(prediction: str, target: str) -> None:
    assert metrics.bleu(prediction=prediction, target=target) == pytest.approx(
        sacrebleu.sentence_bleu(prediction, [target]).score
    )


def test_corpus_bleu_is_sacrebleus_with_one_and_with_several_references() -> None:
    predictions, targets = [p for p, _ in PAIRS], [t for _, t in PAIRS]
    assert metrics.corpus_bleu(predictions=predictions, targets=targets) == pytest.approx(
        sacrebleu.corpus_bleu(predictions, [targets]).score
    )
    others = [f"{target} indeed" for target in targets]
    assert metrics.corpus_bleu(
        predictions=predictions, targets=list(zip(targets, others, strict=True))
    ) == pytest.approx(sacrebleu.corpus_bleu(predictions, [targets, others]).score)


@given(st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=5))
@settings(max_examples=60, deadline=None)
def test_corpus_bleu_is_sacrebleus_on_any_corpus(pairs: list[tuple[str, str]]) -> None:
    predictions, targets = [p for p, _ in pairs], [t for _, t in pairs]
    theirs = sacrebleu.corpus_bleu(predictions, [targets]).score
    assert metrics.corpus_bleu(predictions=predictions, targets=targets) == pytest.approx(theirs, abs=1e-9)


# SQuAD's rules once more, character by character and in exact fractions.


def slow_words(text: str) -> list[str]:
    kept = "".join(char for char in text.lower() if char not in string.punctuation)
    return [word for word in re.split(r"\s+", kept) if word and word not in ("a", "an", "the")]


def slow_f1(prediction: str, target: str) -> Fraction:
    found, wanted = slow_words(prediction), slow_words(target)
    if not found or not wanted:
        return Fraction(found == wanted)
    left, num_shared = Counter(wanted), 0
    for word in found:
        if left[word] > 0:
            left[word] -= 1
            num_shared += 1
    return Fraction(2 * num_shared, len(found) + len(wanted))


@pytest.mark.parametrize(
    ("prediction", "target", "is_match", "wanted_f1"),
    [
        ("The Cat.", "cat", 1, 1.0),
        ("a cat!", "the CAT", 1, 1.0),
        ("Denver Broncos", "The Denver Broncos won", 0, 0.8),
        ("in the year 1066", "1066", 0, 0.5),
        ("no", "yes", 0, 0.0),
        ("the", "an", 1, 1.0),
        ("", "cat", 0, 0.0),
        ("cat cat", "cat", 0, 2 / 3),
        ("theatre", "atre", 0, 0.0),
    ],
)
def test_exact_match_and_f1_by_hand(prediction: str, target: str, is_match: int, wanted_f1: float) -> None:
    assert metrics.exact_match(prediction=prediction, target=target) == is_match
    assert metrics.f1(prediction=prediction, target=target) == pytest.approx(wanted_f1)


@given(TEXTS, TEXTS)
@settings(max_examples=200, deadline=None)
def test_exact_match_and_f1_are_those_of_a_slow_reference(prediction: str, target: str) -> None:
    assert metrics.f1(prediction=prediction, target=target) == pytest.approx(float(slow_f1(prediction, target)))
    is_match = slow_words(prediction) == slow_words(target)
    assert metrics.exact_match(prediction=prediction, target=target) == is_match


def test_bits_per_byte_of_a_uniform_model_is_its_bits() -> None:
    assert metrics.bits_per_byte(logprobs=[np.log(1 / 256)] * 10, num_bytes=10) == pytest.approx(8.0)
    assert metrics.bits_per_byte(logprobs=[np.log(1 / 2)] * 8, num_bytes=32) == pytest.approx(0.25)


# Intervals.


def mean_of(sums: np.ndarray) -> np.ndarray:
    return sums[:, 0] / sums[:, 1]


def rows_of(values: list[float]) -> np.ndarray:
    return np.array([[value, 1.0] for value in values])


def test_the_interval_of_a_mean_is_as_wide_as_theory_says() -> None:
    values = np.random.default_rng(7).normal(0.5, 0.1, size=400).tolist()
    value, low, high = interval(rows_of(values), mean_of, bounds=(0, 1))
    half = 1.96 * float(np.std(values)) / 20
    assert value == pytest.approx(np.mean(values))
    assert (high - low) / 2 == pytest.approx(half, rel=0.1)


def test_the_interval_covers_the_true_mean_about_as_often_as_it_says() -> None:
    random, num_covered = np.random.default_rng(1), 0
    for _ in range(200):
        _, low, high = interval(rows_of(random.binomial(1, 0.4, size=60).tolist()), mean_of, bounds=(0, 1))
        num_covered += low <= 0.4 <= high
    assert 180 <= num_covered <= 200, "95% of 200, and three standard deviations to each side"


def test_the_same_samples_give_the_same_interval_and_one_sample_gives_the_whole_range() -> None:
    rows = rows_of([0.1, 0.9, 0.4, 0.4])
    assert interval(rows, mean_of, bounds=(0, 1)) == interval(rows, mean_of, bounds=(0, 1))
    assert interval(rows[:1], mean_of, bounds=(0, 1)) == (0.1, 0.0, 1.0)
    assert interval(rows_of([9.0]), mean_of, bounds=(0, 8)) == (9.0, 0.0, 9.0)


ALL = ["exact_match", "f1", "rouge1", "rougeL", "bleu", "bits_per_byte"]


def test_scores_of_a_task_are_the_means_and_the_corpus_values() -> None:
    answers = [Scored(prediction, [target]) for prediction, target in PAIRS]
    texts = [TextBits(0, 100.0, 50, "v"), TextBits(1, 10.0, 50, "v")]
    found = score(ScoringOrder(ALL, answers, texts))
    assert list(found) == [
        "exact_match", "f1",
        "rouge1", "rouge1_precision", "rouge1_recall",
        "rougeL", "rougeL_precision", "rougeL_recall",
        "bleu", "bits_per_byte",
    ]  # fmt: skip
    assert found["f1"].value == pytest.approx(np.mean([metrics.f1(prediction=p, target=t) for p, t in PAIRS]))
    recalls = [metrics.rouge(prediction=p, target=t)["rougeL"].recall for p, t in PAIRS]
    assert found["rougeL_recall"].value == pytest.approx(np.mean(recalls))
    assert found["bleu"].value == pytest.approx(
        sacrebleu.corpus_bleu([p for p, _ in PAIRS], [[t for _, t in PAIRS]]).score
    )
    assert found["bits_per_byte"].value == pytest.approx(1.1), "of all bits and all bytes, not a mean of means"
    assert all(metric.low <= metric.value <= metric.high for metric in found.values())
    assert [metric.n for metric in found.values()] == [len(PAIRS)] * 9 + [2]
    assert found == score(ScoringOrder(ALL, answers, texts)), "seeded"


def test_bleus_interval_is_that_of_resampled_corpora() -> None:
    """Against sacrebleu on whole resampled corpora, the slow way."""
    answers = [Scored(prediction, [target]) for prediction, target in PAIRS]
    found = score(ScoringOrder(["bleu"], answers, []))["bleu"]
    random, slow = np.random.default_rng(5), []
    for _ in range(RESAMPLES // 4):
        drawn = [PAIRS[i] for i in random.integers(0, len(PAIRS), size=len(PAIRS))]
        slow.append(sacrebleu.corpus_bleu([p for p, _ in drawn], [[t for _, t in drawn]]).score)
    low, high = np.percentile(slow, [2.5, 97.5])
    assert found.low == pytest.approx(low, abs=4) and found.high == pytest.approx(high, abs=6)


@given(st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=4))
@settings(max_examples=15, deadline=None)
def test_every_value_lies_in_its_interval_and_its_range_whatever_is_answered(pairs: list[tuple[str, str]]) -> None:
    found = score(ScoringOrder(ALL[:5], [Scored(p, [t]) for p, t in pairs], []))
    for name, metric in found.items():
        most = 100.000001 if name == "bleu" else 1.000001
        assert 0 <= metric.low <= metric.value <= metric.high <= most


def test_nothing_is_looked_up_on_the_network() -> None:
    """nltk downloads its data on demand, but the stemmer needs none of it."""
    program = f"""
import socket
def refuse(*args, **kwargs):
    raise AssertionError("the network was asked")
socket.socket.connect = socket.getaddrinfo = refuse
from evaluator.core import metrics
print(metrics.rouge(prediction={ZELDA_PREDICTION!r}, target={ZELDA_TARGET!r})["rouge1"].recall)
print(metrics.bleu(prediction="a b c d e", target="a b c d e"))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    recall, bleu = (float(line) for line in done.stdout.split())
    assert recall == pytest.approx(6 / 19) and bleu == pytest.approx(100)
