"""Which models a client can name: the graphs, the tenant's tuned models, and what generator and embedder serve."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace

from chassis.errors import Code, PlatformError
from gateway.core.finetuning import TunedModel, TunedModels
from gateway.core.graph import Deadline, Fallbacks, Graph, GraphEvent, GraphRequest, Sequenced
from gateway.core.repeats import UNTOLD
from gateway.core.services import Chat, Embedder, Generator, ServedModel, Tokenized

_TIMEOUT_S = 2.0
_VERSION_TIMEOUT_S = 0.25
_LOADING_S = 2.0  # what a generator takes to load an adapter, about


def model_not_found(model: str) -> PlatformError:
    """The error for a name that nothing answers to."""
    return PlatformError(
        Code.NOT_FOUND,
        f"the model {model[:200]!r} does not exist; GET /v1/models lists those that do",
        param="model",
        reason="model_not_found",
    )


class Tuned:
    """A plain graph whose model answers through a tenant's adapter."""

    def __init__(self, base: Sequenced, model: TunedModel) -> None:
        self.name = model.model_id
        self.model = base.model
        self.uses_generator = True
        self.fallbacks = Fallbacks()  # no other model is what it was tuned to be
        self._base = base
        self._model = model

    @property
    def identity(self) -> str | None:
        """The base's, and the adapter."""
        return f"{self.name} {self._base.identity}"

    async def run(self, request: GraphRequest, deadline: Deadline) -> AsyncGenerator[GraphEvent]:
        """Walks the base's graph; the caller closes it in the task that iterates it."""
        # The generator is asked even where no job has told its end yet: it serves a model a moment before we hear it.
        try:
            async with aclosing(self._base.run(replace(request, adapter=self.name), deadline)) as events:
                async for event in events:
                    yield event
        except PlatformError as error:
            if error.code is not Code.NOT_FOUND:
                raise
            raise self._not_served() from error

    def _not_served(self) -> PlatformError:
        if not self._model.is_published:
            return model_not_found(self.name)
        return PlatformError(
            Code.UNAVAILABLE,
            f"the model {self.name!r} is being loaded",
            param="model",
            reason="model_loading",
            retry_after_s=_LOADING_S,
        )


