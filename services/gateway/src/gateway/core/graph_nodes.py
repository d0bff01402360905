"""The nodes that a graph can be made of: encode, retrieve, generate."""

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from string import Template
from typing import ClassVar

from chassis.errors import Code, PlatformError
from gateway.core.graph import (
    Deadline,
    Found,
    GraphEvent,
    GraphRequest,
    Grounding,
    QueryVector,
    Value,
    ValueKind,
    question_of,
)
from gateway.core.services import (
    Chat,
    Completer,
    Delta,
    Done,
    Embedder,
    Finished,
    Generation,
    Generator,
    Message,
    Retriever,
    SearchQuery,
    Source,
    Started,
    Usage,
)

# Of a question, for retrieval only: more than an encoder reads and as much as the retriever takes. Whether the whole of
# it fits into the context is judged by the generator, in tokens.
_MAX_QUESTION_CHARS = 32_768


@dataclass(frozen=True, slots=True)
class Encode:
    """Turns the question into a vector. A question longer than the encoder reads is cut, for retrieval only."""

    takes: ClassVar[ValueKind] = ValueKind.REQUEST
    gives: ClassVar[ValueKind] = ValueKind.VECTOR

    id: str
    embedder: Embedder
    model: str

    async def call(self, value: Value, request: GraphRequest, deadline: Deadline) -> Value:
        """Embeds the last user turn."""
        question = question_of(request)
        embedded = await self.embedder.embed(
            self.model,
            [question[:_MAX_QUESTION_CHARS]],
            truncate=True,
            dimensions=0,
            timeout_s=deadline.remaining_s(),
        )
        return QueryVector(question, embedded.vectors[0])


@dataclass(frozen=True, slots=True)
class Retrieve:
    """Finds the chunks nearest to the question."""

    takes: ClassVar[ValueKind] = ValueKind.VECTOR
    gives: ClassVar[ValueKind] = ValueKind.SOURCES

    id: str
    retriever: Retriever
    collection: str
    top_k: int
    min_score: float

    async def call(self, value: Value, request: GraphRequest, deadline: Deadline) -> Value:
        """Searches the tenant's chunks."""
        assert isinstance(value, QueryVector)
        query = SearchQuery(
            tenant=request.tenant,
            text=value.question[:_MAX_QUESTION_CHARS],
            vector=value.vector,
            collection=request.collection or self.collection,
            top_k=self.top_k,
            min_score=self.min_score,
        )
        sources = await self.retriever.search(query, timeout_s=deadline.remaining_s())
        return Found(value.question, tuple(sources))


def _generation(model: str, request: GraphRequest) -> Generation:
    return Generation(
        model=model,
        prompt=request.prompt,
        tenant=request.tenant,
        sampling=request.sampling,
        stopping=request.stopping,
        n=request.n,
        logprobs=request.logprobs,
        prompt_logprobs=request.prompt_logprobs,
        grammar=request.grammar,
        adapter=request.adapter,
        priority=request.priority,
        usage_id=request.usage_id,
    )


@dataclass(frozen=True, slots=True)
class Generate:
    """Lets the model complete the prompt as it is; `temperature` and `top_p` hold where the client names neither."""

    takes: ClassVar[ValueKind] = ValueKind.REQUEST
    gives: ClassVar[ValueKind] = ValueKind.STREAM

    id: str
    generator: Completer
    model: str
    temperature: float | None = None
    top_p: float | None = None

    async def stream(self, value: Value, request: GraphRequest, deadline: Deadline) -> AsyncGenerator[GraphEvent]:
        """Passes the generator's events on."""
        sampling = request.sampling
        if sampling.temperature is None and sampling.top_p is None:
            sampling = replace(sampling, temperature=self.temperature, top_p=self.top_p)
        call = _generation(self.model, replace(request, sampling=sampling))
        async with aclosing(self.generator.generate(call, timeout_s=deadline.remaining_s())) as events:
            async for event in events:
                yield event


