"""Generator, embedder and retriever behind a guard: each as one service, whatever number of backends it has."""

from collections.abc import AsyncGenerator, Sequence

from gateway.core.guard import Guard
from gateway.core.services import (
    Chat,
    Completer,
    Embedded,
    Embedder,
    Generation,
    GenerationEvent,
    Generator,
    Retriever,
    SearchQuery,
    ServedModel,
    Source,
    Tokenized,
)


class GuardedCompleter:
    """Implements services.Completer."""

    def __init__(self, guard: Guard[Completer]) -> None:
        self._guard = guard

    def generate(self, call: Generation, *, timeout_s: float) -> AsyncGenerator[GenerationEvent]:
        """Streams the completion; what came before its first token comes together with that."""
        return self._guard.stream(lambda one, left_s: one.generate(call, timeout_s=left_s), timeout_s)


class GuardedGenerator:
    """Implements services.Generator."""

    def __init__(self, guard: Guard[Generator]) -> None:
        self._guard = guard

    def generate(self, call: Generation, *, timeout_s: float) -> AsyncGenerator[GenerationEvent]:
        """Streams the completion; what came before its first token comes together with that."""
        return self._guard.stream(lambda one, left_s: one.generate(call, timeout_s=left_s), timeout_s)

    async def tokenize(self, model: str, prompt: Chat | str, *, timeout_s: float) -> Tokenized:
        """Counts the tokens of a prompt."""
        return await self._guard.call(lambda one, left_s: one.tokenize(model, prompt, timeout_s=left_s), timeout_s)

    async def list_models(self, *, timeout_s: float) -> Sequence[ServedModel]:
        """What is served."""
        return await self._guard.call(lambda one, left_s: one.list_models(timeout_s=left_s), timeout_s)


class GuardedEmbedder:
    """Implements services.Embedder."""

    def __init__(self, guard: Guard[Embedder]) -> None:
        self._guard = guard

    async def embed(
        self,
        model: str,
        inputs: Sequence[str] | Sequence[Sequence[int]],
        *,
        truncate: bool,
        dimensions: int,
        timeout_s: float,
    ) -> Embedded:
        """Embeds texts or token lists."""
        return await self._guard.call(
            lambda one, left_s: one.embed(model, inputs, truncate=truncate, dimensions=dimensions, timeout_s=left_s),
            timeout_s,
        )

    async def count_tokens(self, model: str, texts: Sequence[str], *, timeout_s: float) -> Sequence[int]:
        """Counts the tokens of each text, special ones included."""
        return await self._guard.call(lambda one, left_s: one.count_tokens(model, texts, timeout_s=left_s), timeout_s)

    async def list_models(self, *, timeout_s: float) -> Sequence[ServedModel]:
        """What is served."""
        return await self._guard.call(lambda one, left_s: one.list_models(timeout_s=left_s), timeout_s)


class GuardedRetriever:
    """Implements services.Retriever."""

    def __init__(self, guard: Guard[Retriever]) -> None:
        self._guard = guard

    async def search(self, query: SearchQuery, *, timeout_s: float) -> Sequence[Source]:
        """The best chunks, best first."""
        return await self._guard.call(lambda one, left_s: one.search(query, timeout_s=left_s), timeout_s)