class Catalog:
    """The list of models. A service that is away keeps its last known place in it."""

    def __init__(
        self, graphs: Mapping[str, Sequenced], generator: Generator, embedder: Embedder, tuned: TunedModels
    ) -> None:
        self._graphs = graphs
        self._generator = generator
        self._embedder = embedder
        self._tuned = tuned
        self._asking: asyncio.Task[Mapping[str, str]] | None = None
        self._known: dict[str, Sequence[ServedModel]] = {"generator": (), "embedder": ()}

    async def graph(self, name: str, tenant: str) -> Graph:
        """What answers under that name for the tenant; raises NOT_FOUND."""
        graph = self._graphs.get(name)
        if graph is not None:
            return graph
        if ":" in name:  # no graph has one in its name
            model = await self._tuned.tuned(tenant, name)
            base = self._graphs.get(model.base) if model else None
            if model is not None and base is not None:
                return Tuned(base, model)
        raise model_not_found(name)

    async def tokenize(self, graph: Graph, prompt: Chat | str, deadline: Deadline) -> Tokenized:
        """What a prompt is to the model that answers in the graph's end; INVALID_ARGUMENT where only others know."""
        if not graph.uses_generator:
            raise PlatformError(
                Code.INVALID_ARGUMENT,
                f"the tokens of the model {graph.name!r} are not counted here: another server runs it",
                param="model",
                reason="model_not_supported",
            )
        return await self._generator.tokenize(graph.model, prompt, timeout_s=deadline.remaining_s())

    def only_plain(self) -> str:
        """The one plain model, for requests that name none; raises INVALID_ARGUMENT where there are several."""
        plain = sorted(one.name for one in self._graphs.values() if one.is_plain)
        if len(plain) != 1:
            raise PlatformError(
                Code.INVALID_ARGUMENT,
                f"name the model; there are: {', '.join(plain)}",
                param="model",
                reason="missing_required_parameter",
            )
        return plain[0]

    async def version(self, graph: Graph) -> str | None:
        """Which version of the model would answer now; None where that cannot be known at once, UNTOLD for an upstream.

        The generator is asked each time, since adapters and models are changed while it runs; who asks at the same
        time shares its answer.
        """
        if not graph.uses_generator:
            return UNTOLD
        if self._asking is None:
            self._asking = asyncio.create_task(self._versions())
            self._asking.add_done_callback(self._asked)
        name = graph.model if isinstance(graph, Sequenced) else graph.name
        return (await asyncio.shield(self._asking)).get(name)

    def _asked(self, _: object) -> None:
        self._asking = None

    async def _versions(self) -> Mapping[str, str]:
        try:
            models = await self._generator.list_models(timeout_s=_VERSION_TIMEOUT_S)
        except PlatformError:
            return {}
        return {model.id: model.version for model in models if model.version}

    async def check_answers(self, name: str, tenant: str) -> None:
        """Raises NOT_FOUND unless the tenant can ask the model, or will be able to in a moment."""
        if name in self._graphs:
            return
        model = await self._tuned.tuned(tenant, name)
        if model is None or not model.is_published:
            raise model_not_found(name)

    async def check_tunable(self, name: str) -> None:
        """Raises NOT_FOUND for an unknown base, INVALID_ARGUMENT for one that no adapter can be made for."""
        graph = self._graphs.get(name)
        if graph is not None and graph.is_plain:
            return
        await self.refresh()
        encoders = {model.id for model in self._known["embedder"]}
        if graph is not None and graph.upstream is not None:
            why = "is served by another server"
        elif graph is not None:
            why = f"is a graph over {graph.model!r}: fine-tune that model"
        elif name in encoders:
            why = "is an encoder"
        elif ":" in name and name.split(":", 1)[0] in self._graphs:
            why = "is a tuned model, and only base models can be fine-tuned"
        else:
            raise model_not_found(name)
        tunable = ", ".join(sorted(one.name for one in self._graphs.values() if one.is_plain))
        raise PlatformError(
            Code.INVALID_ARGUMENT,
            f"the model {name[:200]!r} {why}; there are: {tunable}",
            param="model",
            reason="model_not_available",
        )

    async def models(self, tenant: str) -> list[ServedModel]:
        """All that the tenant can name. A graph is as old as the model that answers in its end."""
        await self.refresh()
        owned = {model.model_id for model in await self._tuned.tuned_of(tenant)}
        created = {model.id: model.created_unix_s for served in self._known.values() for model in served}
        # Of the generator's own models only those can be named in a request that have a graph or a tenant.
        ids = {model.id for model in self._known["embedder"]} | set(self._graphs)
        tuned = [model for model in self._known["generator"] if model.id in owned]
        served = [ServedModel(name, created.get(self._base(name), 0)) for name in ids]
        return sorted(served + tuned, key=lambda model: model.id)

    async def refresh(self) -> None:
        """Asks generator and embedder what they serve."""
        await asyncio.gather(
            self._refresh("generator", lambda: self._generator.list_models(timeout_s=_TIMEOUT_S)),
            self._refresh("embedder", lambda: self._embedder.list_models(timeout_s=_TIMEOUT_S)),
        )

    def _base(self, name: str) -> str:
        graph = self._graphs.get(name)
        return graph.model if graph and graph.upstream is None else name

    async def _refresh(self, service: str, ask: Callable[[], Awaitable[Sequence[ServedModel]]]) -> None:
        try:
            self._known[service] = await ask()
        except PlatformError as error:
            if not error.retryable and error.code is not Code.DEADLINE_EXCEEDED:
                raise
