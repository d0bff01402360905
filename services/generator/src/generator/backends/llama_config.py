"""The shape of a Llama-architecture model, as config.json tells it, for every runner of ours. Knows no framework."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chassis.errors import Code, PlatformError


@dataclass(frozen=True, slots=True)
class Llama3Scaling:
    """Stretches long wavelengths by `factor` and leaves short ones, with a slope between (Llama 3.1's rope_type)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_context: int


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
    rope_scaling: Llama3Scaling | None
    ties_embeddings: bool
    eos_token_ids: frozenset[int]

    @classmethod
    def load(cls, folder: Path) -> "LlamaConfig":
        """Reads config.json and generation_config.json. Raises PlatformError for what no runner of ours can run."""
        raw = json.loads((folder / "config.json").read_text())
        rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
        rope_type = rope.get("rope_type", "default")
        unsupported = [
            name
            for name, is_so in (
                (f"model_type {raw.get('model_type')!r}", raw.get("model_type") != "llama"),
                (f"hidden_act {raw.get('hidden_act')!r}", raw.get("hidden_act") != "silu"),
                ("attention_bias", bool(raw.get("attention_bias"))),
                ("mlp_bias", bool(raw.get("mlp_bias"))),
                (f"RoPE of type {rope_type!r}", rope_type not in ("default", "llama3")),
            )
            if is_so
        ]
        if unsupported:
            what = ", ".join(unsupported)
            raise PlatformError(Code.FAILED_PRECONDITION, f"{folder.name}: no engine of ours supports {what}")
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
            rope_scaling=_llama3(rope, raw) if rope_type == "llama3" else None,
            ties_embeddings=bool(raw.get("tie_word_embeddings")),
            eos_token_ids=_eos_ids(raw) | _eos_ids(_read_optional(folder / "generation_config.json")),
        )


def _llama3(rope: dict[str, Any], raw: dict[str, Any]) -> Llama3Scaling:
    return Llama3Scaling(
        factor=float(rope["factor"]),
        low_freq_factor=float(rope["low_freq_factor"]),
        high_freq_factor=float(rope["high_freq_factor"]),
        original_context=int(rope.get("original_max_position_embeddings") or raw["original_max_position_embeddings"]),
    )


def _eos_ids(raw: dict[str, Any]) -> frozenset[int]:
    ids = raw.get("eos_token_id")
    return frozenset() if ids is None else frozenset([ids] if isinstance(ids, int) else ids)


def _read_optional(path: Path) -> dict[str, Any]:
    content = json.loads(path.read_text()) if path.exists() else {}
    return content if isinstance(content, dict) else {}
