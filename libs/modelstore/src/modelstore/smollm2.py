"""Makes a transformers folder (bf16 safetensors, tokenizer, configuration) of SmolLM2's GGUF file.

The weights are dequantised straight from the file: the result is bit for bit that of transformers' own GGUF loader
(a test compares them), in 8 s instead of 34 s.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from chassis.errors import Code, PlatformError

Progress = Callable[[int, int], None]

_LEAVES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_CONTROL_TOKEN = 3  # GGUF's type of a token that text cannot spell


def convert(gguf_path: Path, target: Path, progress: Progress) -> dict[str, Any]:
    """Writes the model's files into `target` and returns the `config` of its manifest. Blocks for about 20 s."""
    import gguf

    reader = gguf.GGUFReader(gguf_path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    if fields["general.architecture"] != "llama" or fields["tokenizer.ggml.pre"] != "smollm":
        raise PlatformError(Code.FAILED_PRECONDITION, f"{gguf_path.name} is not a SmolLM model")
    config = _model_config(fields)
    _write_weights(reader.tensors, config, target / "model.safetensors", progress)
    _write_tokenizer(fields, target)
    _write_json(target / "config.json", config)
    _write_json(
        target / "generation_config.json",
        {name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")},
    )
    return {
        "architecture": "llama",
        "dtype": "bfloat16",
        "context_length": config["max_position_embeddings"],
        "vocab_size": config["vocab_size"],
        "eos_token_ids": [config["eos_token_id"]],
    }


def _write_weights(tensors: Any, config: Mapping[str, Any], path: Path, progress: Progress) -> None:
    import numpy as np
    import torch
    from gguf import quants
    from safetensors.torch import save_file

    weights = {}
    for index, tensor in enumerate(tensors):
        values = quants.dequantize(tensor.data, tensor.tensor_type)
        if ".attn_q." in tensor.name:
            values = _split_halves(values, config["num_attention_heads"])
        elif ".attn_k." in tensor.name:
            values = _split_halves(values, config["num_key_value_heads"])
        weights[_weight_name(tensor.name)] = torch.from_numpy(np.array(values)).to(torch.bfloat16)
        progress(index + 1, len(tensors))
    save_file(weights, path, metadata={"format": "pt"})


def _split_halves(rows: Any, num_heads: int) -> Any:
    """Undoes llama.cpp's order of the rotary dimensions: it interleaves the two halves of a head, transformers not."""
    half = rows.shape[0] // num_heads // 2
    return rows.reshape(num_heads, half, 2, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)


def _weight_name(gguf_name: str) -> str:
    match gguf_name.split("."):
        case ["token_embd", "weight"]:
            return "model.embed_tokens.weight"
        case ["output_norm", "weight"]:
            return "model.norm.weight"
        case ["blk", layer, leaf, "weight"]:
            return f"model.layers.{layer}.{_LEAVES[leaf]}.weight"
    raise PlatformError(Code.FAILED_PRECONDITION, f"unknown tensor {gguf_name} in the GGUF file")


def _model_config(fields: Mapping[str, Any]) -> dict[str, Any]:
    hidden_size = int(fields["llama.embedding_length"])
    num_heads = int(fields["llama.attention.head_count"])
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": int(fields["tokenizer.ggml.bos_token_id"]),
        "dtype": "bfloat16",
        "eos_token_id": int(fields["tokenizer.ggml.eos_token_id"]),
        "head_dim": hidden_size // num_heads,
        "hidden_act": "silu",
        "hidden_size": hidden_size,
        "initializer_range": hidden_size**-0.5,
        "intermediate_size": int(fields["llama.feed_forward_length"]),
        "max_position_embeddings": int(fields["llama.context_length"]),
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": num_heads,
        "num_hidden_layers": int(fields["llama.block_count"]),
        "num_key_value_heads": int(fields["llama.attention.head_count_kv"]),
        "pad_token_id": int(fields["tokenizer.ggml.padding_token_id"]),
        # GGUF keeps float32; 7 digits give back the 1e-05 that was meant.
        "rms_norm_eps": float(f"{float(fields['llama.attention.layer_norm_rms_epsilon']):.7g}"),
        "rope_parameters": {"rope_theta": float(fields["llama.rope.freq_base"]), "rope_type": "default"},
        "tie_word_embeddings": True,  # the file has no output matrix of its own
        "use_cache": True,
        "vocab_size": int(fields["llama.vocab_size"]),
    }


def _write_tokenizer(fields: Mapping[str, Any], target: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges))
    # "smollm" splits off every digit. transformers' GGUF loader forgets that, and so reads the spaces before a number
    # as other tokens than the model was trained on.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = fields["tokenizer.ggml.token_type"]
    tokenizer.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token, kind in zip(tokens, kinds, strict=True)
            if kind == _CONTROL_TOKEN
        ]
    )
    tokenizer.save(str(target / "tokenizer.json"))
    (target / "chat_template.jinja").write_text(fields["tokenizer.chat_template"], encoding="utf-8")
    special = {name: tokens[fields[f"tokenizer.ggml.{key}_token_id"]] for name, key in _SPECIAL.items()}
    _write_json(
        target / "tokenizer_config.json",
        {
            **special,
            "clean_up_tokenization_spaces": False,
            "model_max_length": int(fields["llama.context_length"]),
            "tokenizer_class": "PreTrainedTokenizerFast",
        },
    )


_SPECIAL = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding", "unk_token": "unknown"}


def _write_json(path: Path, document: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
