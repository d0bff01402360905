"""How much a request can use at most: what a budget has to hold before it runs. Implements core.ledger.Sizes.

Never too little, and as little more as can be told before the graph has run.
"""

from gateway.core.catalog import Catalog
from gateway.core.graph import Deadline, GraphRequest
from gateway.core.money import Bound
from gateway.core.services import Generator
from gateway.core.serving import Ask

_ENCODER_MARKS = 2  # what an encoder puts around a text


class RequestSizes:
    """Counts prompts with the generator's own tokenizer."""

    def __init__(self, catalog: Catalog, generator: Generator) -> None:
        self._catalog = catalog
        self._generator = generator

    async def bound(self, ask: Ask) -> Bound:
        """See Sizes.bound. Asks the generator, within the request's deadline."""
        if not ask.requests:
            return Bound(sum(_most_tokens(one) + _ENCODER_MARKS for one in ask.inputs))
        model, is_plain = await self._catalog.model_behind(ask.model, ask.principal.tenant)
        bounds = [await self._of(request, model, is_plain, ask.deadline) for request in ask.requests]
        return sum(bounds, Bound())

    async def _of(self, request: GraphRequest, model: str, is_plain: bool, deadline: Deadline) -> Bound:
        prompt = request.prompt
        counted = "" if isinstance(prompt, tuple) else prompt  # ids are counted here; the context is asked for
        size = await self._generator.tokenize(model, counted, timeout_s=deadline.remaining_s())
        context = size.context_length
        if not is_plain:  # the graph writes the prompt
            return Bound(context, request.n * min(context, request.stopping.max_tokens or context))
        num_prompt = len(prompt) if isinstance(prompt, tuple) else size.num_tokens
        rest = max(0, context - num_prompt)
        max_tokens = request.stopping.max_tokens
        return Bound(num_prompt, request.n * (rest if max_tokens is None else min(rest, max_tokens)))


def _most_tokens(one: str | tuple[int, ...]) -> int:
    """A token is a byte at least."""
    return len(one.encode()) if isinstance(one, str) else len(one)
