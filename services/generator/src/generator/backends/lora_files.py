"""LoRA adapters (arXiv 2106.09685) in peft's format: read, checked, and handed over as float32 arrays.

An adapted linear layer is W x + (alpha / r) B A x. What peft can save beyond that is refused by name. Knows no
framework: each runner lays the arrays out as its own arithmetic needs them.

Legend: r rank, I inputs and O outputs of a linear layer.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, deserialize

from chassis.errors import Code, PlatformError
from generator.core.adapters import AdapterFiles

Floats = NDArray[np.float32]
LoraModule = Literal["q", "k", "v", "o", "gate", "up", "down"]

MODULES: tuple[LoraModule, ...] = get_args(LoraModule)
MAX_RANK = 512
_PATHS: Mapping[str, LoraModule] = {
    **{f"self_attn.{name}_proj": name for name in MODULES[:4]},
    **{f"mlp.{name}_proj": name for name in MODULES[4:]},
}
_KEY = re.compile(
    r"base_model\.model\.(model\.layers\.(\d{1,5})\.((?:self_attn|mlp)\.[a-z]+_proj))\.lora_([AB])\.weight", re.ASCII
)
# What has no bearing on the arithmetic: how it was trained, where from, which layers (the tensors themselves say that).
_IRRELEVANT = frozenset(
    {
        "peft_type", "task_type", "r", "lora_alpha", "use_rslora", "bias", "init_lora_weights",  # looked at below
        "rank_pattern", "alpha_pattern",
        "auto_mapping", "base_model_name_or_path", "revision", "peft_version", "inference_mode", "lora_dropout",
        "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "megatron_core",
        "qalora_group_size", "eva_config", "lora_ga_config",
    }
)  # fmt: skip
# These leave the base as it is; the others (PiSSA, OLoRA, LoftQ, CorDA) train against a changed base.
_PLAIN_INITS = frozenset({True, False, "gaussian", "eva", "orthogonal"})
# peft takes a pattern's keys for regular expressions. Names of modules are all that anyone needs, and an expression
# that a stranger wrote may take for ever.
_PATTERN_KEY = re.compile(r"\^?[A-Za-z0-9_.]{1,200}", re.ASCII)
_MAX_PATTERN_KEYS = 1000
_FLOATS: Mapping[str, np.dtype[Any]] = {"F64": np.dtype("<f8"), "F32": np.dtype("<f4"), "F16": np.dtype("<f2")}


@dataclass(frozen=True, slots=True)
class LoraShape:
    """The base that an adapter must fit: sizes of its linear layers, the same in every decoder layer."""

    num_layers: int
    hidden_size: int
    inner_size: int  # of the MLP
    query_size: int  # heads times head size
    kv_size: int  # heads of keys times head size

    def sizes(self, module: LoraModule) -> tuple[int, int]:
        """Returns inputs and outputs of a module."""
        match module:
            case "q":
                return self.hidden_size, self.query_size
            case "k" | "v":
                return self.hidden_size, self.kv_size
            case "o":
                return self.query_size, self.hidden_size
            case "gate" | "up":
                return self.hidden_size, self.inner_size
            case "down":
                return self.inner_size, self.hidden_size


@dataclass(frozen=True, slots=True, eq=False)
class LoraPair:
    """What is added to one linear layer: B A x. The scale is in B already."""

    a: Floats  # [r, I]
    b: Floats  # [O, r]

    @property
    def rank(self) -> int:
        return int(self.a.shape[0])


LoraLayer = Mapping[LoraModule, LoraPair]  # without the modules that the adapter leaves alone


def read_lora(files: AdapterFiles, shape: LoraShape) -> tuple[LoraLayer, ...]:
    """Reads an adapter's additions, one mapping for each decoder layer of the base. Blocks for a fraction of a second.

    Raises PlatformError: INVALID_ARGUMENT for what no runner here can apply, DATA_LOSS for what cannot be right.
    """
    scales = _Scales.read(files)
    try:
        tensors: list[tuple[str, dict[str, Any]]] = deserialize(files.tensors)  # type: ignore[no-untyped-call]
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise _damaged(files, f"adapter_model.safetensors cannot be read: {error}") from error
    if not tensors:
        raise _damaged(files, "adapter_model.safetensors holds no tensors")
    sides: dict[tuple[int, LoraModule, str], Floats] = {}
    for key, tensor in tensors:
        place, module_path = _place(files, key, shape)
        sides[place] = _read_side(files, key, tensor, place, shape, scales.of(module_path))
    return tuple(_join(files, number, sides) for number in range(shape.num_layers))


@dataclass(frozen=True, slots=True)
class _Scale:
    rank: int
    factor: float


@dataclass(frozen=True, slots=True)
class _Scales:
    """Rank and scale of every module: the adapter's own, and what its patterns say of some modules."""

    rank: int
    alpha: float
    is_rooted: bool  # rsLoRA (arXiv 2312.03732): the scale is alpha over the root of the rank
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]

    @classmethod
    def read(cls, files: AdapterFiles) -> "_Scales":
        """Reads and checks adapter_config.json."""
        raw = _read_config(files)
        ranks, alphas = (_read_pattern(files, raw, name) for name in ("rank_pattern", "alpha_pattern"))
        rank, alpha = raw.get("r"), raw.get("lora_alpha")
        for value in (rank, *ranks.values()):
            if type(value) is not int or not 1 <= value <= MAX_RANK:
                raise _unsupported(files, f"rank {value!r} (from 1 to {MAX_RANK})")
        for value in (alpha, *alphas.values()):
            if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
                raise _damaged(files, f"lora_alpha is {value!r}")
        assert isinstance(rank, int) and isinstance(alpha, int | float)
        is_rooted = bool(raw.get("use_rslora"))
        if is_rooted and (ranks or alphas):  # peft itself warns that it does not know the scale then
            raise _unsupported(files, "use_rslora together with rank_pattern or alpha_pattern")
        return cls(rank, alpha, is_rooted, ranks, alphas)

    def of(self, module_path: str) -> _Scale:
        """Returns what holds for a module such as "model.layers.0.mlp.up_proj"."""
        rank = self.rank_pattern.get(_matching(self.rank_pattern, module_path), self.rank)
        alpha = self.alpha_pattern.get(_matching(self.alpha_pattern, module_path), self.alpha)
        return _Scale(rank, alpha / (math.sqrt(rank) if self.is_rooted else rank))


