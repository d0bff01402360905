"""Reads a model folder: its shape from config.json, its weights from safetensors (never pickle), fused for speed."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from chassis.errors import Code, PlatformError


@dataclass(frozen=True, slots=True)
class LlamaConfig:
    """The shape of a Llama-architecture model."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    context_length: int
    rms_norm_eps: float
    rope_theta: float
    ties_embeddings: bool
    eos_token_ids: frozenset[int]

    @classmethod
    def load(cls, folder: Path) -> "LlamaConfig":
        """Reads config.json and generation_config.json. Raises PlatformError for what this runner cannot run."""
        raw = json.loads((folder / "config.json").read_text())
        rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
        unsupported = [
            name
            for name, is_so in (
                (f"model_type {raw.get('model_type')!r}", raw.get("model_type") != "llama"),
                (f"hidden_act {raw.get('hidden_act')!r}", raw.get("hidden_act") != "silu"),
                ("attention_bias", bool(raw.get("attention_bias"))),
                ("mlp_bias", bool(raw.get("mlp_bias"))),
                ("scaled RoPE", rope.get("rope_type", "default") != "default"),
            )
            if is_so
        ]
        if unsupported:
            what = ", ".join(unsupported)
            raise PlatformError(Code.FAILED_PRECONDITION, f"{folder.name}: the torch runner does not support {what}")
        heads = raw["num_attention_heads"]
        return cls(
            vocab_size=raw["vocab_size"],
            hidden_size=raw["hidden_size"],
            intermediate_size=raw["intermediate_size"],
            num_layers=raw["num_hidden_layers"],
            num_heads=heads,
            num_kv_heads=raw.get("num_key_value_heads") or heads,
            head_dim=raw.get("head_dim") or raw["hidden_size"] // heads,
            context_length=raw["max_position_embeddings"],
            rms_norm_eps=raw["rms_norm_eps"],
            rope_theta=rope.get("rope_theta") or raw["rope_theta"],
            ties_embeddings=bool(raw.get("tie_word_embeddings")),
            eos_token_ids=_eos_ids(raw) | _eos_ids(_read_optional(folder / "generation_config.json")),
        )


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


def load_weights(path: Path, config: LlamaConfig, dtype: torch.dtype) -> LlamaWeights:
    """Reads the weights into memory of this process. Raises PlatformError(DATA_LOSS) for a file that is not whole."""
    try:
        with safe_open(path, framework="pt") as file:
            return _assemble(file, config, dtype)
    except SafetensorError as error:
        raise PlatformError(Code.DATA_LOSS, f"{path.name} cannot be read: {error}") from error


def _assemble(file: Any, config: LlamaConfig, dtype: torch.dtype) -> LlamaWeights:
    def read(*names: str, shape: tuple[int, int] | tuple[int]) -> Tensor:
        # Always copied: a view would keep the file mapped, and a file that shrinks under a map kills the process.
        parts = [file.get_tensor(name) for name in names]
        joined = torch.cat(parts).to(dtype) if len(parts) > 1 else parts[0].to(dtype, copy=True)
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


def _eos_ids(raw: dict[str, Any]) -> frozenset[int]:
    ids = raw.get("eos_token_id")
    return frozenset() if ids is None else frozenset([ids] if isinstance(ids, int) else ids)


def _read_optional(path: Path) -> dict[str, Any]:
    content = json.loads(path.read_text()) if path.exists() else {}
    return content if isinstance(content, dict) else {}
