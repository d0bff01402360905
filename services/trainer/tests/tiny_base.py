"""Writes a model store with a tiny Llama of random weights over bytes: all of the training path, none of the wait."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from modelstore.manifest import write_manifest

MODEL = "tiny"
CONTEXT = 256
EOS = 257
_SPECIALS = ("<|im_start|>", "<|im_end|>")
VOCAB_SIZE = 256 + len(_SPECIALS)

TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def write(store: Path) -> Path:
    """Fills `store`/tiny and returns the store."""
    folder = store / MODEL
    folder.mkdir(parents=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "tie_word_embeddings": True,
        "eos_token_id": EOS,
        "dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
    (folder / "tokenizer.json").write_text(json.dumps(_tokenizer()))
    save_file(_weights(), folder / "model.safetensors", metadata={"format": "pt"})
    write_manifest(
        folder,
        model_id=MODEL,
        kind="llm",
        created_unix_s=1_700_000_000,
        source={},
        config={"architecture": "llama", "context_length": CONTEXT},
    )
    return store


def _weights() -> dict[str, np.ndarray]:
    random = np.random.default_rng(5)
    hidden, inner, kv = 32, 64, 16

    def of(*shape: int) -> np.ndarray:
        return (random.standard_normal(shape) / shape[-1] ** 0.5).astype(np.float32)

    tensors = {"model.embed_tokens.weight": of(VOCAB_SIZE, hidden) * 3, "model.norm.weight": np.ones(hidden, "f4")}
    for layer in range(2):
        at = f"model.layers.{layer}."
        tensors |= {
            at + "self_attn.q_proj.weight": of(hidden, hidden),
            at + "self_attn.k_proj.weight": of(kv, hidden),
            at + "self_attn.v_proj.weight": of(kv, hidden),
            at + "self_attn.o_proj.weight": of(hidden, hidden),
            at + "mlp.gate_proj.weight": of(inner, hidden),
            at + "mlp.up_proj.weight": of(inner, hidden),
            at + "mlp.down_proj.weight": of(hidden, inner),
            at + "input_layernorm.weight": np.ones(hidden, "f4"),
            at + "post_attention_layernorm.weight": np.ones(hidden, "f4"),
        }
    return tensors


def _tokenizer() -> dict[str, object]:
    """A byte-level vocabulary without merges: one token a byte."""
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": 256 + i,
                "content": name,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for i, name in enumerate(_SPECIALS)
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {char: byte for byte, char in _byte_chars().items()}
            | {n: 256 + i for i, n in enumerate(_SPECIALS)},
            "merges": [],
        },
    }


def _byte_chars() -> dict[int, str]:
    """The printable character that stands for each byte (GPT-2's table)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    table = {byte: chr(byte) for byte in printable}
    for byte in range(256):
        if byte not in table:
            table[byte] = chr(256 + len(table) - len(printable))
    return table


def chats(pairs: dict[str, str]) -> bytes:
    """Returns a training file of questions and answers."""
    return "".join(
        json.dumps({"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}) + "\n"
        for q, a in pairs.items()
    ).encode()
