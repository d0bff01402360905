"""What a model's files must be before anything is made of them: their configuration, weights, tokenizer and template.

Nothing here runs what came with the model, and nothing is read whole before its size was looked at.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chassis.errors import Code, PlatformError
from modelstore.chat_sandbox import MAX_TEMPLATE_BYTES, check_template
from modelstore.tensors import TensorEntry

PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".npy", ".npz", ".h5", ".keras", ".msgpack")
_MAX_JSON_BYTES = 1024 * 1024
_MAX_TOKENIZER_BYTES = 64 * 1024 * 1024
_MAX_NUMBER = 1 << 24
_FLOATS = ("BF16", "F16", "F32", "F64")
_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token")


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes of a Llama that its weights follow from."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    context_length: int
    ties_embeddings: bool

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Returns the name and the shape of every weight."""
        hidden, inner = self.hidden_size, self.intermediate_size
        query, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        found: dict[str, tuple[int, ...]] = {
            "model.embed_tokens.weight": (self.vocab_size, hidden),
            "model.norm.weight": (hidden,),
        }
        if not self.ties_embeddings:
            found["lm_head.weight"] = (self.vocab_size, hidden)
        for layer in range(self.num_layers):
            at = f"model.layers.{layer}."
            found |= {
                f"{at}input_layernorm.weight": (hidden,),
                f"{at}self_attn.q_proj.weight": (query, hidden),
                f"{at}self_attn.k_proj.weight": (kv, hidden),
                f"{at}self_attn.v_proj.weight": (kv, hidden),
                f"{at}self_attn.o_proj.weight": (hidden, query),
                f"{at}post_attention_layernorm.weight": (hidden,),
                f"{at}mlp.gate_proj.weight": (inner, hidden),
                f"{at}mlp.up_proj.weight": (inner, hidden),
                f"{at}mlp.down_proj.weight": (hidden, inner),
            }
        return found


def read_json(path: Path, max_bytes: int = _MAX_JSON_BYTES) -> dict[str, Any]:
    """Reads a JSON object that a stranger wrote. Raises PlatformError(INVALID_ARGUMENT)."""
    document = _parse(path.name, _read_text(path, max_bytes))
    if not isinstance(document, dict):
        raise _refused(f"{path.name} is no JSON object")
    return document


