"""Makes adapters for tests: peft's two files with random weights, and whole folders of the model store."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from generator.core.adapters import AdapterFiles, AdapterSpec
from modelstore.manifest import write_manifest

MODULES = {
    "q_proj": "self_attn",
    "k_proj": "self_attn",
    "v_proj": "self_attn",
    "o_proj": "self_attn",
    "gate_proj": "mlp",
    "up_proj": "mlp",
    "down_proj": "mlp",
}


def shapes(config: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """Inputs and outputs of each module of a model with this config.json."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    head = config.get("head_dim") or hidden // config["num_attention_heads"]
    query, kv = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    return {
        "q_proj": (hidden, query),
        "k_proj": (hidden, kv),
        "v_proj": (hidden, kv),
        "o_proj": (query, hidden),
        "gate_proj": (hidden, inner),
        "up_proj": (hidden, inner),
        "down_proj": (inner, hidden),
    }


def tensors(
    config: dict[str, Any], seed: int, rank: int = 4, modules: tuple[str, ...] = tuple(MODULES), strength: float = 0.3
) -> dict[str, torch.Tensor]:
    """Random A and B for every layer, under peft's names."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for layer in range(config["num_hidden_layers"]):
        for module in modules:
            inputs, outputs = shapes(config)[module]
            name = f"base_model.model.model.layers.{layer}.{MODULES[module]}.{module}"
            made[f"{name}.lora_A.weight"] = torch.randn(rank, inputs, generator=generator) / inputs**0.5
            made[f"{name}.lora_B.weight"] = torch.randn(outputs, rank, generator=generator) * strength
    return made


def config_json(rank: int = 4, alpha: float = 4.0, **fields: Any) -> bytes:
    """What peft writes beside the tensors, as far as it matters."""
    return json.dumps({"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "bias": "none", **fields}).encode()


def spec(adapter_id: str, content: bytes = b"", created_unix_s: int = 1) -> AdapterSpec:
    """The spec of an adapter with this content."""
    digest = hashlib.sha256(adapter_id.encode() + content).hexdigest()
    return AdapterSpec(adapter_id, adapter_id.partition(":")[0], digest, created_unix_s)


def files(adapter_id: str, config: dict[str, Any], seed: int, **options: Any) -> AdapterFiles:
    """An adapter with random weights for a model with this config.json."""
    content = save(tensors(config, seed, **options))
    return AdapterFiles(spec(adapter_id, content), config_json(options.get("rank", 4)), content)


def publish(
    store: Path, job_id: str, adapter: AdapterFiles, base_version: str, created_unix_s: int = 1, **config: Any
) -> str:
    """Writes an adapter into a model store as the trainer does; returns its manifest's sha256."""
    folder = store / "adapters" / job_id
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_bytes(adapter.config)
    (folder / "adapter_model.safetensors").write_bytes(adapter.tensors)
    write_manifest(
        folder,
        model_id=adapter.spec.id,
        kind="adapter",
        created_unix_s=created_unix_s,
        source={},
        config={"base": adapter.spec.base, "base_version": base_version} | config,
    )
    return hashlib.sha256((folder / "manifest.json").read_bytes()).hexdigest()
