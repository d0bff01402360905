"""Where to compute and in which numbers."""

from typing import Literal

import torch

from chassis.errors import Code, PlatformError

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def pick_device(name: Literal["auto", "cpu", "cuda"]) -> torch.device:
    """Returns the device; auto is a GPU where there is one. Raises FAILED_PRECONDITION for one that is not there."""
    has_gpu = torch.cuda.is_available()
    if name == "cuda" and not has_gpu:
        build = "this build of torch has no CUDA" if torch.version.cuda is None else "torch finds no GPU"
        raise PlatformError(Code.FAILED_PRECONDITION, f"GENERATOR_DEVICE is cuda, and {build}")
    return torch.device("cuda" if has_gpu and name != "cpu" else "cpu")


def pick_dtype(name: Literal["auto", "bf16", "fp32"], device: torch.device) -> torch.dtype:
    """bf16 on a GPU, and where the processor multiplies it natively; elsewhere it would take twice the time."""
    if name != "auto":
        return DTYPES[name]
    if device.type == "cuda":
        return torch.bfloat16
    capabilities = torch.cpu.get_capabilities()
    native = capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") or capabilities.get("bf16")
    return torch.bfloat16 if native else torch.float32
