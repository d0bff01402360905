"""Makes a transformers folder (bf16 safetensors, tokenizer, configuration) of a GGUF file with a Llama in it.

The weights are dequantised straight from the file: the result is bit for bit that of transformers' own GGUF loader
(a test compares them), in 8 s instead of 34 s for SmolLM2-135M.
"""

import json
import struct
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
_PRE_TOKENIZERS = ("smollm", "gpt-2")
_MAX_ENTRIES = 100_000  # of tensors, and of metadata: files have hundreds


def convert(gguf_path: Path, target: Path, progress: Progress) -> dict[str, Any]:
    """Writes the model's files into `target` and returns the `config` of its manifest. Blocks: 20 s for 135 M weights.

    Raises PlatformError: DATA_LOSS for a damaged file, FAILED_PRECONDITION for a model of another kind.
    """
    _check_head(gguf_path)
    try:
        return _convert(gguf_path, target, progress)
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, MemoryError, struct.error) as error:
        message = f"{gguf_path.name} is damaged, or no GGUF file that this reads ({type(error).__name__}: {error})"
        raise PlatformError(Code.DATA_LOSS, message) from error


def _convert(gguf_path: Path, target: Path, progress: Progress) -> dict[str, Any]:
    import gguf

    reader = gguf.GGUFReader(gguf_path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    _check_kind(gguf_path.name, fields)
    ties_embeddings = all(tensor.name != "output.weight" for tensor in reader.tensors)
    config = _model_config(fields, ties_embeddings)
    _write_weights(reader.tensors, config, target / "model.safetensors", progress)
    _write_tokenizer(fields, target)
    _write_json(target / "config.json", config)
    ids = ("bos_token_id", "eos_token_id", "pad_token_id")
    _write_json(target / "generation_config.json", {name: config[name] for name in ids if name in config})
    return {
        "architecture": "llama",
        "dtype": "bfloat16",
        "context_length": config["max_position_embeddings"],
        "vocab_size": config["vocab_size"],
        "eos_token_ids": [config["eos_token_id"]],
    }


def _check_head(path: Path) -> None:
    """The reader believes the counts of the head, and loops that often."""
    with path.open("rb") as file:
        head = file.read(24)
    if len(head) < 24 or head[:4] != b"GGUF":
        raise PlatformError(Code.DATA_LOSS, f"{path.name} is no GGUF file")
    version, num_tensors, num_fields = struct.unpack("<IQQ", head[4:])
    if version not in (2, 3) or max(num_tensors, num_fields) > _MAX_ENTRIES:
        what = f"version {version}, {num_tensors} tensors, {num_fields} fields"
        raise PlatformError(Code.DATA_LOSS, f"{path.name} is damaged, or of a kind that this does not read: {what}")


def _check_kind(name: str, fields: Mapping[str, Any]) -> None:
    """Raises FAILED_PRECONDITION for what would be converted into another model than it is."""
    architecture, pre = fields["general.architecture"], fields.get("tokenizer.ggml.pre")
    scaling = fields.get("llama.rope.scaling.type", "none")
    why = ""
    if architecture != "llama":
        why = f"its architecture is {architecture!r}, not 'llama'"
    elif fields.get("tokenizer.ggml.model") != "gpt2":
        why = f"its tokenizer is {fields.get('tokenizer.ggml.model')!r}; only byte-level BPE ('gpt2') is read"
    elif pre not in _PRE_TOKENIZERS:
        why = (
            f"its pre-tokenizer is {pre!r}; known are {', '.join(_PRE_TOKENIZERS)}: add its safetensors folder instead"
        )
    elif scaling != "none":
        why = f"its RoPE is scaled ({scaling!r})"
    if why:
        raise PlatformError(Code.FAILED_PRECONDITION, f"{name} cannot be converted: {why}")


def _write_weights(tensors: Any, config: Mapping[str, Any], path: Path, progress: Progress) -> None:
    import numpy as np
    import torch
    from gguf import quants
    from safetensors.torch import save_file

    weights = {}
    for index, tensor in enumerate(tensors):
        try:
            values = quants.dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError as error:
            message = f"tensor {tensor.name} has the type {tensor.tensor_type.name}, which cannot be dequantised here"
            raise PlatformError(Code.FAILED_PRECONDITION, message) from error
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
        case ["output", "weight"]:
            return "lm_head.weight"
        case ["blk", layer, leaf, "weight"] if leaf in _LEAVES:
            return f"model.layers.{layer}.{_LEAVES[leaf]}.weight"
    raise PlatformError(Code.FAILED_PRECONDITION, f"unknown tensor {gguf_name} in the GGUF file")


def _model_config(fields: Mapping[str, Any], ties_embeddings: bool) -> dict[str, Any]:
    hidden_size = int(fields["llama.embedding_length"])
    num_heads = int(fields["llama.attention.head_count"])
    head_dim = int(fields.get("llama.attention.key_length", hidden_size // num_heads))
    if int(fields.get("llama.rope.dimension_count", head_dim)) != head_dim:
        raise PlatformError(Code.FAILED_PRECONDITION, "the GGUF file rotates a part of each head; that is not served")
    special = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
    ids = {name: fields.get(f"tokenizer.ggml.{key}_token_id") for name, key in special.items()}
    return {
        **{name: int(value) for name, value in ids.items() if value is not None},
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "dtype": "bfloat16",
        "head_dim": head_dim,
        "hidden_act": "silu",
        "hidden_size": hidden_size,
        "initializer_range": hidden_size**-0.5,
        "intermediate_size": int(fields["llama.feed_forward_length"]),
        "max_position_embeddings": int(fields["llama.context_length"]),
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": num_heads,
        "num_hidden_layers": int(fields["llama.block_count"]),
        "num_key_value_heads": int(fields.get("llama.attention.head_count_kv", num_heads)),
        # GGUF keeps float32; 7 digits give back the 1e-05 that was meant.
        "rms_norm_eps": float(f"{float(fields['llama.attention.layer_norm_rms_epsilon']):.7g}"),
        "rope_parameters": {"rope_theta": float(fields.get("llama.rope.freq_base", 1e4)), "rope_type": "default"},
        "tie_word_embeddings": ties_embeddings,
        "use_cache": True,
        "vocab_size": int(fields.get("llama.vocab_size", len(fields["tokenizer.ggml.tokens"]))),
    }


def _write_tokenizer(fields: Mapping[str, Any], target: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = byte_level
    if fields["tokenizer.ggml.pre"] == "smollm":
        # It splits off every digit. transformers' GGUF loader forgets that, and so reads the spaces before a number as
        # other tokens than the model was trained on.
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    kinds = fields["tokenizer.ggml.token_type"]
    tokenizer.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token, kind in zip(tokens, kinds, strict=True)
            if kind == _CONTROL_TOKEN
        ]
    )
    ids = {name: fields.get(f"tokenizer.ggml.{key}_token_id") for name, key in _SPECIAL.items()}
    special = {name: tokens[token_id] for name, token_id in ids.items() if token_id is not None}
    if fields.get("tokenizer.ggml.add_bos_token"):
        bos = special["bos_token"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, ids["bos_token"])]
        )
    tokenizer.save(str(target / "tokenizer.json"))
    if template := fields.get("tokenizer.chat_template"):
        (target / "chat_template.jinja").write_text(template, encoding="utf-8")
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
