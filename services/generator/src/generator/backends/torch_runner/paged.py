"""Attention of decoding rows straight out of the paged cache: in Triton on a GPU, in plain torch elsewhere.

Legend: B sequences, H query heads, H_kv key heads, G = H / H_kv, D head size, M blocks of a table, S slots.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(slots=True)
class PagedGroup:
    """Sequences of one token each, rows [start, end) of the step; nothing of the cache is copied for them."""

    start: int
    end: int
    tables: Tensor  # [B, M] int32, blocks of each sequence; what lies behind its length is never read
    lengths: Tensor  # [B] int32, keys of each sequence, its own included


def attend(query: Tensor, cache: Tensor, group: PagedGroup, block_size: int, num_slots: int) -> Tensor:
    """Returns [B, H, D] for query [B, H, D] over a layer's cache [2 * H_kv * S, D], keys of all heads first."""
    if query.is_cuda:
        from generator.backends.torch_runner import triton_decode

        return triton_decode.attend(query, cache, group.tables, group.lengths, block_size, num_slots)
    return attend_plainly(query, cache, group.tables, group.lengths, block_size, num_slots)


def attend_plainly(
    query: Tensor, cache: Tensor, tables: Tensor, lengths: Tensor, block_size: int, num_slots: int
) -> Tensor:
    """The same by its definition: what the kernel is held to, and what runs where there is no GPU."""
    num_sequences, num_heads, head_dim = query.shape
    num_kv_heads = cache.shape[0] // (2 * num_slots)
    positions = torch.arange(int(lengths.max()), device=query.device)
    blocks = tables.long()[:, positions // block_size]  # [B, L]
    hidden = positions >= lengths[:, None]
    slots = (blocks * block_size + positions % block_size).masked_fill(hidden, 0)
    heads = cache.view(2, num_kv_heads, num_slots, head_dim)
    keys, values = (heads[part][:, slots].transpose(0, 1) for part in (0, 1))  # [B, H_kv, L, D]
    folded = query.reshape(num_sequences, num_kv_heads, -1, head_dim)
    mask = torch.zeros(hidden.shape, dtype=query.dtype, device=query.device).masked_fill_(hidden, float("-inf"))
    out = F.scaled_dot_product_attention(folded, keys, values, attn_mask=mask[:, None, None])
    return out.reshape(num_sequences, num_heads, head_dim)
