"""Writes the folder of a tiny Llama with random weights and a byte-level tokenizer, as somebody might bring it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from modelstore.tensors import TensorClaim, claim_of, write_tensors
from modelstore.vetting import check_config

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "vocab_size": 260,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "eos_token_id": 256,
}
TEMPLATE = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{{ eos_token }}{% endfor %}"


def write(folder: Path, seed: int = 5, **changes: Any) -> Path:
    """Fills a folder; `changes` go into config.json, None takes a field away."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {key: value for key, value in (CONFIG | changes).items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))
    write_tensors(folder / "model.safetensors", claims(seed), {"format": "pt"})
    write_tokenizer(folder)
    named = {"eos_token": "<|end|>", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(named))
    return folder


def claims(seed: int = 5) -> dict[str, TensorClaim]:
    """Random weights in float32, by name."""
    random = np.random.default_rng(seed)
    shapes = check_config(CONFIG).tensors()
    return {n: claim_of(random.standard_normal(shape).astype(np.float32) * 0.05) for n, shape in shapes.items()}


def write_tokenizer(folder: Path) -> None:
    """Writes tokenizer.json: 256 bytes and one special token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|end|>", special=True, normalized=False)])
    tokenizer.save(str(folder / "tokenizer.json"))


def header(document: dict[str, Any], data: bytes = b"", length: int | None = None) -> bytes:
    """Bytes of a safetensors file that says whatever it is told to."""
    text = json.dumps(document).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data
