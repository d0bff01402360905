"""What every encoder must do. The fake one and the real one inherit it."""

import hashlib

import numpy as np
import pytest

from embedder.core.encoder import Encoder
from embedder.core.inputs import EncoderInfo, TokenSpan
from embedder.core.pooling import Floats, normalise


class FakeEncoder:
    """Words are tokens; a token's vector is drawn from its hash; a text's vector is their mean."""

    def __init__(self) -> None:
        self.info = EncoderInfo("fake", "0" * 12, 16, 32, 2, 5000, 0)
        self.batches: list[list[list[int]]] = []

    def tokenize(self, text: str) -> list[TokenSpan]:
        spans, start = [], 0
        for word in text.split():
            start = text.index(word, start)
            digest = int(hashlib.sha256(word.lower().encode()).hexdigest(), 16)
            spans.append(TokenSpan(digest % self.info.vocabulary_size, start, start + len(word)))
            start += len(word)
        return spans

    def encode(self, batch: list[list[int]]) -> Floats:
        self.batches.append(batch)
        rows = [np.mean([np.random.default_rng(i).standard_normal(16) for i in ids], axis=0) for ids in batch]
        return normalise(np.array(rows, dtype=np.float32))


class EncoderSuite:
    """Contract tests; a subclass provides the fixture `encoder`."""

    TEXTS = ("a calm hand", "The type is set, and the ink dries on the page.", "proof")

    def _ids(self, encoder: Encoder, text: str) -> list[int]:
        return [token.id for token in encoder.tokenize(text)]

    def test_vectors_are_unit_and_of_the_stated_size(self, encoder: Encoder) -> None:
        vectors = encoder.encode([self._ids(encoder, t) for t in self.TEXTS])
        assert vectors.shape == (3, encoder.info.dimensions)
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1.0, atol=1e-5)

    def test_a_batch_equals_one_by_one(self, encoder: Encoder) -> None:
        lists = [self._ids(encoder, t) for t in self.TEXTS]
        together = encoder.encode(lists)
        for ids, vector in zip(lists, together, strict=True):
            np.testing.assert_allclose(encoder.encode([ids])[0], vector, atol=1e-4)

    def test_tokens_name_their_place_in_code_points(self, encoder: Encoder) -> None:
        text = "Grüße, 印刷 room"
        spans = encoder.tokenize(text)
        assert spans[-1].end == len(text)
        assert all(0 <= s.start < s.end <= len(text) for s in spans)
        assert text[spans[0].start : spans[0].end].lower().startswith("gr")

    def test_tokenizing_neither_cuts_nor_pads(self, encoder: Encoder) -> None:
        assert len(encoder.tokenize("word " * 600)) == 600

    def test_the_longest_input_is_read_to_its_end(self, encoder: Encoder) -> None:
        room = encoder.info.max_tokens - encoder.info.num_special_tokens
        ids = (self._ids(encoder, "alpha beta gamma") * room)[:room]
        changed = [*ids[:-1], self._ids(encoder, "zebra")[0]]
        one, other = encoder.encode([ids, changed])
        assert not np.allclose(one, other, atol=1e-6)

    @pytest.mark.parametrize("text", ["x", "🦜", "ﷺ" * 3])
    def test_odd_texts_embed_finitely(self, encoder: Encoder, text: str) -> None:
        assert np.isfinite(encoder.encode([self._ids(encoder, text)])).all()
