"""How many tokens a request may use at most, before it has run.

A bound from the bytes of the text costs nothing and is some four times too high; the exact size asks the model's own
tokenizer. Neither is ever too low: no tokenizer here makes more tokens of a text than it has bytes.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from chassis.errors import PlatformError
from gateway.core.graph import GraphRequest, Sequenced, Upstream
from gateway.core.money import Bound
from gateway.core.services import Embedder, Generator, Prompt
from gateway.core.serving import Ask

UNKNOWN = 2**40  # more tokens than any model has room for
_LEAST_COMPLETION = 16  # an answer that would be cut shorter than this is refused
_TEMPLATE_TOKENS = 256  # what a chat template adds, to the whole and to each message
_MESSAGE_TOKENS = 32
_SPECIAL_TOKENS = 4  # that an encoder adds to an input
_TOKENIZE_TIMEOUT_S = 2.0
_CONTEXT_TTL_S = 60.0
_AWAY_TTL_S = 5.0


@dataclass(frozen=True, slots=True)
class Size:
    """Tokens that a request needs to be let in, and that it uses at most; between them its answers are cut.

    prompts: of each of the request's prompts. context_length: of the model; None where nobody knows it.
    """

    least: int
    most: int
    prompts: tuple[int, ...] = ()
    context_length: int | None = None
    is_exact: bool = True

    def bound(self) -> Bound:
        """What a budget has to hold for it."""
        num_prompt = min(sum(self.prompts), self.most)
        return Bound(num_prompt, self.most - num_prompt)


class Sizes:
    """Sizes requests. graphs: by name."""

    def __init__(
        self,
        graphs: Mapping[str, Sequenced],
        generator: Generator,
        embedder: Embedder,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._graphs = graphs
        self._generator = generator
        self._embedder = embedder
        self._clock = clock
        self._contexts: dict[str, tuple[float, int | None]] = {}  # until when it holds, and the length

    async def bound(self, ask: Ask) -> Size:
        """At least what the request may use, by its bytes."""
        if not ask.requests:
            most = sum(most_tokens(one) + _SPECIAL_TOKENS for one in ask.inputs)
            return Size(most, most, is_exact=False)
        prompts = tuple(most_tokens(request.prompt) for request in ask.requests)
        is_exact = all(isinstance(request.prompt, tuple) for request in ask.requests)
        return await self._graph_size(ask, prompts, is_exact=is_exact)

    async def exact(self, ask: Ask) -> Size:
        """What the request may use; the bound, where the tokenizer is away."""
        try:
            timeout_s = min(_TOKENIZE_TIMEOUT_S, ask.deadline.remaining_s())
            if not ask.requests:
                most = await self._count_inputs(ask.model, ask.inputs, timeout_s)
                return Size(most, most)
            if ask.prompt_tokens is None:  # counted once for all stages that need to know
                ask.prompt_tokens = tuple(
                    [await self._count_prompt(ask.model, one.prompt, timeout_s) for one in ask.requests]
                )
            prompts = ask.prompt_tokens
        except PlatformError:
            if not ask.requests:
                return await self.bound(ask)
            prompts = tuple(most_tokens(request.prompt) for request in ask.requests)
        return await self._graph_size(ask, prompts, is_exact=True)

    async def _count_prompt(self, model: str, prompt: Prompt, timeout_s: float) -> int:
        if isinstance(prompt, tuple):
            return len(prompt)
        if self._upstream(model) is not None:
            return most_tokens(prompt)  # its tokenizer is not here
        return (await self._generator.tokenize(self._model(model), prompt, timeout_s=timeout_s)).num_tokens

    async def _count_inputs(self, model: str, inputs: Sequence[str | tuple[int, ...]], timeout_s: float) -> int:
        texts = [one for one in inputs if isinstance(one, str)]
        counts = await self._embedder.count_tokens(model, texts, timeout_s=timeout_s) if texts else ()
        return sum(counts) + sum(len(one) + _SPECIAL_TOKENS for one in inputs if not isinstance(one, str))

    async def _graph_size(self, ask: Ask, prompts: tuple[int, ...], *, is_exact: bool) -> Size:
        graph, upstream = self._graphs.get(_base(ask.model)), self._upstream(ask.model)
        context = upstream.context_length if upstream else await self._context_length(self._model(ask.model))
        is_plain = graph is not None and graph.passes_prompt
        least, most = 0, 0
        for request, prompt in zip(ask.requests, prompts, strict=True):
            # An upstream's prompts are counted in bytes: how much context they leave is not known.
            is_counted = is_exact and upstream is None
            fewest, highest = _tokens(request, prompt, context, is_plain=is_plain, is_exact=is_counted)
            least, most = least + fewest, most + highest
        return Size(least if is_exact else most, most, prompts, None if upstream else context, is_exact)

    async def _context_length(self, model: str) -> int | None:
        until_s, length = self._contexts.get(model, (0.0, None))
        if until_s > self._clock():
            return length
        try:
            length = (await self._generator.tokenize(model, "?", timeout_s=_TOKENIZE_TIMEOUT_S)).context_length
            ttl_s = _CONTEXT_TTL_S
        except PlatformError:
            ttl_s = _AWAY_TTL_S  # the length that was known holds on
        self._contexts[model] = (self._clock() + ttl_s, length)
        return length

    def _model(self, name: str) -> str:
        graph = self._graphs.get(_base(name))
        return graph.model if graph else name

    def _upstream(self, name: str) -> Upstream | None:
        graph = self._graphs.get(_base(name))
        return graph.upstream if graph else None


def cut(requests: Sequence[GraphRequest], size: Size, tokens: int) -> tuple[GraphRequest, ...]:
    """The requests, answers that have no end of their own so short that all together use no more than tokens."""
    if tokens >= size.most:
        return tuple(requests)
    endless = [one for one in requests if one.stopping.max_tokens is None]
    taken = sum(size.prompts) + sum(one.n * (one.stopping.max_tokens or 0) for one in requests)
    share = (tokens - taken) // sum(one.n for one in endless)
    return tuple(
        replace(one, stopping=replace(one.stopping, max_tokens=max(1, min(share, _rest(size.context_length, prompt)))))
        if one.stopping.max_tokens is None
        else one
        for one, prompt in zip(requests, size.prompts, strict=True)
    )


def _tokens(
    request: GraphRequest, prompt: int, context: int | None, *, is_plain: bool, is_exact: bool
) -> tuple[int, int]:
    """Fewest and most tokens of one request."""
    n, wanted = request.n, request.stopping.max_tokens
    longest = UNKNOWN if context is None else context
    if not is_plain:
        # What a graph puts around the question the graph alone knows; all of it fits into the context.
        most = longest + (n - 1) * min(wanted or longest, longest)
        return most, most
    if wanted is not None:
        most = min(prompt + n * wanted, n * longest)
        return most, most
    rest = _rest(context, prompt)
    # A prompt that was counted too long leaves too little: the whole context is the bound then.
    most = prompt + n * rest if is_exact else n * longest
    return prompt + n * min(rest, _LEAST_COMPLETION), most


def _rest(context: int | None, prompt: int) -> int:
    return UNKNOWN if context is None else max(0, context - prompt)


def _base(model: str) -> str:
    return model.partition(":")[0]  # a tuned model has its base's tokenizer and context


def most_tokens(prompt: Prompt) -> int:
    """No fewer than the prompt has, whoever counts them."""
    match prompt:
        case tuple():
            return len(prompt)
        case str():
            return _num_bytes(prompt) + _SPECIAL_TOKENS
    said = (text for one in prompt.messages for text in (one.content, one.tool_calls_json, one.tool_call_id))
    return _TEMPLATE_TOKENS + _MESSAGE_TOKENS * len(prompt.messages) + sum(map(_num_bytes, (*said, prompt.tools_json)))


def _num_bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())
