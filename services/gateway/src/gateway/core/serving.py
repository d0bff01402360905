"""The one way to a model: whatever asks one passes here, over whichever API it came.

So that permission, limits, money and a place in the queue are judged once and for all routes alike. Knows neither HTTP
nor gRPC, and nothing of what the stages do.
"""

from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

from chassis.errors import Code, PlatformError
from gateway.core.account import Account
from gateway.core.catalog import Catalog
from gateway.core.fanout import merged
from gateway.core.graph import Deadline, Graph, GraphEvent, GraphRequest
from gateway.core.ports import Principal
from gateway.core.services import Chat


@dataclass(frozen=True, slots=True)
class Ask:
    """One request to a model: who asks what, until when. It has requests for a graph, or inputs for an encoder."""

    principal: Principal
    account: Account
    deadline: Deadline
    model: str  # the graph or the encoder that answers
    requests: tuple[GraphRequest, ...] = ()  # one for each prompt
    inputs: tuple[str | tuple[int, ...], ...] = ()  # what an encoder reads: texts or token ids


class Stage(Protocol):
    """What a request holds while its model works: a reservation, a record, a place in a queue."""

    def hold(self, ask: Ask) -> AbstractAsyncContextManager[None]:
        """Takes hold or raises PlatformError; lets go at the end, however it came. ask.account knows what was used."""
        ...


class Serving:
    """Leads requests through the stages, in their order, to the model."""

    def __init__(self, catalog: Catalog, stages: Sequence[Stage] = ()) -> None:
        self._catalog = catalog
        self._stages = tuple(stages)

    async def graph(self, principal: Principal, name: str) -> Graph:
        """What answers under that name for the sender; raises PERMISSION_DENIED and NOT_FOUND."""
        self.permit(principal, name)
        return await self._catalog.graph(name, principal.tenant)

    async def count_tokens(self, graph: Graph, chat: Chat, deadline: Deadline) -> int:
        """How many tokens a chat is to the graph's model, without running it."""
        return await self._catalog.count_tokens(graph, chat, deadline)

    @staticmethod
    def permit(principal: Principal, model: str) -> None:
        """Raises PERMISSION_DENIED where key or tenant do not allow the model, whether it exists or not."""
        if not principal.may_ask(model):
            raise PlatformError(
                Code.PERMISSION_DENIED,
                f"this key may not use the model {model[:200]!r}; GET /v1/models lists those that it may",
                param="model",
                reason="model_not_allowed",
            )

    @asynccontextmanager
    async def hold(self, ask: Ask) -> AsyncIterator[None]:
        """Holds every stage; raises what a stage raises, and PERMISSION_DENIED. For what is no graph: the encoders."""
        self.permit(ask.principal, ask.model)
        async with AsyncExitStack() as held:
            for stage in self._stages:
                await held.enter_async_context(stage.hold(ask))
            yield

    async def run(self, ask: Ask, graph: Graph) -> AsyncGenerator[GraphEvent]:
        """Streams the graph's events and keeps the account; the caller closes it in the task that iterates it."""
        async with self.hold(ask), aclosing(_events(ask, graph)) as events:
            async for event in events:
                ask.account.take(event)
                yield event


def _events(ask: Ask, graph: Graph) -> AsyncGenerator[GraphEvent]:
    requests = [replace(request, usage_id=ask.account.usage_id) for request in ask.requests]
    if len(requests) == 1:
        return graph.run(requests[0], ask.deadline)
    return merged([partial(graph.run, request, ask.deadline) for request in requests], requests[0].n)
