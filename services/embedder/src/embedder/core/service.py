"""The embedder's use cases, in its own terms."""

from collections.abc import Sequence
from dataclasses import dataclass

from chassis.errors import Code, PlatformError
from embedder.core import inputs
from embedder.core.batcher import Batcher, BatchRun
from embedder.core.encoder import Encoder
from embedder.core.inputs import TokenSpan
from embedder.core.pooling import Floats, keep_dimensions


@dataclass(frozen=True, slots=True)
class Embedded:
    """A vector [dimensions] of length 1 and the tokens that were read for it, special tokens included."""

    vector: Floats
    num_tokens: int
    run: BatchRun


class EmbedderCore:
    """Checks, tokenizes, batches and embeds for one encoder."""

    def __init__(self, encoder: Encoder, batcher: Batcher) -> None:
        self._encoder = encoder
        self._batcher = batcher
        self.info = encoder.info

    def check_model(self, model: str) -> None:
        """Refuses a model that is not served here; an empty name asks for the default."""
        if model not in ("", self.info.id):
            raise PlatformError(
                Code.NOT_FOUND, f"the model {model!r} is not an encoder here", param="model", reason="model_not_found"
            )

    def tokenize(self, text: str, index: int = 0) -> list[TokenSpan]:
        """Returns the tokens of a text, however long it is; blocks for milliseconds on a long one."""
        inputs.check_text(text, index)
        return self._encoder.tokenize(text)

    def token_ids(self, value: str | Sequence[int], index: int, truncate: bool) -> list[int]:
        """Returns what the encoder will read of an input, or refuses the input; blocks like `tokenize`."""
        if isinstance(value, str):
            ids = [token.id for token in self.tokenize(value, index)]
        else:
            inputs.check_token_ids(value, index, self.info)
            ids = list(value)
        return inputs.fit(ids, index, self.info, truncate)

    async def embed(self, token_lists: Sequence[list[int]], dimensions: int) -> list[Embedded]:
        """Embeds what `token_ids` returned, in order."""
        keep = inputs.check_dimensions(dimensions, self.info)
        computed = await self._batcher.embed(token_lists)
        return [
            Embedded(keep_dimensions(one.vector, keep), len(ids) + self.info.num_special_tokens, one.run)
            for one, ids in zip(computed, token_lists, strict=True)
        ]
