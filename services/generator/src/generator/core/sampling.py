"""Picks the next token of every row of a batch, vectorised, from logits in plain numpy.

A seeded request draws the same tokens whatever else is in the batch: the random number of a token depends on nothing
but seed, completion index and position, so it also survives a preemption. Every filter works on probabilities that
are relative to the best token; ties at a threshold stay in.

Legend: R rows, V vocabulary.
"""

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from generator.core.grammar import TokenMatcher
from generator.core.sequences import Sequence, TokenLogprob, Work

Floats = NDArray[np.float32]
_MASK64 = 2**64 - 1
_GOLDEN = 0x9E3779B97F4A7C15


@dataclass(frozen=True, slots=True)
class Row:
    """A token to sample: that of `sequence` which follows `offset` others of the same step."""

    sequence: Sequence
    offset: int = 0

    @property
    def position(self) -> int:
        """Which of the completion's tokens it is, from 0."""
        return self.sequence.num_new + self.offset


def rows_of(work: Work) -> list[Row]:
    """Returns what to sample for a work: a row at its last token and at each draft; none where it does not sample."""
    return [Row(work.sequence, offset) for offset in range(1 + len(work.drafts))] if work.samples else []


def num_accepted(drafts: Seq[int], token_ids: Seq[int]) -> int:
    """Returns how many of the tokens sampled in a work's rows stand: those up to the first that is not the draft."""
    for place, draft in enumerate(drafts):
        if token_ids[place] != draft:
            return place + 1
    return len(token_ids)


def sample(logits: Floats, rows: Seq[Row]) -> list[int]:
    """Returns one token for each row of `logits` [R, V], which it overwrites."""
    adjust(logits, rows)
    return draw(logits, rows)


def adjust(logits: Floats, rows: Seq[Row]) -> None:
    """Applies penalties, biases, suppressed tokens and grammars in place; touches only the tokens concerned."""
    for values, row in zip(logits, rows, strict=True):
        sequence, sampling = row.sequence, row.sequence.sampling
        if sampling.is_penalised:
            _penalise_seen(values, sequence)
        if sampling.logit_bias:
            ids = np.fromiter(sampling.logit_bias.keys(), dtype=np.int64)
            values[ids] += np.fromiter(sampling.logit_bias.values(), dtype=np.float32)
        if sequence.suppressed_ids and row.position < sequence.request.stop.min_tokens:
            values[list(sequence.suppressed_ids)] = -np.inf
        if sequence.matcher is not None:
            _constrain(values, sequence.matcher)


def is_adjusted(row: Row) -> bool:
    """Says whether `adjust` may change the logits of a row."""
    sequence = row.sequence
    is_suppressed = bool(sequence.suppressed_ids) and row.position < sequence.request.stop.min_tokens
    asked = sequence.sampling
    return asked.is_penalised or bool(asked.logit_bias) or is_suppressed or sequence.matcher is not None


def draw(logits: Floats, rows: Seq[Row]) -> list[int]:
    """Returns one token for each row of adjusted `logits` [R, V]: the best one, or one drawn by its weights."""
    tokens = np.argmax(logits, axis=1)
    random = [place for place, row in enumerate(rows) if not row.sequence.sampling.is_greedy]
    if random:
        tokens[random] = _draw(logits[random], [rows[place] for place in random])
    return [int(token) for token in tokens]


def logprobs(logits: Floats, token_ids: Seq[int], num_top: int) -> list[TokenLogprob]:
    """Returns the log probabilities of one token for each row of raw `logits` [R, V], with the `num_top` best."""
    best = logits.max(axis=1, keepdims=True)
    # float32 sums over 50,000 terms would lose the third decimal; only the sum is taken in double.
    log_sum = best[:, 0] + np.log(np.exp(logits - best).sum(axis=1, dtype=np.float64))
    answer = []
    for row, token_id in enumerate(token_ids):
        top: tuple[tuple[int, float], ...] = ()
        if num_top:
            likeliest = np.argpartition(logits[row], -num_top)[-num_top:]
            likeliest = likeliest[np.lexsort((likeliest, -logits[row, likeliest]))]
            top = tuple((int(t), float(logits[row, t] - log_sum[row])) for t in likeliest)
        answer.append(TokenLogprob(int(token_id), float(logits[row, token_id] - log_sum[row]), top))
    return answer


