"""Writes a model folder with a tiny Llama of random weights over bytes: all of the torch path, none of the wait."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from generator.backends.toy import EOS, VOCAB_SIZE

CONFIG = {
    "model_type": "llama",
    "hidden_act": "silu",
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "tie_word_embeddings": True,
    "eos_token_id": EOS,
}


# As small as the native kernels' registers allow.
NATIVE_CONFIG = CONFIG | {
    "hidden_size": 64,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
}


def write(folder: Path, config: Mapping[str, Any] = CONFIG) -> Path:
    """Fills a folder with config.json and model.safetensors."""
    generator = torch.Generator().manual_seed(5)
    hidden, inner, size = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    query, kv = config["num_attention_heads"] * size, config["num_key_value_heads"] * size

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * (1.5 / shape[-1] ** 0.5)

    tensors = {"model.embed_tokens.weight": random(VOCAB_SIZE, hidden) * 3, "model.norm.weight": torch.ones(hidden)}
    for layer in range(2):
        at = f"model.layers.{layer}."
        tensors |= {
            at + "self_attn.q_proj.weight": random(query, hidden),
            at + "self_attn.k_proj.weight": random(kv, hidden),
            at + "self_attn.v_proj.weight": random(kv, hidden),
            at + "self_attn.o_proj.weight": random(hidden, query),
            at + "mlp.gate_proj.weight": random(inner, hidden),
            at + "mlp.up_proj.weight": random(inner, hidden),
            at + "mlp.down_proj.weight": random(hidden, inner),
            at + "input_layernorm.weight": 1 + 0.1 * random(hidden),
            at + "post_attention_layernorm.weight": 1 + 0.1 * random(hidden),
        }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder
