"""Picks tokens where the logits lie, for rows that need nothing else: a vocabulary a row need not leave the device.

Greedy rows, and rows with a temperature and no other filter. The random numbers are core.sampling's own, so the same
seed gives the same text (as far as two ways to sum a row agree).
"""

from collections.abc import Sequence as Seq

import torch
from torch import Tensor

from generator.core.sampling import Row, uniform


def is_plain(row: Row) -> bool:
    """Whether a row is picked from its logits as they are, and tells no log probability."""
    sequence = row.sequence
    sampling = sequence.sampling
    return not (
        sampling.is_penalised
        or sampling.logit_bias
        or sequence.matcher is not None
        or sequence.request.logprobs is not None
        or (sequence.suppressed_ids and row.position < sequence.request.stop.min_tokens)
        or (not sampling.is_greedy and (sampling.top_p < 1.0 or sampling.top_k or sampling.min_p > 0.0))
    )


def pick(logits: Tensor, rows: Seq[Row]) -> list[int]:
    """Returns one token for each row of `logits` [R, V]; all must be plain."""
    tokens = logits.argmax(dim=1)
    random = [place for place, row in enumerate(rows) if not row.sequence.sampling.is_greedy]
    if random:
        places = torch.tensor(random, device=logits.device)
        tokens[places] = _draw(logits[places], [rows[place] for place in random])
    return [int(token) for token in tokens.tolist()]


def _draw(logits: Tensor, rows: Seq[Row]) -> Tensor:
    """Draws by the inverse of the cumulative distribution, as core.sampling does."""
    temperatures = torch.tensor([row.sequence.sampling.temperature for row in rows], device=logits.device)
    weights = ((logits - logits.amax(dim=1, keepdim=True)) / temperatures[:, None]).exp()
    cumulative = weights.cumsum(dim=1, dtype=torch.float64)
    draws = [uniform(row.sequence.seed, row.sequence.index, row.position) for row in rows]
    total = cumulative[:, -1]
    target = torch.tensor(draws, dtype=torch.float64, device=logits.device) * total
    below = torch.nextafter(total, torch.zeros_like(total))
    return torch.searchsorted(cumulative, torch.minimum(target, below)[:, None], right=True)[:, 0]