def _read_config(files: AdapterFiles) -> dict[str, Any]:
    try:
        raw = json.loads(files.config)
    except (ValueError, RecursionError) as error:
        raise _damaged(files, f"adapter_config.json cannot be read: {error}") from error
    if not isinstance(raw, dict):
        raise _damaged(files, "adapter_config.json is not an object")
    if raw.get("peft_type") != "LORA":
        raise _unsupported(files, f"peft_type {raw.get('peft_type')!r}")
    if raw.get("bias", "none") != "none":
        raise _unsupported(files, f"bias {raw['bias']!r}")
    init = raw.get("init_lora_weights", True)
    if not isinstance(init, bool | str) or init not in _PLAIN_INITS:
        raise _unsupported(files, f"init_lora_weights {init!r}")
    for name, value in raw.items():
        if name not in _IRRELEVANT and value:
            raise _unsupported(files, name)
    return raw


def _read_pattern(files: AdapterFiles, raw: Mapping[str, Any], name: str) -> dict[str, Any]:
    pattern = raw.get(name) or {}
    if not isinstance(pattern, dict) or len(pattern) > _MAX_PATTERN_KEYS:
        raise _damaged(files, f"{name} is no mapping of at most {_MAX_PATTERN_KEYS} names")
    for key in pattern:
        if not _PATTERN_KEY.fullmatch(key):
            raise _unsupported(files, f"{name} with {key[:100]!r} (names of modules, after ^ perhaps, are)")
    return pattern


def _matching(pattern: Mapping[str, object], module_path: str) -> str:
    """Returns the first key that names a module, as peft finds it: its whole path or the end of it, "" for none."""
    for key in pattern:
        if module_path == key.removeprefix("^") or (key[0] != "^" and module_path.endswith(f".{key}")):
            return key
    return ""


def _place(files: AdapterFiles, key: str, shape: LoraShape) -> tuple[tuple[int, LoraModule, str], str]:
    """Returns layer, module and side ("A" or "B") of a tensor's name, and the path of its module."""
    match = _KEY.fullmatch(key)
    module = _PATHS.get(match[3]) if match else None
    if match is None or module is None:
        raise _unsupported(files, f"tensor {key[:200]!r} (LoRA on q, k, v, o, gate, up and down is)")
    if int(match[2]) >= shape.num_layers:
        raise _damaged(files, f"{key} is for a layer that the base has not got: it has {shape.num_layers}")
    return (int(match[2]), module, match[4]), match[1]


def _read_side(
    files: AdapterFiles,
    key: str,
    tensor: Mapping[str, Any],
    place: tuple[int, LoraModule, str],
    shape: LoraShape,
    scale: _Scale,
) -> Floats:
    _, module, side = place
    inputs, outputs = shape.sizes(module)
    expected = (scale.rank, inputs) if side == "A" else (outputs, scale.rank)
    if tuple(tensor["shape"]) != expected:
        found = tuple(tensor["shape"])
        raise _damaged(files, f"{key} has shape {found} where rank and base say {expected}")
    with np.errstate(over="ignore", invalid="ignore"):  # what overflows is told below
        values = _to_float32(files, key, tensor) * np.float32(scale.factor if side == "B" else 1.0)
    if not np.isfinite(values).all():
        raise _damaged(files, f"{key} holds values that are not finite")
    return values.reshape(expected)


def _to_float32(files: AdapterFiles, key: str, tensor: Mapping[str, Any]) -> Floats:
    """numpy has no bfloat16: its 16 bits are the upper half of a float32."""
    kind = tensor["dtype"]
    if kind == "BF16":
        bits = np.frombuffer(tensor["data"], dtype="<u2").astype(np.uint32) << 16
        return bits.view(np.float32)
    if kind not in _FLOATS:
        raise _unsupported(files, f"{kind.replace('I', 'int').replace('U', 'uint')} in {key}")
    return np.frombuffer(tensor["data"], dtype=_FLOATS[kind]).astype(np.float32)


def _join(
    files: AdapterFiles, number: int, sides: Mapping[tuple[int, LoraModule, str], Floats]
) -> dict[LoraModule, LoraPair]:
    layer: dict[LoraModule, LoraPair] = {}
    for module in MODULES:
        a, b = sides.get((number, module, "A")), sides.get((number, module, "B"))
        if a is not None and b is not None:
            layer[module] = LoraPair(a, b)
        elif a is not None or b is not None:
            raise _damaged(files, f"layer {number}, {module}_proj has only one of lora_A and lora_B")
    return layer


def _unsupported(files: AdapterFiles, what: str) -> PlatformError:
    message = f"adapter {files.spec.id!r}: this engine does not support {what}"
    return PlatformError(Code.INVALID_ARGUMENT, message, reason="adapter_unsupported")


def _damaged(files: AdapterFiles, why: str) -> PlatformError:
    return PlatformError(Code.DATA_LOSS, f"adapter {files.spec.id!r}: {why}", reason="adapter_damaged")
