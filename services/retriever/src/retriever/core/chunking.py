"""Cuts a text into chunks by the encoder's own tokens.

Knows the places of tokens and nothing of how they were found. Every chunk is an exact slice of the text, no chunk has
more tokens than the limit or more bytes than the store takes, and together the chunks cover all but white space.
"""

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from chassis.errors import Code, PlatformError

# Milvus refuses a text field of more than 65,535 bytes.
MAX_CHUNK_BYTES = 60_000
# A break found this early in a chunk is not worth the shorter chunk.
_EARLIEST_BREAK = 0.6


@dataclass(frozen=True, slots=True)
class TokenPlaces:
    """Where the tokens of a text stand, in characters; `ends` are exclusive."""

    starts: Sequence[int]
    ends: Sequence[int]

    def __len__(self) -> int:
        return len(self.starts)


@dataclass(frozen=True, slots=True)
class Span:
    """A slice of a text, in characters."""

    start: int
    end: int


@dataclass(frozen=True, slots=True)
class ChunkingPolicy:
    """How long chunks may be and by how much they overlap, in tokens."""

    chunk_tokens: int
    overlap_tokens: int

    def __post_init__(self) -> None:
        if self.chunk_tokens < 1 or not 0 <= self.overlap_tokens < self.chunk_tokens:
            raise PlatformError(
                Code.INVALID_ARGUMENT,
                f"an overlap of {self.overlap_tokens} tokens does not fit chunks of {self.chunk_tokens}",
            )

    def capped(self, max_tokens: int, num_special_tokens: int) -> "ChunkingPolicy":
        """Returns the policy that also keeps to what the encoder reads, special tokens counted."""
        limit = max_tokens - num_special_tokens
        if limit < 1:
            raise PlatformError(Code.FAILED_PRECONDITION, f"an encoder of {max_tokens} tokens reads no text")
        chunk_tokens = min(self.chunk_tokens, limit)
        return ChunkingPolicy(chunk_tokens, min(self.overlap_tokens, chunk_tokens // 2))


def chunk_spans(text: str, tokens: TokenPlaces, policy: ChunkingPolicy) -> list[Span]:
    """Returns the chunks' places, in order; none for a text of white space.

    A break prefers, within the last part of a chunk, the end of a paragraph, of a sentence, of a line, of a word; it
    falls inside a word only where a word is longer than a chunk.
    """
    spans: list[Span] = []
    first = 0
    while first < len(tokens):
        last = min(first + policy.chunk_tokens, len(tokens))
        if last < len(tokens):
            last = _best_break(text, tokens, first, last)
        # The slice runs to the next token, so that characters without a token are covered too.
        start = tokens.starts[first] if spans else 0
        end = tokens.starts[last] if last < len(tokens) else len(text)
        spans.extend(_within_bytes(text, _stripped(text, start, end)))
        if last == len(tokens):
            break
        first = _overlap_start(text, tokens, first, last, policy.overlap_tokens)
    if not tokens:
        spans.extend(_within_bytes(text, _stripped(text, 0, len(text))))
    return spans


def split_for_tokenizer(text: str, max_chars: int) -> list[Span]:
    """Cuts a text into pieces of about `max_chars`, at white space, so that the pieces' tokens are the text's own.

    Only a run of more than `max_chars` characters without white space is cut inside.
    """
    pieces: list[Span] = []
    start = 0
    while len(text) - start > max_chars:
        cut = start + max_chars
        while cut > start and not text[cut - 1].isspace():
            cut -= 1
        if cut == start:
            cut = start + max_chars
        pieces.append(Span(start, cut))
        start = cut
    if start < len(text):
        pieces.append(Span(start, len(text)))
    return pieces


def joined_places(pieces: Sequence[Span], places: Sequence[TokenPlaces]) -> TokenPlaces:
    """Puts the tokens of a text's pieces back into the text."""
    starts: list[int] = []
    ends: list[int] = []
    for piece, tokens in zip(pieces, places, strict=True):
        starts.extend(piece.start + start for start in tokens.starts)
        ends.extend(piece.start + end for end in tokens.ends)
    return TokenPlaces(starts, ends)


_PARAGRAPH = re.compile(r"\n[ \t]*\n")
_SENTENCE_ENDS = frozenset(".!?…。！？")
_WIDE_SENTENCE_ENDS = frozenset("。！？")  # no white space follows these
_CLOSERS = "\"')]}»”’"


def _best_break(text: str, tokens: TokenPlaces, first: int, last: int) -> int:
    """Returns the index of the token that starts the next chunk, in (first, last]."""
    earliest = first + max(1, int((last - first) * _EARLIEST_BREAK))
    best, best_rank = last, -1
    for index in range(last, earliest - 1, -1):
        rank = _break_rank(text, tokens, index)
        if rank > best_rank:
            best, best_rank = index, rank
            if rank == 4:
                break
    if best_rank > 0:
        return best
    for index in range(earliest - 1, first, -1):  # one long word: any end of a word before it
        if _break_rank(text, tokens, index) > 0:
            return index
    return last


def _break_rank(text: str, tokens: TokenPlaces, index: int) -> int:
    """Ranks a break before a token: 4 paragraph, 3 sentence, 2 line, 1 word, 0 inside a word."""
    before, after = tokens.ends[index - 1], tokens.starts[index]
    gap = text[before:after]
    if not any(char.isspace() for char in gap):
        # Touching tokens belong to one word unless one is punctuation, which tokenizers set apart.
        if before != after or (_joins(text[before - 1]) and _joins(text[after])):
            return 0
        return 3 if text[before - 1] in _WIDE_SENTENCE_ENDS else 1
    if _PARAGRAPH.search(gap):
        return 4
    closing = text[max(0, before - 3) : before].rstrip(_CLOSERS)
    if closing and closing[-1] in _SENTENCE_ENDS:
        return 3
    return 2 if "\n" in gap else 1


def _joins(char: str) -> bool:
    """Tells whether a character sticks to its neighbours in one word."""
    if char.isascii():
        return char.isalnum() or not char.isprintable()
    return not unicodedata.category(char).startswith("P")


def _overlap_start(text: str, tokens: TokenPlaces, first: int, last: int, overlap: int) -> int:
    """Returns the token that the next chunk starts with: some tokens back, and at the start of a word."""
    for index in range(max(first + 1, last - overlap), last):
        if _break_rank(text, tokens, index) > 0:
            return index
    return last


def _stripped(text: str, start: int, end: int) -> Span:
    """Takes white space off both ends of a slice."""
    while start < end and text[start].isspace():
        start += 1
    while end > start and text[end - 1].isspace():
        end -= 1
    return Span(start, end)


def _within_bytes(text: str, span: Span) -> list[Span]:
    """Cuts a slice that the store would refuse; only a token of many thousand characters brings one about."""
    spans: list[Span] = []
    start = span.start
    while start < span.end:
        # No character takes more than four bytes.
        end = span.end if _fits(text, start, span.end) else start + MAX_CHUNK_BYTES // 4
        piece = _stripped(text, start, end)
        if piece.start < piece.end:
            spans.append(piece)
        start = end
    return spans


def _fits(text: str, start: int, end: int) -> bool:
    if end - start > MAX_CHUNK_BYTES:
        return False
    return len(text[start:end].encode(errors="replace")) <= MAX_CHUNK_BYTES
