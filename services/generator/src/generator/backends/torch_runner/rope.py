"""Tables of the rotary embedding (RoFormer, arXiv 2104.09864) in Llama's half-split layout, with Llama 3's scaling."""

import math

import torch
from torch import Tensor

from generator.backends.llama_config import Llama3Scaling


def rope_tables(
    head_dim: int,
    theta: float,
    scaling: Llama3Scaling | None,
    context_length: int,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Returns cosine and sine [context, D]; the sine carries the sign of the first half."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    frequencies = theta**-exponents
    if scaling is not None:
        frequencies = _stretch(frequencies, scaling)
    angles = torch.outer(torch.arange(context_length, dtype=torch.float32), frequencies)
    cos, sin = angles.cos(), angles.sin()
    tables = torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)
    return tables[0].to(device, dtype), tables[1].to(device, dtype)


def _stretch(frequencies: Tensor, scaling: Llama3Scaling) -> Tensor:
    """Returns the scaled frequencies, in radians a token."""
    turns = scaling.original_context * frequencies / (2 * math.pi)  # over the context that it was trained on first
    share = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = share.clamp(0.0, 1.0)
    return frequencies * kept + frequencies / scaling.factor * (1.0 - kept)
