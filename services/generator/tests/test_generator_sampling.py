"""The sampler against plain definitions, and its independence of the batch."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from generator.core import sampling
from generator.core.requests import GenerationRequest, SamplingParams, StopParams
from generator.core.sequences import Sequence

VOCAB = 50


def sample(logits: sampling.Floats, sequences: list[Sequence]) -> list[int]:
    return sampling.sample(logits, [sampling.Row(sequence) for sequence in sequences])


def _sequence(params: SamplingParams, seed: int = 1, tokens: tuple[int, ...] = (0,), new: int = 0) -> Sequence:
    sequence = Sequence(GenerationRequest("r", tokens, params), 0, 0, seed, 1000)
    sequence.num_prompt = len(tokens) - new
    return sequence


def _logits(rows: int, seed: int = 0) -> sampling.Floats:
    return (3 * np.random.default_rng(seed).standard_normal((rows, VOCAB))).astype(np.float32)


def _frequencies(params: SamplingParams, logits: sampling.Floats, num: int = 4000) -> np.ndarray:
    drawn = sample(np.repeat(logits, num, axis=0), [_sequence(params, seed) for seed in range(num)])
    return np.bincount(drawn, minlength=VOCAB) / num


def _softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def test_temperature_zero_takes_the_best() -> None:
    logits = _logits(4)
    assert sample(logits.copy(), [_sequence(SamplingParams(temperature=0))] * 4) == list(logits.argmax(axis=1))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_distribution(temperature: float) -> None:
    logits = _logits(1)
    expected = _softmax(logits[0] / temperature)
    found = _frequencies(SamplingParams(temperature=temperature), logits)
    assert np.abs(found - expected).max() < 0.03


def test_a_tiny_temperature_neither_overflows_nor_wanders() -> None:
    logits = _logits(1)
    assert _frequencies(SamplingParams(temperature=1e-30), logits, 10)[logits.argmax()] == 1.0


@pytest.mark.parametrize(
    ("params", "kept"),
    [
        (SamplingParams(top_k=3), lambda p: p >= np.sort(p)[-3]),
        (SamplingParams(min_p=0.2), lambda p: p >= 0.2 * p.max()),
        (SamplingParams(top_p=0.6), lambda p: np.isin(p, _nucleus(p, 0.6))),
        (SamplingParams(top_p=1e-6), lambda p: p == p.max()),
        (SamplingParams(top_k=1000), lambda p: p > 0),
    ],
)
def test_filters_keep_what_they_say(params: SamplingParams, kept) -> None:  # type: ignore[no-untyped-def]
    logits = _logits(1)
    probabilities = _softmax(logits[0])
    allowed = kept(probabilities)
    expected = np.where(allowed, probabilities, 0)
    found = _frequencies(params, logits)
    assert not found[~allowed].any()
    assert np.abs(found - expected / expected.sum()).max() < 0.03


def _nucleus(probabilities: np.ndarray, mass: float) -> np.ndarray:
    kept = []
    for probability in sorted(probabilities, reverse=True):
        kept.append(probability)
        if sum(kept) >= mass:
            break
    return np.array(kept)


def test_penalties_follow_their_definitions() -> None:
    logits = np.zeros((1, VOCAB), dtype=np.float32)
    logits[0, :4] = (2.0, -2.0, 2.0, 2.0)
    params = SamplingParams(repetition_penalty=2.0, frequency_penalty=0.5, presence_penalty=0.25)
    # Prompt 0 1, completion 2 2 3.
    sampling.adjust(logits, [sampling.Row(_sequence(params, tokens=(0, 1, 2, 2, 3), new=3))])
    assert logits[0, :5] == pytest.approx([1.0, -4.0, 1.0 - 1.25, 1.0 - 0.75, 0.0])


def test_bias_moves_single_tokens() -> None:
    greedy = SamplingParams(temperature=0, logit_bias={7: 100.0})
    assert sample(_logits(1), [_sequence(greedy)]) == [7]


class _Matcher:
    """Allows a set of tokens and no others."""

    is_done = False

    def __init__(self, *allowed: int) -> None:
        self._allowed = allowed

    def mask(self) -> np.ndarray:
        words = np.zeros(-(-VOCAB // 32), dtype=np.uint32)
        for token in self._allowed:
            words[token // 32] |= np.uint32(1 << (token % 32))
        return words.view(np.int32)

    def accept(self, token_id: int) -> None:
        raise AssertionError("a sampler only looks")


def test_a_grammar_leaves_its_tokens_and_touches_no_other_row() -> None:
    logits = _logits(2)
    allowed = [int(token) for token in np.argsort(logits[0])[:3]] + [31, 32]
    rows = [_sequence(SamplingParams(temperature=0)) for _ in range(2)]
    rows[0].matcher = _Matcher(*allowed)
    adjusted = logits.copy()
    sampling.adjust(adjusted, [sampling.Row(row) for row in rows])
    assert set(np.flatnonzero(np.isfinite(adjusted[0]))) == set(allowed)
    assert (adjusted[0, allowed] == logits[0, allowed]).all() and (adjusted[1] == logits[1]).all()
    hot = [_sequence(SamplingParams(temperature=2.0), seed) for seed in range(60)]
    for sequence in hot:
        sequence.matcher = _Matcher(7, 33)
    assert set(sample(np.repeat(_logits(1), 60, axis=0), hot)) == {7, 33}


def test_a_grammar_that_allows_only_the_end_wins_over_min_tokens() -> None:
    request = GenerationRequest("r", (0,), SamplingParams(), StopParams(min_tokens=5))
    sequence = Sequence(request, 0, 0, 0, 100, suppressed_ids=(40,), matcher=_Matcher(40))
    assert sample(_logits(1), [sequence]) == [40]


def test_suppressed_tokens_wait_for_min_tokens() -> None:
    logits = _logits(1)
    best = int(logits.argmax())
    request = GenerationRequest("r", (0,), SamplingParams(temperature=0), StopParams(min_tokens=2))
    sequence = Sequence(request, 0, 0, 0, 100, suppressed_ids=(best,))
    assert sample(logits.copy(), [sequence]) != [best]
    sequence.token_ids += [1, 1]
    assert sample(logits.copy(), [sequence]) == [best]


@given(st.integers(0, 2**64 - 1), st.integers(0, 5), st.permutations(range(6)))
def test_a_seeded_row_does_not_depend_on_its_neighbours(seed: int, row: int, order: list[int]) -> None:
    logits = _logits(6, seed=3)
    params = SamplingParams(temperature=1.5, top_p=0.9)
    alone = sample(logits[row : row + 1].copy(), [_sequence(params, seed)])
    sequences = [_sequence(params, seed if i == row else i) for i in range(6)]
    batch = sample(logits[order].copy(), [sequences[i] for i in order])
    assert batch[order.index(row)] == alone[0]


def test_random_numbers_spread_evenly() -> None:
    draws = np.array(
        [sampling.uniform(seed, index, at) for seed in range(10) for index in range(4) for at in range(100)]
    )
    assert draws.min() >= 0 and draws.max() < 1 and len(set(draws)) == len(draws)
    assert abs(draws.mean() - 0.5) < 0.02 and abs(draws.std() - 12**-0.5) < 0.02


def test_logprobs_are_a_softmax_with_the_best_first() -> None:
    logits = _logits(3)
    for row, found in enumerate(sampling.logprobs(logits, [4, 5, 6], 5)):
        expected = np.log(_softmax(logits[row].astype(np.float64)))
        assert found.logprob == pytest.approx(expected[found.token_id], abs=1e-5)
        assert [t for t, _ in found.top] == list(np.argsort(-logits[row])[:5])
        assert [p for _, p in found.top] == pytest.approx(sorted(expected, reverse=True)[:5], abs=1e-5)
