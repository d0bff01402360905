"""Which models a client can name: the graphs, and what generator and embedder say that they serve."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence

from chassis.errors import Code, PlatformError
from gateway.core.graph import Sequenced
from gateway.core.services import Embedder, Generator, ServedModel

_TIMEOUT_S = 2.0


def model_not_found(model: str) -> PlatformError:
    """The error for a name that nothing answers to."""
    return PlatformError(
        Code.NOT_FOUND,
        f"the model {model[:200]!r} does not exist; GET /v1/models lists those that do",
        param="model",
        reason="model_not_found",
    )


class Catalog:
    """The list of models. A service that is away keeps its last known place in it."""

    def __init__(self, graphs: Mapping[str, Sequenced], generator: Generator, embedder: Embedder) -> None:
        self._graphs = graphs
        self._generator = generator
        self._embedder = embedder
        self._known: dict[str, Sequence[ServedModel]] = {"generator": (), "embedder": ()}

    def graph(self, name: str) -> Sequenced:
        """The graph of that name; raises NOT_FOUND."""
        graph = self._graphs.get(name)
        if graph is None:
            raise model_not_found(name)
        return graph

    async def models(self) -> list[ServedModel]:
        """All of them, by name. A graph is as old as the model that answers in its end."""
        await asyncio.gather(
            self._refresh("generator", lambda: self._generator.list_models(timeout_s=_TIMEOUT_S)),
            self._refresh("embedder", lambda: self._embedder.list_models(timeout_s=_TIMEOUT_S)),
        )
        created = {model.id: model.created_unix_s for served in self._known.values() for model in served}
        # Of the generator's own models only those can be named in a request that have a graph.
        ids = {model.id for model in self._known["embedder"]} | set(self._graphs)
        return [ServedModel(name, created.get(self._base(name), 0)) for name in sorted(ids)]

    def _base(self, name: str) -> str:
        graph = self._graphs.get(name)
        return graph.model if graph else name

    async def _refresh(self, service: str, ask: Callable[[], Awaitable[Sequence[ServedModel]]]) -> None:
        try:
            self._known[service] = await ask()
        except PlatformError as error:
            if not error.retryable and error.code is not Code.DEADLINE_EXCEEDED:
                raise
