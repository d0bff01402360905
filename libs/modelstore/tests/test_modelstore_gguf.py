"""GGUF files that people bring: converted where that is sound, refused with the reason where it is not."""

import struct
from pathlib import Path
from typing import Any

import gguf
import modelstore_tiny as tiny
import numpy as np
import pytest

from chassis.errors import Code, PlatformError
from modelstore.adding import Order, add
from modelstore.catalogue import entries
from modelstore.tensors import TensorFile

NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "model.layers": "blk",
}


def _interleave(rows: Any, num_heads: int) -> Any:
    """llama.cpp's order of the rotary dimensions."""
    half = rows.shape[0] // num_heads // 2
    return rows.reshape(num_heads, 2, half, -1).swapaxes(1, 2).reshape(rows.shape)


def _write(path: Path, **changes: Any) -> Path:
    """A GGUF file of the tiny Llama; `changes` are fields with dots written as double underscores."""
    alphabet = sorted(tiny.pre_tokenizers.ByteLevel.alphabet())
    fields: dict[str, Any] = {
        "llama.context_length": 512,
        "llama.embedding_length": 64,
        "llama.block_count": 2,
        "llama.feed_forward_length": 96,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": [*alphabet, "<|end|>", "<a>", "<b>", "<c>"],
        "tokenizer.ggml.token_type": [1] * 256 + [3] * 4,
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.eos_token_id": 256,
    } | {key.replace("__", "."): value for key, value in changes.items()}
    fields["tokenizer.ggml.tokens"][255] = "ab"  # in place of a byte, so that the one merge has its token
    writer = gguf.GGUFWriter(path, fields.pop("general.architecture", "llama"))
    for name, value in fields.items():
        if isinstance(value, list):
            writer.add_array(name, value)
        elif isinstance(value, str):
            writer.add_string(name, value)
        elif isinstance(value, float):
            writer.add_float32(name, value)
        elif value is not None:
            writer.add_uint32(name, value)
    for name, claim in tiny.claims().items():
        values = claim.make()
        heads = 4 if "q_proj" in name else 2 if "k_proj" in name else 0
        for ours, theirs in NAMES.items():
            name = name.replace(ours, theirs)
        writer.add_tensor(name, _interleave(values, heads) if heads else values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "store"


def _refused(store: Path, path: Path) -> PlatformError:
    with pytest.raises(PlatformError) as caught:
        add(store, Order(str(path)), lambda *_: None)
    assert entries(store) == [] and not [p for p in store.glob(".add-*") if p.is_dir()]
    return caught.value


def test_a_file_gives_the_weights_that_the_folder_gives(store: Path, tmp_path: Path) -> None:
    def nothing(*_: object) -> None: ...

    made = add(store, Order(str(_write(tmp_path / "Mine.gguf"))), nothing).manifest
    folder = add(store, Order(str(tiny.write(tmp_path / "folder"))), nothing).manifest
    assert made.id == "mine" and made.config["quantisation"].keys() == {"int4"}
    ours, theirs = TensorFile(made.path("model.safetensors")), TensorFile(folder.path("model.safetensors"))
    assert ours.entries.keys() == theirs.entries.keys()
    for name in theirs.entries:
        np.testing.assert_array_equal(ours.raw(name), theirs.raw(name))


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"general__architecture": "mamba"}, "mamba"),
        ({"tokenizer__ggml__model": "llama"}, "byte-level"),
        ({"tokenizer__ggml__pre": "llama-bpe"}, "llama-bpe"),
        ({"llama__rope__scaling__type": "yarn"}, "yarn"),
        ({"llama__rope__dimension_count": 8}, "rotates a part"),
    ],
)
def test_what_would_become_another_model_is_refused(
    store: Path, tmp_path: Path, changes: dict[str, Any], word: str
) -> None:
    error = _refused(store, _write(tmp_path / "m.gguf", **changes))
    assert error.code is Code.FAILED_PRECONDITION and word in error.message


def test_shapes_other_than_the_files_own_fields_say_are_damage(store: Path, tmp_path: Path) -> None:
    assert _refused(store, _write(tmp_path / "m.gguf", llama__feed_forward_length=128)).code is Code.DATA_LOSS


def test_damaged_files_are_damage(store: Path, tmp_path: Path) -> None:
    whole = _write(tmp_path / "m.gguf").read_bytes()
    key = struct.pack("<Q", len("llama.context_length")) + b"llama.context_length"
    huge_key = whole.replace(key, struct.pack("<Q", 2**63) + b"llama.context_length")
    counts = struct.pack("<IQQ", 3, 2**63, 5), struct.pack("<IQQ", 3, 5, 2**63), struct.pack("<IQQ", 3, 2000, 2000)
    heads = [b"GGUF" + count + whole[24:] for count in counts]
    path = tmp_path / "m.gguf"
    for content in (b"", b"GGUF", b"PK" + whole[2:], *heads, huge_key, whole[:3000], whole[: len(whole) // 2]):
        path.write_bytes(content)
        assert _refused(store, path).code is Code.DATA_LOSS
