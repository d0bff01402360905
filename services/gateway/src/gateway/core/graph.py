"""The inference graph: walks a request through its nodes and streams what the last one gives.

One building block so far: the sequence, where each node gets what the one before it gave. A node says which kind of
value it takes and gives, so that a wrong order is refused when the graph is put together and not by a request.
Knows nothing of HTTP, gRPC or files.
"""

import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import AbstractContextManager, aclosing
from dataclasses import dataclass, field
from enum import StrEnum
from typing import ClassVar, Protocol, TypeVar

from chassis.errors import Code, PlatformError
from gateway.core.money import Price
from gateway.core.services import (
    Abandoned,
    Chat,
    Finished,
    GenerationEvent,
    Grammar,
    Prompt,
    Sampling,
    Source,
    Started,
    Stopping,
    ToolCalls,
)


class GraphError(ValueError):
    """A graph's declaration is wrong; the message says where."""


@dataclass(frozen=True, slots=True)
class Deadline:
    """The moment, on the monotonic clock, after which nobody waits for the answer."""

    at_s: float

    @staticmethod
    def after(timeout_s: float) -> "Deadline":
        """The deadline that far from now."""
        return Deadline(time.monotonic() + timeout_s)

    @property
    def is_over(self) -> bool:
        """No time is left."""
        return time.monotonic() >= self.at_s

    def remaining_s(self) -> float:
        """Seconds that are left; raises DEADLINE_EXCEEDED when there are none."""
        left_s = self.at_s - time.monotonic()
        if left_s <= 0:
            raise PlatformError(Code.DEADLINE_EXCEEDED, "the request took longer than the server allows")
        return left_s


@dataclass(frozen=True, slots=True)
class GraphRequest:
    """What a client asks of a graph."""

    prompt: Prompt
    tenant: str
    sampling: Sampling = field(default_factory=Sampling)
    stopping: Stopping = field(default_factory=Stopping)
    n: int = 1
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    grammar: Grammar | ToolCalls | None = None
    collection: str | None = None  # None: the one that the graph declares
    adapter: str = ""  # the adapter that its model answers through, where the graph is a plain one
    priority: int = 0  # scheduling class in the generator: higher runs first
    usage_id: str = ""  # what the generator accounts it under; Serving fills it in


@dataclass(frozen=True, slots=True)
class Grounding:
    """Whether the answer rests on documents, and on which; comes before the first text."""

    grounded: bool
    sources: tuple[Source, ...] = ()


@dataclass(frozen=True, slots=True)
class Answering:
    """Another model than the one that was asked answers, a fallback; comes before everything else."""

    model: str


GraphEvent = GenerationEvent | Grounding | Answering


def cut_off(finished: Finished) -> PlatformError | None:
    """The error for a completion that the engine did not end by itself."""
    match finished.reason:
        case "deadline":
            return PlatformError(Code.DEADLINE_EXCEEDED, "the request took longer than the server allows")
        case "cancelled":
            return PlatformError(Code.UNAVAILABLE, "the generator cancelled the request", retry_after_s=1.0)
    return None


Event = TypeVar("Event", bound=GraphEvent)


async def until_first_token(events: AsyncIterator[Event], on_first: Callable[[], None] = lambda: None) -> list[Event]:
    """The first events, up to the first that tells what the model says: until then another may answer as well.

    `on_first` is called at the very first. Raises PlatformError, also for what the engine cut off before it said
    anything.
    """
    first: list[Event] = []
    async for event in events:
        if not first:
            on_first()
        first.append(event)
        if isinstance(event, Finished) and (error := cut_off(event)) is not None:
            raise error
        if not isinstance(event, Started | Grounding | Answering | Abandoned):
            break
    return first


class ValueKind(StrEnum):
    """What passes from node to node."""

    REQUEST = "request"  # the request itself: what the first node gets
    VECTOR = "vector"  # the question and its vector
    SOURCES = "sources"  # the question and what was found for it
    STREAM = "stream"  # the events of the answer


@dataclass(frozen=True, slots=True)
class QueryVector:
    """The question and its vector."""

    question: str
    vector: Sequence[float]


@dataclass(frozen=True, slots=True)
class Found:
    """The question and the chunks that were found for it, best first."""

    question: str
    sources: tuple[Source, ...]


Value = None | QueryVector | Found
"""None stands for the request, which every node can see."""


class Node(Protocol):
    """What every node of a graph has."""

    takes: ClassVar[ValueKind]  # what it needs from the node before it
    gives: ClassVar[ValueKind]  # what it hands on

    @property
    def id(self) -> str:
        """Its name within the graph."""
        ...


