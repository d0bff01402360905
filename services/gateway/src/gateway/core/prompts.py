"""Counts the tokens of a request's prompts before it runs, once for all stages that need to know."""

import time
from collections.abc import Callable

from chassis.errors import PlatformError
from gateway.core.catalog import Catalog
from gateway.core.services import Generator, Prompt
from gateway.core.serving import Ask

_CONTEXT_TTL_S = 60.0
_AWAY_TTL_S = 5.0  # where the generator could not be asked; what was known before holds on


class PromptCounter:
    """Asks the generator, within the request's deadline."""

    def __init__(self, catalog: Catalog, generator: Generator, clock: Callable[[], float] = time.monotonic) -> None:
        self._catalog = catalog
        self._generator = generator
        self._clock = clock
        self._contexts: dict[str, tuple[float, int]] = {}  # of a model: until when that is believed, and its length

    async def count(self, ask: Ask) -> tuple[int, ...]:
        """The tokens of each prompt as the client wrote it; raises PlatformError where they cannot be counted."""
        if ask.prompt_tokens is None:
            model, _ = await self.model_behind(ask)
            ask.prompt_tokens = tuple([await self._count(model, one.prompt, ask) for one in ask.requests])
        return ask.prompt_tokens

    async def context_length(self, ask: Ask) -> int:
        """The context of the model that answers; raises PlatformError where nobody knows it."""
        model, _ = await self.model_behind(ask)
        until_s, length = self._contexts.get(model, (0.0, 0))
        if until_s > self._clock():
            return length
        try:
            size = await self._generator.tokenize(model, "?", timeout_s=ask.deadline.remaining_s())
        except PlatformError:
            if not length:
                raise
            self._contexts[model] = (self._clock() + _AWAY_TTL_S, length)
            return length
        self._contexts[model] = (self._clock() + _CONTEXT_TTL_S, size.context_length)
        return size.context_length

    async def model_behind(self, ask: Ask) -> tuple[str, bool]:
        """The generator's model, and whether it reads the prompt as it is; raises NOT_FOUND."""
        graph = await self._catalog.declared(ask.model, ask.principal.tenant)
        return graph.model, graph.is_plain

    async def _count(self, model: str, prompt: Prompt, ask: Ask) -> int:
        if isinstance(prompt, tuple):
            return len(prompt)
        return (await self._generator.tokenize(model, prompt, timeout_s=ask.deadline.remaining_s())).num_tokens
