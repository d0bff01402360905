"""What the service asks of an encoder."""

from typing import Protocol

from embedder.core.inputs import EncoderInfo, TokenSpan
from embedder.core.pooling import Floats


class Encoder(Protocol):
    """A tokenizer and a model behind it. The methods block; `encode` runs in a thread of its own."""

    info: EncoderInfo

    def tokenize(self, text: str) -> list[TokenSpan]:
        """Returns the tokens of a text without the special ones, neither cut nor padded."""
        ...

    def encode(self, batch: list[list[int]]) -> Floats:
        """Returns unit vectors [B, H] for B lists of token ids without the special ones."""
        ...