class Step(Node, Protocol):
    """A node that answers once."""

    async def call(self, value: Value, request: GraphRequest, deadline: Deadline) -> Value:
        """Does its part; raises PlatformError."""
        ...


class Answer(Node, Protocol):
    """The node that ends a graph and streams."""

    def stream(self, value: Value, request: GraphRequest, deadline: Deadline) -> AsyncGenerator[GraphEvent]:
        """Streams the answer's events, Done last; raises PlatformError; closing it stops the work."""
        ...


@dataclass(frozen=True, slots=True)
class Fallbacks:
    """The graphs that answer, in this order, where another one is away, too busy, or too slow to begin."""

    graphs: tuple[str, ...] = ()
    first_token_s: float | None = None  # seconds to the first token; None: as many as the request has


class Graph(Protocol):
    """What a request can name as its model."""

    @property
    def name(self) -> str:
        """As requests name it."""
        ...

    @property
    def model(self) -> str:
        """The generator's model that answers in the end."""
        ...

    @property
    def identity(self) -> str | None:
        """What its answers depend on beside the request and the model's version; None where that changes silently."""
        ...

    @property
    def uses_generator(self) -> bool:
        """Its tokens are the generator's, which keeps a book of them."""
        ...

    @property
    def fallbacks(self) -> Fallbacks:
        """What answers where it cannot."""
        ...

    def run(self, request: GraphRequest, deadline: Deadline) -> AsyncGenerator[GraphEvent]:
        """Streams the answer; the caller closes it (contextlib.aclosing) in the task that iterates it."""
        ...


SpanFactory = Callable[[str], AbstractContextManager[object]]


@dataclass(frozen=True, slots=True)
class Upstream:
    """What its declaration tells of a server elsewhere that answers a graph."""

    context_length: int  # of prompt and completion together, in tokens
    price: Price | None = None


class Sequenced:
    """A graph whose nodes run one after the other."""

    def __init__(
        self,
        name: str,
        description: str,
        steps: Sequence[Step],
        answer: Answer,
        span: SpanFactory,
        model: str,
        fallbacks: Fallbacks = Fallbacks(),
        declared: str = "",
        upstream: Upstream | None = None,
    ) -> None:
        self.name = name
        self.fallbacks = fallbacks
        self.description = description
        self.model = model  # that answers in the end: the generator's, or the upstream's
        self.upstream = upstream  # None: the generator answers
        self._steps = tuple(steps)
        self._answer = answer
        self._span = span
        self._declared = declared  # the whole declaration

    @property
    def identity(self) -> str | None:
        """Its declaration; None with steps, which read documents that come and go."""
        return None if self._steps else f"{self.name} {self._declared}"

    @property
    def uses_generator(self) -> bool:
        """See Graph.uses_generator."""
        return self.upstream is None

    @property
    def is_plain(self) -> bool:
        """It is a model of the generator under its own name and nothing else: what adapters can be made for."""
        return self.passes_prompt and self.upstream is None and self.name == self.model

    @property
    def passes_prompt(self) -> bool:
        """Its model reads the prompt as the client sent it."""
        return not self._steps

    async def run(self, request: GraphRequest, deadline: Deadline) -> AsyncGenerator[GraphEvent]:
        """Walks the graph; the caller closes it (contextlib.aclosing) in the task that iterates it."""
        value: Value = None
        for step in self._steps:
            with self._span(f"graph.{step.id}"):
                value = await step.call(value, request, deadline)
        with self._span(f"graph.{self._answer.id}"):
            async with aclosing(self._answer.stream(value, request, deadline)) as events:
                async for event in events:
                    yield event


def check_sequence(nodes: Sequence[tuple[str, type[Node]]]) -> None:
    """Raises GraphError unless every node, given as id and class, gets what it takes and the last one streams."""
    given = ValueKind.REQUEST
    for node_id, node in nodes:
        if node.takes is not given:
            raise GraphError(f"the node {node_id!r} takes {node.takes}, but gets {given}")
        given = node.gives
    if given is not ValueKind.STREAM:
        raise GraphError(f"the last node gives {given}: it must be one that streams an answer")


def question_of(request: GraphRequest) -> str:
    """The text of the last user turn; raises INVALID_ARGUMENT where there is none."""
    if not isinstance(request.prompt, Chat):
        raise PlatformError(
            Code.INVALID_ARGUMENT,
            "this model answers chats only: use /v1/chat/completions",
            param="model",
            reason="model_not_supported",
        )
    for message in reversed(request.prompt.messages):
        if message.role == "user" and message.content.strip():
            return message.content
    raise PlatformError(
        Code.INVALID_ARGUMENT, "this model needs a user message with text", param="messages", reason="invalid_value"
    )
