"""Reads a model's weights from safetensors (never pickle), fused for speed."""

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from chassis.errors import Code, PlatformError
from generator.backends.llama_config import LlamaConfig

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


@dataclass(slots=True)
class LayerWeights:
    """One decoder layer. qkv stacks the rows of q, k and v; gate_up those of gate and up: one product for each."""

    attention_norm: Tensor
    qkv: Tensor
    output: Tensor
    mlp_norm: Tensor
    gate_up: Tensor
    down: Tensor


@dataclass(slots=True)
class LlamaWeights:
    """All weights; `head` is `embedding` itself where they are tied."""

    embedding: Tensor
    layers: list[LayerWeights]
    final_norm: Tensor
    head: Tensor


def load_weights(
    folder: Path, config: LlamaConfig, dtype: torch.dtype, device: torch.device = torch.device("cpu")
) -> LlamaWeights:
    """Reads the weights, from one file or from those that an index names, into memory of this process or a GPU.

    Raises PlatformError(DATA_LOSS) for files that are not whole.
    """
    paths = _weight_files(folder)
    try:
        with contextlib.ExitStack() as stack:
            files = {path: stack.enter_context(safe_open(path, framework="pt")) for path in set(paths.values())}
            places = {name: files[path] for name, path in paths.items()}
            if not paths:  # no index: one file has all
                only = stack.enter_context(safe_open(folder / WEIGHTS_FILE, framework="pt"))
                places = dict.fromkeys(only.keys(), only)
            return _assemble(places, config, dtype, device)
    except (SafetensorError, FileNotFoundError) as error:
        raise PlatformError(Code.DATA_LOSS, f"weights of {folder.name} cannot be read: {error}") from error


def _weight_files(folder: Path) -> dict[str, Path]:
    """Returns the file of each tensor as the index says; empty where there is no index."""
    index = folder / INDEX_FILE
    if not index.exists():
        return {}
    try:
        names = json.loads(index.read_text())["weight_map"]
        if any(not isinstance(file, str) or "/" in file or "\\" in file for file in names.values()):
            raise ValueError("it names a file outside its folder")
        return {name: folder / file for name, file in names.items()}
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise PlatformError(Code.DATA_LOSS, f"{index.name} cannot be read: {error}") from error


def _assemble(places: Mapping[str, Any], config: LlamaConfig, dtype: torch.dtype, device: torch.device) -> LlamaWeights:
    def read(*names: str, shape: tuple[int, int] | tuple[int]) -> Tensor:
        # Always copied: a view would keep the file mapped, and a file that shrinks under a map kills the process.
        missing = [name for name in names if name not in places]
        if missing:
            raise PlatformError(Code.DATA_LOSS, f"the weights have no {missing[0]}")
        parts = [places[name].get_tensor(name).to(device) for name in names]
        joined = torch.cat(parts).to(dtype) if len(parts) > 1 else parts[0].to(dtype, copy=device.type == "cpu")
        if tuple(joined.shape) != shape:
            message = f"{names[0]} has shape {tuple(joined.shape)} where config.json says {shape}"
            raise PlatformError(Code.DATA_LOSS, message)
        return joined.contiguous()

    hidden, inner, kv = config.hidden_size, config.intermediate_size, config.num_kv_heads * config.head_dim
    query = config.num_heads * config.head_dim

    def layer(number: int) -> LayerWeights:
        at, mlp = f"model.layers.{number}.self_attn.", f"model.layers.{number}.mlp."
        return LayerWeights(
            attention_norm=read(f"model.layers.{number}.input_layernorm.weight", shape=(hidden,)),
            qkv=read(f"{at}q_proj.weight", f"{at}k_proj.weight", f"{at}v_proj.weight", shape=(query + 2 * kv, hidden)),
            output=read(f"{at}o_proj.weight", shape=(hidden, query)),
            mlp_norm=read(f"model.layers.{number}.post_attention_layernorm.weight", shape=(hidden,)),
            gate_up=read(f"{mlp}gate_proj.weight", f"{mlp}up_proj.weight", shape=(2 * inner, hidden)),
            down=read(f"{mlp}down_proj.weight", shape=(hidden, inner)),
        )

    embedding = read("model.embed_tokens.weight", shape=(config.vocab_size, hidden))
    head = embedding if config.ties_embeddings else read("lm_head.weight", shape=(config.vocab_size, hidden))
    return LlamaWeights(
        embedding=embedding,
        layers=[layer(number) for number in range(config.num_layers)],
        final_norm=read("model.norm.weight", shape=(hidden,)),
        head=head,
    )
