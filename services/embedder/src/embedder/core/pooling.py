"""From hidden states to one vector a text.

Legend: B texts in the batch, T tokens (padded), H dimensions.
"""

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]


def mean_pool(hidden: Floats, mask: npt.NDArray[np.int64]) -> Floats:
    """Averages hidden states [B, T, H] over the tokens that the mask [B, T] keeps; returns [B, H].

    Reimers and Gurevych, "Sentence-BERT", 2019. Every row of the mask keeps at least one token.
    """
    weights = mask.astype(np.float32)
    summed = np.einsum("bth,bt->bh", hidden, weights)
    return np.asarray(summed / weights.sum(axis=1, keepdims=True), dtype=np.float32)


def normalise(vectors: Floats) -> Floats:
    """Scales each row [B, H] to length 1 (L2)."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.asarray(vectors / np.maximum(lengths, 1e-12), dtype=np.float32)


def keep_dimensions(vector: Floats, dimensions: int) -> Floats:
    """Cuts a vector [H] to its first dimensions and scales it to length 1 again."""
    return vector if dimensions == vector.shape[0] else normalise(vector[None, :dimensions])[0]
