"""How much a request can use at most: what a budget has to hold before it runs. Implements core.ledger.Sizes.

Never too little, and as little more as can be told before the graph has run.
"""

from gateway.core.graph import GraphRequest
from gateway.core.money import Bound
from gateway.core.prompts import PromptCounter
from gateway.core.serving import Ask

_ENCODER_MARKS = 2  # what an encoder puts around a text


class RequestSizes:
    """Counts prompts with the generator's own tokenizer."""

    def __init__(self, prompts: PromptCounter) -> None:
        self._prompts = prompts

    async def bound(self, ask: Ask) -> Bound:
        """See Sizes.bound. Asks the generator, within the request's deadline."""
        if not ask.requests:
            return Bound(sum(_most_tokens(one) + _ENCODER_MARKS for one in ask.inputs))
        _, is_plain = await self._prompts.model_behind(ask)
        context = await self._prompts.context_length(ask)
        counts = await self._prompts.count(ask) if is_plain else (0,) * len(ask.requests)
        bounds = [_bound(one, count, context, is_plain) for one, count in zip(ask.requests, counts, strict=True)]
        return sum(bounds, Bound())


def _bound(request: GraphRequest, num_prompt: int, context: int, is_plain: bool) -> Bound:
    max_tokens = request.stopping.max_tokens
    if not is_plain:  # the graph writes the prompt
        return Bound(context, request.n * min(context, max_tokens or context))
    rest = max(0, context - num_prompt)
    return Bound(num_prompt, request.n * (rest if max_tokens is None else min(rest, max_tokens)))


def _most_tokens(one: str | tuple[int, ...]) -> int:
    """A token is a byte at least."""
    return len(one.encode()) if isinstance(one, str) else len(one)