@dataclass(frozen=True, slots=True)
class Grounded:
    """How a grounded answer is asked for, and what is said when nothing was found.

    `template` holds $sources and $question, `source_template` holds $number, $title and $text.
    """

    system: str
    template: str
    source_template: str
    nothing_found: str
    max_tokens: int
    temperature: float | None
    frequency_penalty: float | None


@dataclass(frozen=True, slots=True)
class GenerateGrounded:
    """Lets the model answer from the sources that were found, or says honestly that there are none."""

    takes: ClassVar[ValueKind] = ValueKind.SOURCES
    gives: ClassVar[ValueKind] = ValueKind.STREAM

    id: str
    generator: Generator
    model: str
    how: Grounded

    async def stream(self, value: Value, request: GraphRequest, deadline: Deadline) -> AsyncGenerator[GraphEvent]:
        """Says first what the answer rests on, then streams it."""
        assert isinstance(value, Found)
        if not value.sources:
            for event in self._nothing_found(request.n):
                yield event
            return
        request = self._with_defaults(request)
        prompt, kept = await self._fitted(value, request, deadline)
        yield Grounding(grounded=True, sources=kept)
        call = replace(_generation(self.model, request), prompt=prompt)
        async with aclosing(self.generator.generate(call, timeout_s=deadline.remaining_s())) as events:
            async for event in events:
                yield event

    def _nothing_found(self, n: int) -> Sequence[GraphEvent]:
        # No token was computed by the generator, so none is accounted.
        choices = [
            event
            for index in range(n)
            for event in (Delta(index, self.how.nothing_found, num_tokens=0), Finished(index, "stop"))
        ]
        return [Grounding(grounded=False), Started(prompt_tokens=0, model_version=""), *choices, Done(Usage())]

    def _with_defaults(self, request: GraphRequest) -> GraphRequest:
        sampling, stopping = request.sampling, request.stopping
        if sampling.temperature is None:
            sampling = replace(sampling, temperature=self.how.temperature)
        if sampling.frequency_penalty is None:
            sampling = replace(sampling, frequency_penalty=self.how.frequency_penalty)
        if stopping.max_tokens is None:
            stopping = replace(stopping, max_tokens=self.how.max_tokens)
        return replace(request, sampling=sampling, stopping=stopping)

    async def _fitted(self, found: Found, request: GraphRequest, deadline: Deadline) -> tuple[Chat, tuple[Source, ...]]:
        """Drops the least relevant sources until prompt and completion fit into the context."""
        max_tokens = request.stopping.max_tokens
        assert max_tokens is not None
        for num_sources in range(len(found.sources), 0, -1):
            kept = found.sources[:num_sources]
            chat = self._chat(found.question, kept, request)
            size = await self.generator.tokenize(self.model, chat, timeout_s=deadline.remaining_s())
            if size.num_tokens + max_tokens <= size.context_length:
                return chat, kept
        raise PlatformError(
            Code.OUT_OF_RANGE,
            f"the conversation with its best source takes {size.num_tokens} tokens and the completion up to "
            f"{max_tokens}, but the model's context is {size.context_length} tokens",
            param="messages" if size.num_tokens + self.how.max_tokens > size.context_length else "max_tokens",
            reason="context_length_exceeded",
        )

    def _chat(self, question: str, sources: Sequence[Source], request: GraphRequest) -> Chat:
        assert isinstance(request.prompt, Chat)
        turns = request.prompt.messages
        last_user = max(i for i, turn in enumerate(turns) if turn.role == "user" and turn.content == question)
        system = [self.how.system, *(turn.content for turn in turns if turn.role == "system")]
        shown = "\n\n".join(
            Template(self.how.source_template).substitute(number=i, title=source.title, text=source.text)
            for i, source in enumerate(sources, start=1)
        )
        asked = Template(self.how.template).substitute(sources=shown, question=question)
        instruction = "\n\n".join(text for text in system if text)
        messages = [Message("system", instruction)] if instruction else []
        for i, turn in enumerate(turns):
            if turn.role != "system":
                messages.append(Message("user", asked) if i == last_user else turn)
        return Chat(tuple(messages), request.prompt.tools_json)
