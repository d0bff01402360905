"""The one way to a model: whatever asks one passes here, over whichever API it came.

So that permission, limits, money and a place in the queue are judged once and for all routes alike. Knows neither HTTP
nor gRPC, and nothing of what the stages do.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, aclosing, asynccontextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

from chassis.errors import Code, PlatformError
from gateway.core.account import HEADER_MODEL, Account
from gateway.core.catalog import Catalog
from gateway.core.fanout import merged
from gateway.core.graph import Answering, Deadline, Graph, GraphEvent, GraphRequest, until_first_token
from gateway.core.ports import Principal
from gateway.core.repeats import Repeats
from gateway.core.services import Chat, Tokenized

_ANOTHER_MAY_ANSWER = (Code.UNAVAILABLE, Code.OVERLOADED, Code.DEADLINE_EXCEEDED)


@dataclass(slots=True)
class Ask:
    """One request to a model: who asks what, until when. It has requests for a graph, or inputs for an encoder.

    A stage may narrow the requests: where a limit has fewer tokens left than the answer could have.
    """

    principal: Principal
    account: Account
    deadline: Deadline
    model: str  # the graph or the encoder that answers
    requests: tuple[GraphRequest, ...] = ()  # one for each prompt
    inputs: tuple[str | tuple[int, ...], ...] = ()  # what an encoder reads: texts or token ids
    prompt_tokens: tuple[int, ...] | None = None  # of each request, once a stage has counted them

    @property
    def priority(self) -> int:
        """Its class: the sender's, or the background's that a job asks for."""
        lowered = [request.priority for request in self.requests if request.priority < 0]
        return min([self.principal.policy.priority, self.principal.tenant_policy.priority, *lowered])


class Stage(Protocol):
    """What a request holds while its model works: a reservation, a record, a place in a queue."""

    def hold(self, ask: Ask) -> AbstractAsyncContextManager[None]:
        """Takes hold or raises PlatformError; lets go at the end, however it came. ask.account knows what was used."""
        ...


class NoStage:
    """Holds nothing."""

    def hold(self, ask: Ask) -> AbstractAsyncContextManager[None]:
        """Lets everything through."""
        return nullcontext()


class Serving:
    """Leads requests through the stages, in their order, to the model or to the first fallback that answers.

    What repeats another request goes past all of it, where `repeats` can answer it.
    """

    def __init__(
        self,
        catalog: Catalog,
        stages: Sequence[Stage] = (),
        admission: Stage = NoStage(),
        on_fallback: Callable[[str, str], None] = lambda asked, answers: None,
        repeats: Repeats | None = None,
    ) -> None:
        """`admission` comes last, for each model that is tried; `on_fallback` is told who answers for whom."""
        self._catalog = catalog
        self._stages = tuple(stages)
        self._admission = admission
        self._on_fallback = on_fallback
        self._repeats = repeats or Repeats(catalog)

    async def graph(self, principal: Principal, name: str) -> Graph:
        """What answers under that name for the sender; raises PERMISSION_DENIED and NOT_FOUND."""
        self.permit(principal, name)
        return await self._catalog.graph(name, principal.tenant)

    async def tokenize(self, graph: Graph, prompt: Chat | str, deadline: Deadline) -> Tokenized:
        """How many tokens a prompt is to the graph's model, without running it; raises PlatformError."""
        return await self._catalog.tokenize(graph, prompt, deadline)

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
        async with self._held(ask), self._admission.hold(ask):
            yield

    def run(self, ask: Ask, graph: Graph) -> AsyncGenerator[GraphEvent]:
        """Streams the graph's events and keeps the account; the caller closes it in the task that iterates it.

        Raises PERMISSION_DENIED at once.
        """
        self.permit(ask.principal, ask.model)
        return self._repeats.run(ask, graph, partial(self._fresh, ask, graph))

    async def _fresh(self, ask: Ask, graph: Graph, is_asked: Callable[[bool], None]) -> AsyncGenerator[GraphEvent]:
        """`is_asked` is called before a model is: True where the stages have left the requests as they were."""
        wanted = ask.requests
        async with (
            self._held(ask),
            aclosing(self._answer(ask, graph, lambda: is_asked(ask.requests == wanted))) as events,
        ):
            async for event in events:
                ask.account.take(event)
                yield event

    @asynccontextmanager
    async def _held(self, ask: Ask) -> AsyncIterator[None]:
        async with AsyncExitStack() as held:
            for stage in self._stages:
                await held.enter_async_context(stage.hold(ask))
            yield

    async def _answer(self, ask: Ask, asked: Graph, on_asked: Callable[[], None]) -> AsyncGenerator[GraphEvent]:
        """The events of the graph, or of the first of its fallbacks that comes to a token."""
        chain = [asked, *await self._fallbacks(ask, asked)]
        first_error: PlatformError | None = None
        for graph in chain:
            most_s = None if graph is chain[-1] else asked.fallbacks.first_token_s
            async with aclosing(self._admitted(replace(ask, model=graph.name), graph, on_asked)) as events:
                try:
                    # Nothing is held back where nobody else could answer anyway.
                    first = [] if graph is asked is chain[-1] else await _first_events(events, most_s)
                except PlatformError as error:
                    first_error = first_error or error
                    if first_error.code not in _ANOTHER_MAY_ANSWER or ask.deadline.is_over or graph is chain[-1]:
                        raise first_error from None
                    ask.account.left_a_call()
                    continue
                ask.account.answer_headers[HEADER_MODEL] = graph.name
                if graph is not asked:
                    self._on_fallback(asked.name, graph.name)
                    yield Answering(graph.name)
                for event in first:
                    yield event
                async for event in events:
                    yield event
                return

    async def _fallbacks(self, ask: Ask, asked: Graph) -> list[Graph]:
        """Those that this sender may use."""
        graphs: list[Graph] = []
        for name in asked.fallbacks.graphs:
            with suppress(PlatformError):
                graphs.append(await self.graph(ask.principal, name))
        return graphs

    async def _admitted(self, ask: Ask, graph: Graph, on_asked: Callable[[], None]) -> AsyncGenerator[GraphEvent]:
        async with self._admission.hold(ask), aclosing(_events(ask, graph)) as events:
            on_asked()
            async for event in events:
                yield event


async def _first_events(events: AsyncGenerator[GraphEvent], most_s: float | None) -> list[GraphEvent]:
    try:
        async with asyncio.timeout(most_s):
            return await until_first_token(events)
    except TimeoutError:
        raise PlatformError(Code.DEADLINE_EXCEEDED, f"no token came within {most_s:g} s") from None


def _events(ask: Ask, graph: Graph) -> AsyncGenerator[GraphEvent]:
    # The generator puts the classes in the same order as admission did.
    account, priority = ask.account, ask.priority
    account.asks_generator(graph.uses_generator)
    requests = [replace(request, priority=priority, usage_id=account.usage_id) for request in ask.requests]
    if len(requests) == 1:
        return graph.run(requests[0], ask.deadline)
    return merged([partial(graph.run, request, ask.deadline) for request in requests], requests[0].n)