def check_config(config: Mapping[str, Any]) -> Shape:
    """Returns what a config.json says. INVALID_ARGUMENT for what cannot be, FAILED_PRECONDITION for another kind."""
    refuse_code(config, "config.json")
    if "quantization_config" in config:
        raise _unsupported("its weights are quantised already; add the model that they were made from")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    rope_type = rope.get("rope_type", rope.get("type", "default")) if isinstance(rope, dict) else rope
    unsupported = [
        config.get("model_type") != "llama" and f"model_type {config.get('model_type')!r}",
        config.get("hidden_act", "silu") != "silu" and f"hidden_act {config.get('hidden_act')!r}",
        bool(config.get("attention_bias") or config.get("mlp_bias")) and "biases",
        rope_type != "default" and f"RoPE of type {rope_type!r}",
    ]
    if found := [what for what in unsupported if what]:
        raise _unsupported(f"the engines run Llama models without {' and '.join(map(str, found))}")
    heads = _number(config, "num_attention_heads")
    hidden = _number(config, "hidden_size")
    shape = Shape(
        vocab_size=_number(config, "vocab_size"),
        hidden_size=hidden,
        intermediate_size=_number(config, "intermediate_size"),
        num_layers=_number(config, "num_hidden_layers", most=1024),
        num_heads=heads,
        num_kv_heads=_number(config, "num_key_value_heads", heads),
        head_dim=_number(config, "head_dim", hidden // heads),
        context_length=_number(config, "max_position_embeddings"),
        ties_embeddings=bool(config.get("tie_word_embeddings", False)),
    )
    if shape.num_heads % shape.num_kv_heads or shape.head_dim % 2:
        raise _refused(f"config.json contradicts itself: {heads} heads, {shape.num_kv_heads} of keys")
    return shape


def refuse_code(config: Mapping[str, Any], name: str) -> None:
    """Raises INVALID_ARGUMENT for a configuration that wants code which came with the model to be run."""
    for key in ("auto_map", "custom_pipelines", "trust_remote_code"):
        if config.get(key):
            raise _refused(f"{name} has {key!r}: the model wants its own code to be run, which is never done here")


def check_weights(shape: Shape, entries: Mapping[str, TensorEntry]) -> None:
    """Compares a header with the configuration. Raises DATA_LOSS for missing or other tensors."""
    expected = shape.tensors()
    if missing := expected.keys() - entries.keys():
        raise _damaged(f"{len(missing)} of {len(expected)} tensors are missing, such as {min(missing)!r}")
    for name, wanted in expected.items():
        entry = entries[name]
        if entry.shape != wanted:
            raise _damaged(f"tensor {name!r} has the shape {entry.shape} where config.json says {wanted}")
        if entry.dtype not in _FLOATS:
            raise _damaged(f"tensor {name!r} is of type {entry.dtype}; weights are one of {', '.join(_FLOATS)}")
    tied = {"lm_head.weight"} if shape.ties_embeddings else set()
    unknown = [n for n in entries if n not in expected and n not in tied and not n.endswith("rotary_emb.inv_freq")]
    if unknown:
        raise _refused(f"{len(unknown)} tensors are none of a Llama's, such as {min(unknown)!r}")


def check_tokenizer(path: Path, shape: Shape) -> None:
    """Raises FAILED_PRECONDITION for a tokenizer that is not served, INVALID_ARGUMENT for one that cannot be."""
    if not path.exists():
        raise _unsupported("it has no tokenizer.json, the only form of tokenizer that is read")
    text = _read_text(path, _MAX_TOKENIZER_BYTES)
    document = _parse(path.name, text)
    decoder = document.get("decoder") if isinstance(document, dict) else None
    if not isinstance(decoder, dict) or decoder.get("type") != "ByteLevel":
        raise _unsupported(f"only byte-level tokenizers are served; its decoder is {str(decoder)[:200]}")
    from tokenizers import Tokenizer

    try:
        num_tokens = Tokenizer.from_str(text).get_vocab_size(with_added_tokens=True)
    except Exception as error:  # the library raises nothing narrower
        raise _refused(f"tokenizer.json cannot be read: {error}") from error
    if num_tokens > shape.vocab_size:
        raise _refused(f"tokenizer.json has {num_tokens} tokens; the model has {shape.vocab_size}")


def read_template(folder: Path, tokenizer_config: Mapping[str, Any]) -> str | None:
    """Returns the chat template of a folder, which was checked; None where there is none."""
    path = folder / "chat_template.jinja"
    if path.exists():
        source = _read_text(path, MAX_TEMPLATE_BYTES)
    else:
        found = tokenizer_config.get("chat_template")
        if isinstance(found, list):  # several by name, in older files
            named = {one.get("name"): one.get("template") for one in found if isinstance(one, dict)}
            found = named.get("default")
        if found is None:
            return None
        if not isinstance(found, str):
            raise _refused("the chat template in tokenizer_config.json is no text")
        source = found
    check_template(source, special_tokens_of(tokenizer_config))
    return source


def special_tokens_of(tokenizer_config: Mapping[str, Any]) -> dict[str, str]:
    """Returns the special tokens by name, as templates get them."""
    found = {}
    for name in _SPECIAL_NAMES:
        value = tokenizer_config.get(name)
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str):
            found[name] = text
    return found


def eos_token_ids(*configs: Mapping[str, Any]) -> list[int]:
    """Returns the ids that end a text, from all configurations of a model."""
    found: set[int] = set()
    for config in configs:
        value = config.get("eos_token_id")
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(type(token_id) is int and token_id >= 0 for token_id in ids):
            raise _refused(f"eos_token_id is {str(value)[:200]}")
        found.update(ids)
    return sorted(found)


def _number(config: Mapping[str, Any], name: str, default: int | None = None, most: int = _MAX_NUMBER) -> int:
    value = config.get(name)
    if value is None:
        value = default
    if type(value) is not int or not 1 <= value <= most:
        raise _refused(f"config.json says {name} is {str(value)[:100]}; it must be from 1 to {most}")
    return value


def _read_text(path: Path, max_bytes: int) -> str:
    with path.open("rb") as file:
        raw = file.read(max_bytes + 1)
    if len(raw) > max_bytes:
        raise _refused(f"{path.name} is larger than {max_bytes} bytes")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _refused(f"{path.name} is no text in UTF-8") from error


def _parse(name: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _refused(f"{name} is no JSON: {error}") from error


def _refused(why: str) -> PlatformError:
    return PlatformError(Code.INVALID_ARGUMENT, f"the model is refused: {why}", param="source")


def _unsupported(why: str) -> PlatformError:
    return PlatformError(Code.FAILED_PRECONDITION, f"the model cannot be served: {why}", param="source")


def _damaged(why: str) -> PlatformError:
    return PlatformError(Code.DATA_LOSS, f"the weights are damaged: {why}", param="source")