def uniform(seed: int, index: int, position: int) -> float:
    """Returns a number in [0, 1) that is fixed by its arguments (splitmix64)."""
    mixed = _splitmix(_splitmix(_splitmix(seed) ^ index) ^ position)
    return float(mixed >> 11) * 2.0**-53


def _splitmix(state: int) -> int:
    z = (state + _GOLDEN) & _MASK64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK64
    return z ^ (z >> 31)


def _constrain(row: Floats, matcher: TokenMatcher) -> None:
    """Rules out what the grammar does not allow. A grammar that allows nothing but the end wins over min_tokens."""
    allowed = np.unpackbits(matcher.mask().view(np.uint8), bitorder="little")[: len(row)].astype(bool)
    row[len(allowed) :] = -np.inf  # ids that pad the weights' vocabulary
    within = row[: len(allowed)]
    if within[allowed].max(initial=-np.inf) == -np.inf:
        within[allowed] = 0.0
    within[~allowed] = -np.inf


def _penalise_seen(row: Floats, sequence: Sequence) -> None:
    """Repetition looks at prompt and completion, frequency and presence at the completion alone (as OpenAI's do)."""
    sampling = sequence.sampling
    if sampling.repetition_penalty != 1.0:
        seen = np.unique(np.asarray(sequence.token_ids))
        values = row[seen]
        row[seen] = np.where(values > 0, values / sampling.repetition_penalty, values * sampling.repetition_penalty)
    if sampling.frequency_penalty != 0.0 or sampling.presence_penalty != 0.0:
        new = np.asarray(sequence.token_ids[sequence.num_prompt :], dtype=np.int64)
        ids, counts = np.unique(new, return_counts=True)
        row[ids] -= counts.astype(np.float32) * sampling.frequency_penalty + sampling.presence_penalty


def _draw(logits: Floats, rows: Seq[Row]) -> NDArray[np.int64]:
    """Draws by the inverse of the cumulative distribution: one random number for each row."""
    sequences = [row.sequence for row in rows]
    temperature = np.array([s.sampling.temperature for s in sequences], dtype=np.float32)[:, None]
    # The best token gets 1, so a tiny temperature can underflow but never overflow.
    weights: Floats = np.exp((logits - logits.max(axis=1, keepdims=True)) / temperature)
    _filter(weights, sequences)
    cumulative = np.cumsum(weights, axis=1, dtype=np.float64)
    draws = np.array([uniform(row.sequence.seed, row.sequence.index, row.position) for row in rows])
    targets = np.minimum(draws * cumulative[:, -1], np.nextafter(cumulative[:, -1], 0.0))
    chosen = [np.searchsorted(row, target, side="right") for row, target in zip(cumulative, targets, strict=True)]
    return np.asarray(chosen, dtype=np.int64)


def _filter(weights: Floats, sequences: Seq[Sequence]) -> None:
    """Sets the weights that top_k, top_p and min_p (in this order) drop to 0, in place."""
    vocab_size = weights.shape[1]
    rows = [r for r, s in enumerate(sequences) if s.sampling.top_p < 1.0 or 0 < s.sampling.top_k < vocab_size]
    if rows:
        descending = np.sort(weights[rows], axis=1)[:, ::-1]
        for place, row in enumerate(rows):
            sampling = sequences[row].sampling
            best = descending[place]
            if sampling.top_k:
                best = best[: sampling.top_k]
            mass = np.cumsum(best, dtype=np.float64)
            last = int(np.searchsorted(mass, sampling.top_p * mass[-1])) if sampling.top_p < 1.0 else len(best) - 1
            weights[row, weights[row] < best[min(last, len(best) - 1)]] = 0.0
    for row, sequence in enumerate(sequences):
        if sequence.sampling.min_p > 0.0:
            weights[row, weights[row] < sequence.sampling.min_p] = 0.0
