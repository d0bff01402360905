"""How many tokens a request may use at most, before it has run.

A bound from the bytes of the text costs nothing and is some four times too high; the exact size asks the model's own
tokenizer. Neither is ever too low: no tokenizer here makes more tokens of a text than it has bytes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from chassis.errors import PlatformError
from gateway.core.graph import GraphRequest
from gateway.core.prompts import PromptCounter
from gateway.core.services import Embedder, Prompt
from gateway.core.serving import Ask

UNKNOWN = 2**40  # more tokens than any model has room for
_LEAST_COMPLETION = 16  # an answer that would be cut shorter than this is refused
_TEMPLATE_TOKENS = 256  # what a chat template adds, to the whole and to each message
_MESSAGE_TOKENS = 32
_SPECIAL_TOKENS = 4  # that an encoder adds to an input


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


class TokenBounds:
    """Sizes requests."""

    def __init__(self, prompts: PromptCounter, embedder: Embedder) -> None:
        self._prompts = prompts
        self._embedder = embedder

    async def rough(self, ask: Ask) -> Size:
        """At least what the request may use, by its bytes."""
        prompts = tuple(_most_tokens(request.prompt) for request in ask.requests)
        if not ask.requests:
            most = sum(_most_tokens(one) + _SPECIAL_TOKENS for one in ask.inputs)
            return Size(most, most, is_exact=False)
        return await self._size(ask, prompts, is_exact=all(isinstance(one.prompt, tuple) for one in ask.requests))

    async def exact(self, ask: Ask) -> Size:
        """What the request may use; by its bytes, where the tokenizer is away."""
        try:
            if not ask.requests:
                most = await self._count_inputs(ask)
                return Size(most, most)
            prompts = await self._prompts.count(ask)
        except PlatformError:
            if not ask.requests:
                return await self.rough(ask)
            prompts = tuple(_most_tokens(request.prompt) for request in ask.requests)
        return await self._size(ask, prompts, is_exact=True)

    async def _count_inputs(self, ask: Ask) -> int:
        texts = [one for one in ask.inputs if isinstance(one, str)]
        ids = [one for one in ask.inputs if not isinstance(one, str)]
        counts = await self._embedder.count_tokens(ask.model, texts, timeout_s=ask.deadline.remaining_s())
        return sum(counts) + sum(len(one) + _SPECIAL_TOKENS for one in ids)

    async def _size(self, ask: Ask, prompts: tuple[int, ...], *, is_exact: bool) -> Size:
        _, is_plain = await self._prompts.model_behind(ask)
        try:
            context: int | None = await self._prompts.context_length(ask)
        except PlatformError:
            context = None
        least, most = 0, 0
        for request, prompt in zip(ask.requests, prompts, strict=True):
            fewest, highest = _tokens(request, prompt, context, is_plain=is_plain, is_exact=is_exact)
            least, most = least + fewest, most + highest
        return Size(least if is_exact else most, most, prompts, context, is_exact)


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


def _most_tokens(prompt: Prompt) -> int:
    match prompt:
        case tuple():
            return len(prompt)
        case str():
            return _num_bytes(prompt) + _SPECIAL_TOKENS
    said = (text for one in prompt.messages for text in (one.content, one.tool_calls_json, one.tool_call_id))
    return _TEMPLATE_TOKENS + _MESSAGE_TOKENS * len(prompt.messages) + sum(map(_num_bytes, (*said, prompt.tools_json)))


def _num_bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())
