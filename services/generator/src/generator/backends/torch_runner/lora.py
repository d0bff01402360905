"""LoRA adapters (arXiv 2106.09685) in peft's format: read, checked and laid out like the fused weights they add to.

An adapted linear layer is W x + (alpha / r) B A x. What peft can save beyond that is refused by name.

Legend: r rank, I inputs and O outputs of a linear layer, P parts of a fused layer (q, k, v), N tokens of a step.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from chassis.errors import Code, PlatformError
from generator.backends.torch_runner.weights import LlamaConfig
from generator.core.adapters import AdapterFiles

MAX_RANK = 512
_KEY = re.compile(
    r"base_model\.model\.model\.layers\.(\d{1,5})\.(self_attn|mlp)\.([a-z]+_proj)\.lora_([AB])\.weight", re.ASCII
)
# What has no bearing on the arithmetic: how it was trained, where from, which layers (the tensors themselves say that).
_IRRELEVANT = frozenset(
    {
        "peft_type", "task_type", "r", "lora_alpha", "use_rslora", "bias", "init_lora_weights",  # looked at below
        "auto_mapping", "base_model_name_or_path", "revision", "peft_version", "inference_mode", "lora_dropout",
        "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "megatron_core",
        "qalora_group_size", "eva_config", "lora_ga_config",
    }
)  # fmt: skip
# These leave the base as it is; the others (PiSSA, OLoRA, LoftQ, CorDA) train against a changed base.
_PLAIN_INITS = frozenset({True, False, "gaussian", "eva", "orthogonal"})


@dataclass(frozen=True, slots=True)
class LowRank:
    """What is added to one (fused) linear layer: x @ down @ up, with the scale in `up`.

    In float32 whatever the base is in: for the few rows of a decoding step torch's bf16 products of this size take six
    times as long (60 us against 10 for a pair, on two cores), and the adapter keeps what training gave it.
    """

    down: Tensor  # A, transposed: [I, P * r]
    up: Tensor  # B, transposed: [P * r, O], a block for each part


@dataclass(frozen=True, slots=True)
class LayerAdapter:
    """The additions to one decoder layer, fused as LayerWeights are; None where the adapter has none."""

    qkv: LowRank | None
    output: LowRank | None
    gate_up: LowRank | None
    down: LowRank | None


@dataclass(frozen=True, slots=True)
class LoraWeights:
    """All additions of one adapter. See core.adapters.AdapterWeights."""

    layers: list[LayerAdapter]
    size_bytes: int


@dataclass(frozen=True, slots=True)
class AdapterRows:
    """The tokens of a step that one adapter applies to; rows None means all."""

    weights: LoraWeights
    rows: Tensor | None


def add(out: Tensor, x: Tensor, low_rank: LowRank | None, rows: Tensor | None) -> None:
    """Adds B A x to the chosen rows of out [N, O], in place; the others keep every bit."""
    if low_rank is None:
        return
    if rows is None:
        out.add_(x.float() @ low_rank.down @ low_rank.up)
        return
    delta = x.index_select(0, rows).float() @ low_rank.down @ low_rank.up
    # Rounded once, as above: a row gets the same bits whether others are beside it or not.
    out.index_copy_(0, rows, out.index_select(0, rows).add_(delta))


def read_lora(files: AdapterFiles, config: LlamaConfig) -> LoraWeights:
    """Makes an adapter's weights. Blocks for a fraction of a second.

    Raises PlatformError: INVALID_ARGUMENT for what this runner cannot apply, DATA_LOSS for what cannot be right.
    """
    scale = _read_scale(files)
    try:
        tensors = load(files.tensors)
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise _damaged(files, f"adapter_model.safetensors cannot be read: {error}") from error
    return _Assembly(files, config, scale, tensors).weights()


def _read_scale(files: AdapterFiles) -> "_Scale":
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
    rank, alpha = raw.get("r"), raw.get("lora_alpha")
    if not isinstance(rank, int) or isinstance(rank, bool) or not 1 <= rank <= MAX_RANK:
        raise _unsupported(files, f"rank {rank!r} (from 1 to {MAX_RANK})")
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not math.isfinite(alpha):
        raise _damaged(files, f"lora_alpha is {alpha!r}")
    return _Scale(rank, alpha / (math.sqrt(rank) if raw.get("use_rslora") else rank))


@dataclass(frozen=True, slots=True)
class _Scale:
    rank: int
    factor: float


class _Assembly:
    """Takes the tensors of one file apart and fuses them; every tensor must have its place and its shape."""

    def __init__(
        self,
        files: AdapterFiles,
        config: LlamaConfig,
        scale: _Scale,
        tensors: Mapping[str, Tensor],
    ) -> None:
        self._files = files
        self._scale = scale
        self._num_layers = config.num_layers
        hidden, inner, kv = config.hidden_size, config.intermediate_size, config.num_kv_heads * config.head_dim
        query = config.num_heads * config.head_dim
        self._shapes = {  # module: (inputs, outputs)
            "self_attn.q_proj": (hidden, query),
            "self_attn.k_proj": (hidden, kv),
            "self_attn.v_proj": (hidden, kv),
            "self_attn.o_proj": (query, hidden),
            "mlp.gate_proj": (hidden, inner),
            "mlp.up_proj": (hidden, inner),
            "mlp.down_proj": (inner, hidden),
        }
        self._tensors = {self._place(key): self._checked(key, tensor) for key, tensor in tensors.items()}
        if not self._tensors:
            raise _damaged(files, "adapter_model.safetensors holds no tensors")
        self._size_bytes = 0

    def weights(self) -> LoraWeights:
        layers = [
            LayerAdapter(
                qkv=self._fuse(number, "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
                output=self._fuse(number, "self_attn.o_proj"),
                gate_up=self._fuse(number, "mlp.gate_proj", "mlp.up_proj"),
                down=self._fuse(number, "mlp.down_proj"),
            )
            for number in range(self._num_layers)
        ]
        return LoraWeights(layers, self._size_bytes)

    def _place(self, key: str) -> tuple[int, str, str]:
        """Returns layer, module and side ("A" or "B") of a tensor's name."""
        match = _KEY.fullmatch(key)
        module = f"{match[2]}.{match[3]}" if match else ""
        if match is None or module not in self._shapes:
            raise _unsupported(self._files, f"tensor {key!r} (LoRA on q, k, v, o, gate, up and down is)")
        if int(match[1]) >= self._num_layers:
            raise _damaged(self._files, f"{key} is for a layer that the base has not got: it has {self._num_layers}")
        return int(match[1]), module, match[4]

    def _checked(self, key: str, tensor: Tensor) -> Tensor:
        _, module, side = self._place(key)
        inputs, outputs = self._shapes[module]
        expected = (self._scale.rank, inputs) if side == "A" else (outputs, self._scale.rank)
        if tuple(tensor.shape) != expected:
            raise _damaged(self._files, f"{key} has shape {tuple(tensor.shape)} where rank and base say {expected}")
        if not tensor.is_floating_point():
            raise _unsupported(self._files, f"{tensor.dtype} in {key}")
        scaled = tensor.float() * (self._scale.factor if side == "B" else 1.0)
        if not bool(torch.isfinite(scaled).all()):
            raise _damaged(self._files, f"{key} holds values that are not finite")
        return scaled

    def _fuse(self, number: int, *modules: str) -> LowRank | None:
        """Joins the parts of a fused layer: A stacked, B in blocks, so that each part sees its own A alone."""
        found = [(module, self._pair(number, module)) for module in modules]
        present = [pair for _, pair in found if pair is not None]
        if not present:
            return None
        down = torch.cat([a for a, _ in present]).t().contiguous()
        up = torch.zeros(down.shape[1], sum(self._shapes[m][1] for m in modules))
        row = column = 0
        for module, pair in found:
            outputs = self._shapes[module][1]
            if pair is not None:
                up[row : row + self._scale.rank, column : column + outputs] = pair[1].t()
                row += self._scale.rank
            column += outputs
        self._size_bytes += down.nbytes + up.nbytes
        return LowRank(down, up)

    def _pair(self, number: int, module: str) -> tuple[Tensor, Tensor] | None:
        a, b = self._tensors.get((number, module, "A")), self._tensors.get((number, module, "B"))
        if a is None and b is None:
            return None
        if a is None or b is None:
            raise _damaged(self._files, f"layer {number}, {module} has only one of lora_A and lora_B")
        return a, b


def _unsupported(files: AdapterFiles, what: str) -> PlatformError:
    message = f"adapter {files.spec.id!r}: the torch runner does not support {what}"
    return PlatformError(Code.INVALID_ARGUMENT, message, reason="adapter_unsupported")


def _damaged(files: AdapterFiles, why: str) -> PlatformError:
    return PlatformError(Code.DATA_LOSS, f"adapter {files.spec.id!r}: {why}", reason="adapter_damaged")
