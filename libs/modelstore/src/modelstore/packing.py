"""Quantises the weights of a Llama-shaped model into the layout that the native engine's kernels read.

A matrix [N, K] is cut into groups of 32 along K. int4 keeps `scale * q + minimum` with q in 0..15 (GGUF's Q4_1, fitted
by least squares, so that weights which were Q4_1 before come back as they were); int8 keeps `scale * q` with q in
-127..127 (Q8_0). Scales are float16. The embedding, and a head of its own, are always int8.

The layout follows the kernels: 16 rows stand side by side, one in each lane of a 512-bit register, and every lane takes
four neighbours along K at a time. A matrix is [N / 16, K / 32, bytes of a tile]; a tile of 16 rows x 32 columns is
  int4: 4 x 64 bytes of numbers, 16 scales, 16 minima (320 bytes). Byte 4 r + i of run j holds column 4 j + i of
        row r in its low half and column 16 + 4 j + i in its high half.
  int8: 8 x 64 bytes of numbers plus 128, 16 scales (544 bytes). Byte 4 r + i of run j holds column 4 j + i of row r.
Rows that are no multiple of 16 are filled up with zeros.

Legend: N rows (outputs), K columns (inputs), B = N / 16 row blocks, G = K / 32 groups.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from chassis.errors import Code, PlatformError
from modelstore.tensors import TensorFile, claim_of, write_tensors

PackFormat = Literal["int4", "int8"]
Progress = Callable[[int, int], None]

LAYOUT = "pressroom-pack-1"
GROUP = 32
LANES = 16
TILE_BYTES = {"int4": 320, "int8": 544}

_LINEARS = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "output": ("self_attn.o_proj",),
    "gate": ("mlp.gate_proj",),
    "up": ("mlp.up_proj",),
    "down": ("mlp.down_proj",),
}


def pack_name(form: PackFormat) -> str:
    """Returns the file's name beside config.json."""
    return f"model.{form}.safetensors"


def pack_model(folder: Path, target: Path, form: PackFormat, progress: Progress = lambda done, total: None) -> None:
    """Writes the packed weights of the model in `folder` to the file `target`. Takes seconds for each 100 M weights.

    Raises PlatformError: FAILED_PRECONDITION for a model of another shape, DATA_LOSS for damaged weights.
    """
    config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    num_layers = _check_shape(config)
    source = TensorFile(folder / "model.safetensors")
    total = num_layers + 1
    packed: dict[str, NDArray[Any]] = {"norm": source.float32("model.norm.weight")}
    packed["embedding"] = pack_matrix(source.float32("model.embed_tokens.weight"), "int8")
    if not config.get("tie_word_embeddings", False):
        packed["head"] = pack_matrix(source.float32("lm_head.weight"), "int8")
    progress(1, total)
    for layer in range(num_layers):
        prefix = f"model.layers.{layer}"
        packed[f"layers.{layer}.attention_norm"] = source.float32(f"{prefix}.input_layernorm.weight")
        packed[f"layers.{layer}.mlp_norm"] = source.float32(f"{prefix}.post_attention_layernorm.weight")
        for name, parts in _LINEARS.items():
            rows = [source.float32(f"{prefix}.{part}.weight") for part in parts]
            packed[f"layers.{layer}.{name}"] = pack_matrix(np.concatenate(rows), form)
        progress(layer + 2, total)
    claims = {name: claim_of(values) for name, values in packed.items()}
    write_tensors(target, claims, {"layout": LAYOUT, "format": form})


