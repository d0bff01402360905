"""Packed weights, and the models that the kernels can run."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from chassis.errors import Code, PlatformError
from generator.backends.llama_config import LlamaConfig
from modelstore.packing import GROUP, LANES, LAYOUT, TILE_BYTES, PackFormat, pack_name
from modelstore.tensors import TensorFile

_HEAD_DIMS = frozenset({32, 64, 96, 128})


def load_shape(folder: Path) -> LlamaConfig:
    """Reads a model's shape. Raises PlatformError(FAILED_PRECONDITION) for one that the kernels cannot run."""
    shape = LlamaConfig.load(folder)
    if shape.rope_scaling is not None:
        raise _refuse("scaled RoPE")
    if shape.head_dim not in _HEAD_DIMS:
        raise _refuse(f"head_dim {shape.head_dim}")
    if shape.num_heads % shape.num_kv_heads or shape.num_heads // shape.num_kv_heads > 64:
        raise _refuse(f"{shape.num_heads} query heads over {shape.num_kv_heads} key heads")
    return shape


def matrix_sizes(shape: LlamaConfig) -> dict[str, tuple[int, int]]:
    """Returns rows and columns of a layer's matrices."""
    attended = shape.num_heads * shape.head_dim
    return {
        "qkv": (attended + 2 * shape.num_kv_heads * shape.head_dim, shape.hidden_size),
        "output": (shape.hidden_size, attended),
        "gate": (shape.intermediate_size, shape.hidden_size),
        "up": (shape.intermediate_size, shape.hidden_size),
        "down": (shape.hidden_size, shape.intermediate_size),
    }


@dataclass(frozen=True, slots=True)
class PackedWeights:
    """Arrays by name, checked against the model's shape."""

    form: PackFormat
    arrays: Mapping[str, NDArray[Any]]

    @property
    def weight_bits(self) -> int:
        return 4 if self.form == "int4" else 8

    @property
    def size_bytes(self) -> int:
        return sum(array.nbytes for array in self.arrays.values())


def find_pack(folder: Path, form: Literal["auto", "int4", "int8"] = "auto") -> Path | None:
    """Returns the packed weights in a model's folder; for "auto" the smallest."""
    forms: tuple[PackFormat, ...] = ("int4", "int8") if form == "auto" else (form,)
    return next((folder / pack_name(f) for f in forms if (folder / pack_name(f)).is_file()), None)


def load_pack(path: Path, shape: LlamaConfig) -> PackedWeights:
    """Reads packed weights. Raises PlatformError(DATA_LOSS) where they are damaged or do not fit the shape.

    They are copied: a file that shrinks under a map kills the process that reads it.
    """
    file = TensorFile(path)
    form = file.metadata.get("format")
    if file.metadata.get("layout") != LAYOUT or form not in TILE_BYTES:
        raise _damaged(path, f"its layout is {file.metadata.get('layout')!r}, not {LAYOUT!r}")
    arrays: dict[str, NDArray[Any]] = {"norm": _norm(file, "norm", shape)}
    for name in ("embedding", "head") if "head" in file.entries else ("embedding",):
        arrays[name] = _tiles(file, name, (shape.vocab_size, shape.hidden_size), "int8")
    for layer in range(shape.num_layers):
        for name in ("attention_norm", "mlp_norm"):
            arrays[f"layers.{layer}.{name}"] = _norm(file, f"layers.{layer}.{name}", shape)
        for name, size in matrix_sizes(shape).items():
            arrays[f"layers.{layer}.{name}"] = _tiles(file, f"layers.{layer}.{name}", size, form)
    return PackedWeights("int4" if form == "int4" else "int8", arrays)


def rope_tables(shape: LlamaConfig, context_length: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Returns cosine and sine [context, D / 2] (RoFormer, arXiv 2104.09864)."""
    exponents = np.arange(0, shape.head_dim, 2, dtype=np.float32) / np.float32(shape.head_dim)
    frequencies = (shape.rope_theta**-exponents).astype(np.float32)
    angles = np.outer(np.arange(context_length, dtype=np.float32), frequencies)
    return np.cos(angles), np.sin(angles)


def _tiles(file: TensorFile, name: str, size: tuple[int, int], form: str) -> NDArray[Any]:
    array = file.raw(name)
    wanted = (-(-size[0] // LANES), size[1] // GROUP, TILE_BYTES[form])
    if array.dtype != np.uint8 or array.shape != wanted:
        raise _damaged(file.path, f"{name} is {array.dtype}{list(array.shape)}, not uint8{list(wanted)}")
    return array.copy()


def _norm(file: TensorFile, name: str, shape: LlamaConfig) -> NDArray[Any]:
    array = file.raw(name)
    if array.dtype != np.float32 or array.shape != (shape.hidden_size,):
        raise _damaged(file.path, f"{name} is {array.dtype}{list(array.shape)}, not float32[{shape.hidden_size}]")
    return array.copy()


def _refuse(why: str) -> PlatformError:
    return PlatformError(Code.FAILED_PRECONDITION, f"the native engine cannot run this model: {why}", retryable=False)


def _damaged(path: Path, why: str) -> PlatformError:
    return PlatformError(Code.DATA_LOSS, f"{path.name} is damaged: {why}", retryable=False)
