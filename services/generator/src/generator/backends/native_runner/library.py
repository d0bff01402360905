"""The native library by ctypes: structures as native/engine.h has them, and which build of it fits this processor.

Calls release the interpreter's lock, so the event loop runs while a step is computed.
"""

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from chassis.errors import Code, PlatformError

ABI = 3
PARTS = ("q", "k", "v", "output", "gate", "up", "down")
LAYER_ARRAYS = ("qkv", "output", "gate", "up", "down", "attention_norm", "mlp_norm")
BUILDS_DIR = Path(__file__).parent / "_builds"
_BEST_FIRST = ("avx512", "avx2", "neon")

_I32, _F32, _P = ctypes.c_int32, ctypes.c_float, ctypes.c_void_p


class Config(ctypes.Structure):
    """PrConfig."""

    _fields_ = [
        *((name, _I32) for name in ("num_layers", "hidden", "intermediate", "num_heads", "num_kv_heads", "head_dim")),
        *((name, _I32) for name in ("vocab", "weight_bits", "num_threads", "num_blocks")),
        *((name, _I32) for name in ("context_length", "max_tokens", "max_rows")),
        ("wide_in_prompts", _I32),
        ("wide_after", _I32),
        ("norm_eps", _F32),
    ]


class Layer(ctypes.Structure):
    """PrLayer."""

    _fields_ = [(name, _P) for name in LAYER_ARRAYS]


class Factors(ctypes.Structure):
    """PrFactors."""

    _fields_ = [("a", _P), ("b", _P), ("rank", _I32)]


class AdapterLayer(ctypes.Structure):
    """PrAdapterLayer."""

    _fields_ = [("parts", Factors * len(PARTS))]


class Step(ctypes.Structure):
    """PrStep."""

    _fields_ = [
        *((name, _I32) for name in ("num_tokens", "num_sequences", "num_rows")),
        *((name, _P) for name in ("token_ids", "positions", "starts", "tables", "table_starts", "is_prompt", "rows")),
        *((name, _P) for name in ("wants_logits", "adapters", "logits", "best")),
    ]


class Draw(ctypes.Structure):
    """PrDraw."""

    _fields_ = [
        ("logits", _P),
        *((name, _F32) for name in ("temperature", "top_p", "min_p")),
        ("top_k", _I32),
        ("uniform", ctypes.c_double),
    ]


_FUNCTIONS: dict[str, tuple[Any, Sequence[Any]]] = {
    "pr_abi": (_I32, ()),
    "pr_is_supported": (_I32, ()),
    "pr_open": (_P, (ctypes.POINTER(Config), ctypes.POINTER(Layer), *[_P] * 7)),
    "pr_close": (None, (_P,)),
    "pr_forward": (None, (_P, ctypes.POINTER(Step))),
    "pr_draw": (None, (_P, ctypes.POINTER(Draw), _I32, _P)),
}


def load_library(folder: Path = BUILDS_DIR) -> tuple[ctypes.CDLL, str]:
    """Returns the library of the best build that this processor can run, and the build's name.

    Raises PlatformError(FAILED_PRECONDITION) where there is none.
    """
    for name in _BEST_FIRST:
        path = folder / f"libpressroom-{name}.so"
        if not path.is_file():
            continue
        library = ctypes.CDLL(str(path))
        for function, (result, arguments) in _FUNCTIONS.items():
            getattr(library, function).restype = result
            getattr(library, function).argtypes = list(arguments)
        if library.pr_abi() == ABI and library.pr_is_supported():
            return library, name
    message = f"no build of the native engine in {folder.name} runs on this processor: make setup builds it"
    raise PlatformError(Code.FAILED_PRECONDITION, message, retryable=False)
