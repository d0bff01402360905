"""Packed weights in mapped files, and what the kernels are told of a model's shape."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from chassis.errors import Code, PlatformError
from modelstore.packing import GROUP, LANES, LAYOUT, TILE_BYTES, PackFormat, pack_name
from modelstore.tensors import TensorFile

_HEAD_DIMS = frozenset({32, 64, 96, 128})


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a Llama-shaped model."""

    num_layers: int
    hidden: int
    intermediate: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab: int
    norm_eps: float
    rope_theta: float
    context_length: int
    eos_token_ids: frozenset[int]

    @classmethod
    def load(cls, folder: Path) -> "Shape":
        """Reads config.json and generation_config.json. Raises PlatformError(FAILED_PRECONDITION)."""
        config = _read_json(folder / "config.json")
        generation = folder / "generation_config.json"
        eos = (_read_json(generation) if generation.is_file() else {}).get("eos_token_id", config.get("eos_token_id"))
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        if rope.get("rope_type", "default") != "default":
            raise _refuse(f"rope_type {rope['rope_type']!r}")
        shape = cls(
            num_layers=config["num_hidden_layers"],
            hidden=config["hidden_size"],
            intermediate=config["intermediate_size"],
            num_heads=config["num_attention_heads"],
            num_kv_heads=config.get("num_key_value_heads", config["num_attention_heads"]),
            head_dim=config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"],
            vocab=config["vocab_size"],
            norm_eps=config["rms_norm_eps"],
            rope_theta=float(rope.get("rope_theta", config.get("rope_theta", 10000.0))),
            context_length=config["max_position_embeddings"],
            eos_token_ids=frozenset([eos] if isinstance(eos, int) else eos or []),
        )
        if shape.head_dim not in _HEAD_DIMS:
            raise _refuse(f"head_dim {shape.head_dim}")
        if shape.num_heads % shape.num_kv_heads or shape.num_heads // shape.num_kv_heads > 64:
            raise _refuse(f"{shape.num_heads} query heads over {shape.num_kv_heads} key heads")
        return shape

    @property
    def matrices(self) -> dict[str, tuple[int, int]]:
        """Rows and columns of a layer's matrices."""
        attended = self.num_heads * self.head_dim
        return {
            "qkv": (attended + 2 * self.num_kv_heads * self.head_dim, self.hidden),
            "output": (self.hidden, attended),
            "gate": (self.intermediate, self.hidden),
            "up": (self.intermediate, self.hidden),
            "down": (self.hidden, self.intermediate),
        }


@dataclass(frozen=True, slots=True)
class PackedWeights:
    """Arrays by name, views into a mapped file, checked against the model's shape."""

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


def load_pack(path: Path, shape: Shape) -> PackedWeights:
    """Maps packed weights. Raises PlatformError(DATA_LOSS) where they are damaged or do not fit the shape."""
    file = TensorFile(path)
    form = file.metadata.get("format")
    if file.metadata.get("layout") != LAYOUT or form not in TILE_BYTES:
        raise _damaged(path, f"its layout is {file.metadata.get('layout')!r}, not {LAYOUT!r}")
    arrays: dict[str, NDArray[Any]] = {"norm": _norm(file, "norm", shape)}
    for name in ("embedding", "head") if "head" in file.entries else ("embedding",):
        arrays[name] = _tiles(file, name, (shape.vocab, shape.hidden), "int8")
    for layer in range(shape.num_layers):
        for name in ("attention_norm", "mlp_norm"):
            arrays[f"layers.{layer}.{name}"] = _norm(file, f"layers.{layer}.{name}", shape)
        for name, size in shape.matrices.items():
            arrays[f"layers.{layer}.{name}"] = _tiles(file, f"layers.{layer}.{name}", size, form)
    return PackedWeights("int4" if form == "int4" else "int8", arrays)


def rope_tables(shape: Shape, context_length: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
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
    return array


def _norm(file: TensorFile, name: str, shape: Shape) -> NDArray[Any]:
    array = file.raw(name)
    if array.dtype != np.float32 or array.shape != (shape.hidden,):
        raise _damaged(file.path, f"{name} is {array.dtype}{list(array.shape)}, not float32[{shape.hidden}]")
    return array


def _read_json(path: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return document


def _refuse(why: str) -> PlatformError:
    return PlatformError(Code.FAILED_PRECONDITION, f"the native engine cannot run this model: {why}", retryable=False)


def _damaged(path: Path, why: str) -> PlatformError:
    return PlatformError(Code.DATA_LOSS, f"{path.name} is damaged: {why}", retryable=False)
