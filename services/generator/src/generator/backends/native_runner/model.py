"""A model in the native engine: its weights, its keys and values, and one call for each step."""

import contextlib
import ctypes
import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from generator.backends.llama_config import LlamaConfig
from generator.backends.native_runner.library import LAYER_ARRAYS, Config, Draw, Layer, Step, load_library
from generator.backends.native_runner.weights import PackedWeights, rope_tables
from generator.core.engine import OutOfMemory

BLOCK_SIZE = 16  # the kernels' own: a register holds 16 keys
Ints = NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Limits:
    """Most tokens, rows of logits and sequences of one step, and KV blocks in all."""

    max_tokens: int
    max_rows: int
    max_sequences: int
    num_blocks: int
    context_length: int
    num_threads: int
    wide_in_prompts: int  # matrices, as PrConfig numbers them
    wide_after: int


@dataclass(frozen=True, slots=True)
class StepArrays:
    """One step as native/engine.h describes it. adapters: for each sequence an address or 0; None for none at all."""

    token_ids: Ints
    positions: Ints
    starts: Ints
    tables: Ints
    table_starts: Ints
    is_prompt: NDArray[np.uint8]
    rows: Ints
    wants_logits: NDArray[np.uint8]
    adapters: NDArray[np.uint64] | None = None


class NativeModel:
    """Not thread-safe. Close it, or its threads stay."""

    def __init__(self, shape: LlamaConfig, weights: PackedWeights, limits: Limits) -> None:
        """Raises PlatformError(FAILED_PRECONDITION) where no build fits the processor, OutOfMemory."""
        self._library, self.build = load_library()
        self._shape = shape
        self._weights = weights  # the kernels point into them
        self._cos, self._sin = rope_tables(shape, limits.context_length)
        size = shape.num_layers * limits.num_blocks * shape.num_kv_heads * shape.head_dim * BLOCK_SIZE
        self._keys, self._values = _lazy_halves(size), _lazy_halves(size)
        self._logits = np.frombuffer(mmap.mmap(-1, limits.max_rows * shape.vocab_size * 4), dtype=np.float32)
        self._logits = self._logits.reshape(limits.max_rows, shape.vocab_size)
        self._best = np.zeros(limits.max_rows, dtype=np.int32)
        layers = (Layer * shape.num_layers)()
        for number, layer in enumerate(layers):
            for name in LAYER_ARRAYS:
                setattr(layer, name, weights.arrays[f"layers.{number}.{name}"].ctypes.data)
        arrays = weights.arrays
        head = arrays.get("head", arrays["embedding"])
        pointers = (arrays["embedding"], head, arrays["norm"], self._cos, self._sin, self._keys, self._values)
        config = _make_config(shape, weights, limits)
        self._handle = self._library.pr_open(ctypes.byref(config), layers, *(a.ctypes.data for a in pointers))
        if not self._handle:
            raise OutOfMemory("the native engine found no memory for its buffers or threads")

    def forward(self, step: StepArrays) -> tuple[NDArray[np.float32], Ints]:
        """Returns logits [rows, V] (of the rows that want them) and the likeliest tokens [rows].

        Both are the model's own buffers: valid until the next call, and the caller may write into them.
        """
        num_rows = len(step.rows)
        message = Step(
            num_tokens=len(step.token_ids),
            num_sequences=len(step.starts) - 1,
            num_rows=num_rows,
            logits=self._logits.ctypes.data,
            best=self._best.ctypes.data,
            adapters=None if step.adapters is None else step.adapters.ctypes.data,
            **{name: getattr(step, name).ctypes.data for name in _ARRAYS},
        )
        self._library.pr_forward(self._handle, ctypes.byref(message))
        return self._logits[:num_rows], self._best[:num_rows]

    def draw(self, draws: Sequence[Draw]) -> Ints:
        """Returns one token for each row to draw."""
        chosen = np.zeros(len(draws), dtype=np.int32)
        self._library.pr_draw(self._handle, (Draw * len(draws))(*draws), len(draws), chosen.ctypes.data)
        return chosen

    def close(self) -> None:
        """Ends the threads."""
        if self._handle:
            self._library.pr_close(self._handle)
            self._handle = None


_ARRAYS = ("token_ids", "positions", "starts", "tables", "table_starts", "is_prompt", "rows", "wants_logits")


def _make_config(shape: LlamaConfig, weights: PackedWeights, limits: Limits) -> Config:
    sizes = ("num_layers", "num_heads", "num_kv_heads", "head_dim")
    bounds = ("num_threads", "num_blocks", "context_length", "max_tokens", "max_rows", "wide_in_prompts", "wide_after")
    return Config(
        hidden=shape.hidden_size,
        intermediate=shape.intermediate_size,
        vocab=shape.vocab_size,
        norm_eps=shape.rms_norm_eps,
        weight_bits=weights.weight_bits,
        **{name: getattr(shape, name) for name in sizes},
        **{name: getattr(limits, name) for name in bounds},
    )


def _lazy_halves(count: int) -> NDArray[Any]:
    """Returns float16 zeros whose pages the system gives when they are first written: idle memory costs nothing.

    Large pages: a step reads from everywhere, and would spend its time on looking up where small ones are.
    """
    memory = mmap.mmap(-1, count * 2)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a system without them has the small ones
            memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, dtype=np.float16)
