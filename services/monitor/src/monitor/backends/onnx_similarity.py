"""A sentence encoder of the model store on ONNX Runtime, for similarities. No torch.

A long text is read in overlapping windows: an attack in the middle of a long prompt would drown in one vector for all,
and what lies beyond the encoder's reach would not be read. The prepared tokenizer.json cuts and pads at 128 tokens;
both are switched off here.
"""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from chassis.errors import Code, PlatformError
from modelstore import Manifest

Vectors = npt.NDArray[np.float32]  # [windows, dimensions], of length 1 each

_WINDOW_TOKENS = 96
_STRIDE_TOKENS = 80
_MAX_WINDOWS = 24


class OnnxTextEncoder:
    """An encoder from a verified folder. Made by `load`, which blocks for a second."""

    def __init__(self, tokenizer: Any, session: Any) -> None:
        self._tokenizer = tokenizer
        self._session = session
        self._inputs = {node.name for node in session.get_inputs()}
        empty = tokenizer.encode("", add_special_tokens=True).ids
        self._first, self._last = empty[0], empty[-1]

    @classmethod
    def load(cls, model_dir: Path) -> "OnnxTextEncoder":
        """Verifies and loads a model. Raises PlatformError: NOT_FOUND for none, DATA_LOSS for a damaged one."""
        import onnxruntime  # here, for it is told at its import whether it may send statistics of its use

        manifest = Manifest.load(model_dir)
        if manifest.kind != "encoder":
            raise PlatformError(Code.FAILED_PRECONDITION, f"model {manifest.id} in {model_dir} is no encoder")
        manifest.verify()
        tokenizer = Tokenizer.from_file(str(manifest.path("tokenizer.json")))
        tokenizer.no_truncation()
        tokenizer.no_padding()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.enable_cpu_mem_arena = False  # it would keep what the longest text ever took
        path = str(manifest.path("model.onnx"))
        return cls(tokenizer, onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"]))

    def encode(self, text: str, max_windows: int = _MAX_WINDOWS) -> Vectors:
        """Returns one vector for each window of a text, at least one. 25 ms of a core for each."""
        tokens = self._tokenizer.encode(text, add_special_tokens=False).ids
        num_windows = 1 + max(0, -(-(len(tokens) - _WINDOW_TOKENS) // _STRIDE_TOKENS))
        starts = [i * _STRIDE_TOKENS for i in range(min(num_windows, max_windows))]
        return np.concatenate([self._encode(tokens[start : start + _WINDOW_TOKENS]) for start in starts])

    def _encode(self, tokens: list[int]) -> Vectors:
        ids = np.array([[self._first, *tokens, self._last]], dtype=np.int64)
        feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
        (hidden, *_) = self._session.run(None, {name: feeds[name] for name in self._inputs})
        return _unit(hidden.mean(axis=1, dtype=np.float32))


def mean(vectors: Vectors) -> Vectors:
    """Returns one vector for all windows of a text."""
    return _unit(vectors.mean(axis=0, keepdims=True))


def similarity(a: Vectors, b: Vectors) -> float:
    """Returns the greatest cosine between a vector of one and a vector of the other."""
    return float((a @ b.T).max())


def _unit(vectors: Vectors) -> Vectors:
    unit: Vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    return unit
