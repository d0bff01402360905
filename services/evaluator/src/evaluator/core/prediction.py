"""How well a model predicts a text, from the log probabilities that the generator returns for a prompt.

A text longer than a window is read in windows that overlap by one token, so that each token but the first of the text
is predicted exactly once. The first has nothing before it: neither its bits nor its bytes count (a token that the model
puts before every text has no bytes, so there the whole text counts). Windows have a fixed
size, whatever the context, so that figures of different models can be compared and no single prompt takes the engine
for long.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial

from chassis.errors import Code, PlatformError
from chassis.patience import patiently
from evaluator.core.ports import Generator, ServedModel, TokenScores
from evaluator.core.results import TextBits

WINDOW_TOKENS = 1024


async def predict(
    generator: Generator, model: ServedModel, text: str, index: int, *, budget_s: float, before_each: Callable[[], None]
) -> TextBits:
    """Measures one text; `budget_s` and `before_each` hold for each call of the generator (chassis.patience)."""
    read = await patiently(partial(generator.tokenize, model, text), budget_s=budget_s, before_each=before_each)
    logprobs: list[float] = []
    num_bytes, version = len(text.encode()), ""
    for ids in windows(read.token_ids, min(WINDOW_TOKENS, read.context_length)):
        ask = partial(generator.token_scores, model, ids)
        scores = await patiently(ask, budget_s=budget_s, before_each=before_each)
        _check(scores, len(ids))
        num_bytes -= 0 if logprobs else scores.first_size_bytes
        logprobs += scores.logprobs[1:]
        version = scores.model_version
    if not logprobs:
        message = f"texts[{index}]: it is a single token for this model, so that nothing of it can be predicted"
        raise PlatformError(Code.INVALID_ARGUMENT, message, param="task")
    return TextBits(index, -math.fsum(logprobs) / math.log(2), num_bytes, version)


def windows(token_ids: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    """Cuts ids into windows of at most `size` tokens that overlap by one; the last has at least two, or is the only."""
    yield token_ids[:size]
    start = size - 1
    while start < len(token_ids) - 1:
        yield token_ids[start : start + size]
        start += size - 1


def _check(scores: TokenScores, num_ids: int) -> None:
    if len(scores.logprobs) != num_ids:
        raise PlatformError(Code.INTERNAL, f"the generator scored {len(scores.logprobs)} tokens of {num_ids}")
    if not all(math.isfinite(logprob) for logprob in scores.logprobs[1:]):
        raise PlatformError(Code.INTERNAL, "the generator returned a log probability that is not finite")
