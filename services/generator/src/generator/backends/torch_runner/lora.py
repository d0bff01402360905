"""LoRA adapters in the torch runner: laid out like the fused weights that they add to, and added.

What they are and how their files are read is in backends/lora_files.py.

Legend: r rank, I inputs and O outputs of a linear layer, P parts of a fused layer (q, k, v), N tokens of a step.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from generator.backends import lora_files
from generator.backends.llama_config import LlamaConfig
from generator.backends.lora_files import LoraLayer, LoraModule, LoraShape
from generator.core.adapters import AdapterFiles


@dataclass(frozen=True, slots=True)
class LowRank:
    """What is added to one (fused) linear layer: x @ down @ up, with the scale in `up`.

    In float32 whatever the base is in: for the few rows of a decoding step torch's bf16 products of this size take six
    times as long (60 us against 10 for a pair, on two cores), and the adapter keeps what training gave it.
    """

    down: Tensor  # A, transposed: [I, sum of the parts' r]
    up: Tensor  # B, transposed: [sum of the parts' r, O], a block for each part

    @property
    def size_bytes(self) -> int:
        return self.down.nbytes + self.up.nbytes

    def to(self, device: torch.device) -> "LowRank":
        return LowRank(self.down.to(device), self.up.to(device))


@dataclass(frozen=True, slots=True)
class LayerAdapter:
    """The additions to one decoder layer, fused as LayerWeights are; None where the adapter has none."""

    qkv: LowRank | None
    output: LowRank | None
    gate_up: LowRank | None
    down: LowRank | None

    @property
    def size_bytes(self) -> int:
        return sum(part.size_bytes for part in (self.qkv, self.output, self.gate_up, self.down) if part is not None)


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


def read_lora(files: AdapterFiles, config: LlamaConfig, device: torch.device = torch.device("cpu")) -> LoraWeights:
    """Makes an adapter's weights. Blocks for a fraction of a second. Raises PlatformError as lora_files.read_lora."""
    shape = LoraShape(
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        inner_size=config.intermediate_size,
        query_size=config.num_heads * config.head_dim,
        kv_size=config.num_kv_heads * config.head_dim,
    )
    layers = [
        LayerAdapter(
            qkv=_fuse(layer, shape, device, "q", "k", "v"),
            output=_fuse(layer, shape, device, "o"),
            gate_up=_fuse(layer, shape, device, "gate", "up"),
            down=_fuse(layer, shape, device, "down"),
        )
        for layer in lora_files.read_lora(files, shape)
    ]
    return LoraWeights(layers, sum(layer.size_bytes for layer in layers))


def _fuse(layer: LoraLayer, shape: LoraShape, device: torch.device, *modules: LoraModule) -> LowRank | None:
    """Joins the parts of a fused layer: A stacked, B in blocks, so that each part sees its own A alone."""
    present = [layer[module] for module in modules if module in layer]
    if not present:
        return None
    down = torch.cat([torch.from_numpy(pair.a) for pair in present]).t().contiguous()
    up = torch.zeros(down.shape[1], sum(shape.sizes(module)[1] for module in modules))
    row = column = 0
    for module in modules:
        outputs, pair = shape.sizes(module)[1], layer.get(module)
        if pair is not None:
            up[row : row + pair.rank, column : column + outputs] = torch.from_numpy(pair.b).t()
            row += pair.rank
        column += outputs
    return LowRank(down, up).to(device)
