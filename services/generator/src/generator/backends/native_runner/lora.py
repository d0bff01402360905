"""LoRA adapters in the native runner: arrays laid out as the kernels read them, and the addresses that a step names.

What they are and how their files are read is in backends/lora_files.py.
"""

import ctypes
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from generator.backends import lora_files
from generator.backends.llama_config import LlamaConfig
from generator.backends.lora_files import MODULES, LoraShape
from generator.backends.native_runner.library import AdapterLayer, Factors
from generator.core.adapters import AdapterFiles


@dataclass(frozen=True, slots=True, eq=False)
class NativeAdapter:
    """An adapter's factors. See core.adapters.AdapterWeights. `layers` points into `arrays`, so both live together."""

    layers: "ctypes.Array[AdapterLayer]"
    arrays: tuple[NDArray[Any], ...]
    size_bytes: int

    @property
    def address(self) -> int:
        return ctypes.addressof(self.layers)


def read_adapter(files: AdapterFiles, shape: LlamaConfig) -> NativeAdapter:
    """Makes an adapter's weights. Blocks for a fraction of a second. Raises PlatformError as lora_files.read_lora."""
    sizes = LoraShape(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        inner_size=shape.intermediate_size,
        query_size=shape.num_heads * shape.head_dim,
        kv_size=shape.num_kv_heads * shape.head_dim,
    )
    layers = (AdapterLayer * shape.num_layers)()
    arrays: list[NDArray[Any]] = []
    for number, pairs in enumerate(lora_files.read_lora(files, sizes)):
        for place, module in enumerate(MODULES):
            if module not in pairs:
                continue
            pair = pairs[module]
            a, b = np.ascontiguousarray(pair.a), np.ascontiguousarray(pair.b.T)
            layers[number].parts[place] = Factors(a.ctypes.data, b.ctypes.data, pair.rank)
            arrays += [a, b]
    return NativeAdapter(layers, tuple(arrays), sum(array.nbytes for array in arrays))
