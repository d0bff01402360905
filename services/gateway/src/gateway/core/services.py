"""The services that the nodes of a graph call, as small protocols with their own types.

Knows neither gRPC nor HTTP. The clients live in backends/, and tests put fakes in their place.
"""

from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a chat."""

    role: str  # "system", "user", "assistant" or "tool"
    content: str
    tool_calls_json: str = ""
    tool_call_id: str = ""


@dataclass(frozen=True, slots=True)
class Chat:
    """A prompt that the model's own template renders."""

    messages: tuple[Message, ...]
    tools_json: str = ""


Prompt = Chat | str | tuple[int, ...]
"""What to complete: a chat, plain text, or token ids."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to sample; None takes the engine's default."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int = 0
    min_p: float = 0.0
    frequency_penalty: float | None = None
    presence_penalty: float = 0.0
    repetition_penalty: float | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None


@dataclass(frozen=True, slots=True)
class Stopping:
    """When to stop; max_tokens None is up to the end of the context."""

    max_tokens: int | None = None
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Grammar:
    """A constraint on the output.

    kind is "json_object", "json_schema" (the source is its JSON text), "regex", "choice" (a JSON list of strings) or
    "ebnf".
    """

    kind: str
    source: str = ""
    is_strict: bool = True  # False: the client is content with a best effort; the generator keeps to it all the same


@dataclass(frozen=True, slots=True)
class ToolCalls:
    """The output is calls of these tools, or text where they are not required; see core.tool_calls."""

    tools_json: str
    is_required: bool
    is_parallel: bool
    json_schema: str = ""  # what the text keeps to; empty for free text


@dataclass(frozen=True, slots=True)
class Generation:
    """One call of the generator."""

    model: str
    prompt: Prompt
    tenant: str
    sampling: Sampling = field(default_factory=Sampling)
    stopping: Stopping = field(default_factory=Stopping)
    n: int = 1
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    grammar: Grammar | ToolCalls | None = None
    adapter: str = ""  # answers through it; empty: the model itself
    priority: int = 0  # higher runs first
    usage_id: str = ""  # what it is accounted under; several calls may share one


@dataclass(frozen=True, slots=True)
class TopLogprob:
    """An alternative token."""

    token_id: int
    logprob: float
    text: str
    token_bytes: bytes


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token's log probability; NaN where it has none."""

    token_id: int
    logprob: float
    text: str
    token_bytes: bytes
    top: tuple[TopLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts, exact unless they are an estimate: of an upstream that told none."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    is_estimate: bool = False

    def __add__(self, other: "Usage") -> "Usage":
        return Usage(
            self.prompt_tokens + other.prompt_tokens,
            self.completion_tokens + other.completion_tokens,
            self.cached_tokens + other.cached_tokens,
            self.is_estimate or other.is_estimate,
        )


@dataclass(frozen=True, slots=True)
class Started:
    """A prompt was admitted and is known; comes before its first Delta."""

    prompt_tokens: int
    model_version: str
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    prompt_index: int = 0  # which prompt, where a request has several
    is_estimate: bool = False  # of prompt_tokens


@dataclass(frozen=True, slots=True)
class Delta:
    """New text of the completion with this index, and the tokens that it covers; text may lag behind them."""

    index: int
    text: str
    num_tokens: int
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class ToolCallDelta:
    """A piece of a tool call, from an upstream that tells calls apart from text; its first piece has id and name."""

    index: int  # of the completion
    number: int  # of the call within it, from 0
    arguments: str  # a piece of their JSON text
    num_tokens: int
    call_id: str = ""
    name: str = ""


@dataclass(frozen=True, slots=True)
class Finished:
    """One completion ended: "stop", "length", "cancelled" or "deadline"; an upstream also has "tool_calls" and
    "content_filter"."""

    index: int
    reason: str
    stop_match: str = ""  # the stop string, or the text of the stop token, that ended it


@dataclass(frozen=True, slots=True)
class Done:
    """All completions ended; always the last event of a generation that was not cut off."""

    usage: Usage


@dataclass(frozen=True, slots=True)
class Abandoned:
    """A call was given up before its first token and another takes its place: what that one used is not in Done."""


GenerationEvent = Started | Delta | ToolCallDelta | Finished | Done | Abandoned


@dataclass(frozen=True, slots=True)
class Tokenized:
    """A tokenized prompt."""

    num_tokens: int
    context_length: int


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A model or adapter that a service answers for."""

    id: str
    created_unix_s: int
    base: str = ""  # the model that an adapter belongs to; empty or its own id for a model
    version: str = ""  # as Started says it; empty where it has none

    @property
    def is_adapter(self) -> bool:
        """It is an adapter of another model."""
        return self.base not in ("", self.id)


@dataclass(frozen=True, slots=True)
class Embedded:
    """Vectors in the order of the inputs, and the tokens that were read."""

    vectors: tuple[Sequence[float], ...]
    num_tokens: int


@dataclass(frozen=True, slots=True)
class SearchQuery:
    """A search by vector, confined to a tenant."""

    tenant: str
    text: str
    vector: Sequence[float]
    collection: str
    top_k: int
    min_score: float | None


@dataclass(frozen=True, slots=True)
class Source:
    """A chunk that was found."""

    document_id: str
    external_id: str
    chunk_id: str
    title: str
    text: str
    score: float


class Completer(Protocol):
    """What completes prompts: the LLM engine, or a server elsewhere."""

    def generate(self, call: Generation, *, timeout_s: float) -> AsyncGenerator[GenerationEvent]:
        """Streams Started, then Deltas and Finished, then Done; closing or cancelling it stops the decoding.

        Raises PlatformError, and DEADLINE_EXCEEDED after timeout_s.
        """
        ...


class Generator(Completer, Protocol):
    """The LLM engine. Every method raises PlatformError, and DEADLINE_EXCEEDED after timeout_s."""

    async def tokenize(self, model: str, prompt: Chat | str, *, timeout_s: float) -> Tokenized:
        """Counts the tokens of a prompt."""
        ...

    async def list_models(self, *, timeout_s: float) -> Sequence[ServedModel]:
        """What is served."""
        ...


class Embedder(Protocol):
    """The encoder. Every method raises PlatformError, and DEADLINE_EXCEEDED after timeout_s."""

    async def embed(
        self,
        model: str,
        inputs: Sequence[str] | Sequence[Sequence[int]],
        *,
        truncate: bool,
        dimensions: int,
        timeout_s: float,
    ) -> Embedded:
        """Embeds texts or token lists; OUT_OF_RANGE with the numbers where one is too long and truncate is False."""
        ...

    async def count_tokens(self, model: str, texts: Sequence[str], *, timeout_s: float) -> Sequence[int]:
        """Counts the tokens of each text, special ones included."""
        ...

    async def list_models(self, *, timeout_s: float) -> Sequence[ServedModel]:
        """What is served."""
        ...


class Retriever(Protocol):
    """The document search."""

    async def search(self, query: SearchQuery, *, timeout_s: float) -> Sequence[Source]:
        """The best chunks, best first; raises PlatformError."""
        ...
