"""Turns texts into chunks that the encoder reads whole: cuts by its tokens, then lets it count each chunk again.

The second count is what makes the promise: a slice may tokenize otherwise than it did within its text, for example
where a break fell inside a word, and what comes out too long is cut again.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Sequence

from chassis.errors import Code, PlatformError
from retriever.core.chunking import (
    ChunkingPolicy,
    Span,
    TokenPlaces,
    chunk_spans,
    joined_places,
    split_for_tokenizer,
)
from retriever.core.ports import Tokenized

Tokenize = Callable[[Sequence[str]], Awaitable[Tokenized]]

# One call to the tokenizer carries at most about this much: four million tokens' places would fill a gRPC message.
_PIECE_CHARS = 100_000
_CALL_CHARS = 400_000
_CALL_TEXTS = 256
# Each round cuts what is still too long at three quarters of the length.
_MAX_ROUNDS = 12


class Chunker:
    """Cuts texts by a policy and by what the encoder says that it reads."""

    def __init__(self, policy: ChunkingPolicy) -> None:
        self._policy = policy

    async def chunk(self, texts: Sequence[str], tokenize: Tokenize) -> list[list[str]]:
        """Returns each text's chunks, in order; none for a text of white space."""
        counter = _Counter(tokenize)
        pieces = [split_for_tokenizer(text, _PIECE_CHARS) for text in texts]
        slices = [text[s.start : s.end] for text, spans in zip(texts, pieces, strict=True) for s in spans]
        places = iter(await counter.tokenize(slices))
        if not counter.max_tokens:  # nothing but white space
            return [[] for _ in texts]
        policy = self._policy.capped(counter.max_tokens, counter.num_special_tokens)
        chunks: list[list[str]] = []
        for text, spans in zip(texts, pieces, strict=True):
            tokens = joined_places(spans, [next(places) for _ in spans])
            # In a thread: a long text takes seconds, and the worker's heartbeats share the loop.
            chunks.append(await asyncio.to_thread(_cut, text, tokens, policy))
        await self._verify(chunks, counter, policy)
        return chunks

    async def _verify(self, chunks: list[list[str]], counter: "_Counter", policy: ChunkingPolicy) -> None:
        """Cuts again, in place, until the encoder itself counts no chunk above the limit."""
        limit = policy.chunk_tokens
        smaller = limit
        suspects = [(row, column) for row, texts in enumerate(chunks) for column in range(len(texts))]
        for _ in range(_MAX_ROUNDS):
            places = await counter.tokenize([chunks[row][column] for row, column in suspects])
            long = [(*at, tokens) for at, tokens in zip(suspects, places, strict=True) if len(tokens) > limit]
            if not long:
                return
            smaller = max(1, smaller * 3 // 4)
            suspects = []
            for row, column, tokens in reversed(long):  # from the back, so that columns stay true
                texts = chunks[row]
                parts = _cut(texts[column], tokens, ChunkingPolicy(smaller, 0))
                texts[column : column + 1] = parts
                suspects = [(r, c + len(parts) - 1) if r == row else (r, c) for r, c in suspects]
                suspects.extend((row, column + offset) for offset in range(len(parts)))
        raise PlatformError(Code.INTERNAL, f"a text could not be cut into chunks of {limit} tokens")


def _cut(text: str, tokens: TokenPlaces, policy: ChunkingPolicy) -> list[str]:
    return [text[span.start : span.end] for span in chunk_spans(text, tokens, policy)]


class _Counter:
    """Tokenizes any number of texts, in calls of bounded size."""

    def __init__(self, tokenize: Tokenize) -> None:
        self._tokenize = tokenize
        self.max_tokens = 0
        self.num_special_tokens = 0

    async def tokenize(self, texts: Sequence[str]) -> list[TokenPlaces]:
        # A blank text has no tokens, and the embedder refuses it as an input.
        worth = [text for text in texts if text.strip()]
        found: list[TokenPlaces] = []
        for batch in _batches(worth):
            tokenized = await self._tokenize(worth[batch.start : batch.end])
            self.max_tokens = tokenized.max_tokens
            self.num_special_tokens = tokenized.num_special_tokens
            found.extend(tokenized.places)
        places = iter(found)
        return [next(places) if text.strip() else TokenPlaces((), ()) for text in texts]


def _batches(texts: Sequence[str]) -> Iterator[Span]:
    start = num_chars = 0
    for index, text in enumerate(texts):
        if index > start and (num_chars + len(text) > _CALL_CHARS or index - start >= _CALL_TEXTS):
            yield Span(start, index)
            start, num_chars = index, 0
        num_chars += len(text)
    if start < len(texts):
        yield Span(start, len(texts))