def pack_matrix(weights: NDArray[np.float32], form: PackFormat) -> NDArray[np.uint8]:
    """Returns a matrix [N, K] in tiles [B, G, bytes]. Raises PlatformError where K is no multiple of 32."""
    num_rows, num_columns = weights.shape
    if num_columns % GROUP:
        raise PlatformError(Code.FAILED_PRECONDITION, f"a matrix has {num_columns} columns, no multiple of {GROUP}")
    padded = np.pad(weights, ((0, -num_rows % LANES), (0, 0)))
    groups = padded.reshape(-1, LANES, num_columns // GROUP, GROUP).swapaxes(1, 2)  # [B, G, 16, 32]
    if form == "int4":
        numbers, scales, minima = quantise_int4(groups)
        runs = numbers.reshape(*numbers.shape[:3], 2, 4, 4)  # [B, G, 16, half, j, i]
        both = runs[..., 0, :, :] | runs[..., 1, :, :] << 4
        halves = [both.swapaxes(2, 3), scales, minima]
    else:
        signed, scales = quantise_int8(groups)
        runs = (signed.astype(np.int16) + 128).astype(np.uint8).reshape(*signed.shape[:3], 8, 4)
        halves = [runs.swapaxes(2, 3), scales]
    flat = [np.ascontiguousarray(part).view(np.uint8).reshape(*groups.shape[:2], -1) for part in halves]
    return np.ascontiguousarray(np.concatenate(flat, axis=2))


def unpack_matrix(tiles: NDArray[np.uint8], form: PackFormat, num_rows: int) -> NDArray[np.float32]:
    """Returns the numbers [N, K] that a packed matrix stands for: the slow reference of the kernels."""
    num_blocks, num_groups = tiles.shape[:2]
    split = 256 if form == "int4" else 512
    numbers = tiles[..., :split].reshape(num_blocks, num_groups, split // 64, LANES, 4).swapaxes(2, 3)  # j <-> row
    floats = np.ascontiguousarray(tiles[..., split:]).view(np.float16).astype(np.float32)
    scales = floats[..., :LANES, None]
    if form == "int4":
        both = numbers.reshape(num_blocks, num_groups, LANES, 16)
        values = np.concatenate([both & 15, both >> 4], axis=3).astype(np.float32) * scales + floats[..., LANES:, None]
    else:
        values = (numbers.reshape(num_blocks, num_groups, LANES, GROUP).astype(np.float32) - 128) * scales
    return values.swapaxes(1, 2).reshape(num_blocks * LANES, num_groups * GROUP)[:num_rows]


def quantise_int4(
    groups: NDArray[np.float32],
) -> tuple[NDArray[np.uint8], NDArray[np.float16], NDArray[np.float16]]:
    """Returns numbers in 0..15, scales and minima of groups [..., 32]."""
    low, high = groups.min(axis=-1, keepdims=True), groups.max(axis=-1, keepdims=True)
    scale = np.where(high > low, (high - low) / 15, np.float32(1))
    numbers = np.clip(np.rint((groups - low) / scale), 0, 15)
    # Least squares over the 32 pairs (number, weight): rounding of the two extremes no longer moves all the others.
    mean_number, mean = numbers.mean(axis=-1, keepdims=True), groups.mean(axis=-1, keepdims=True)
    spread = ((numbers - mean_number) ** 2).sum(axis=-1, keepdims=True)
    covariance = ((numbers - mean_number) * (groups - mean)).sum(axis=-1, keepdims=True)
    scale = np.where(spread > 0, covariance / np.where(spread > 0, spread, 1), 0).astype(np.float16)
    minimum = (mean - scale.astype(np.float32) * mean_number).astype(np.float16)
    return numbers.astype(np.uint8), scale[..., 0], minimum[..., 0]


def quantise_int8(groups: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.float16]]:
    """Returns numbers in -127..127 and scales of groups [..., 32]."""
    scale = (np.abs(groups).max(axis=-1, keepdims=True) / 127).astype(np.float16)
    divisor = np.where(scale > 0, scale, np.float16(1)).astype(np.float32)
    return np.clip(np.rint(groups / divisor), -127, 127).astype(np.int8), scale[..., 0]


def _check_shape(config: dict[str, Any]) -> int:
    """Returns the number of layers. Raises PlatformError(FAILED_PRECONDITION) for what the kernels cannot run."""
    wrong = [
        config.get("model_type") != "llama" and f"model_type {config.get('model_type')!r}",
        config.get("hidden_act", "silu") != "silu" and f"hidden_act {config.get('hidden_act')!r}",
        (config.get("attention_bias") or config.get("mlp_bias")) and "biases",
        config["hidden_size"] % GROUP and f"hidden_size {config['hidden_size']}",
        config["intermediate_size"] % GROUP and f"intermediate_size {config['intermediate_size']}",
    ]
    if found := [why for why in wrong if why]:
        raise PlatformError(Code.FAILED_PRECONDITION, f"the native engine cannot run this model: {', '.join(found)}")
    return int(config["num_hidden_layers"])
