# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-any-return"
"""Decoding attention over a paged cache in Triton: split over the keys, so that one long sequence fills the GPU too.

The first kernel computes, for each part of a sequence's keys, an unnormalised sum and its weight; the second joins the
parts (Flash-Decoding). Only imported on a GPU: the CPU build of torch comes without Triton. Not yet measured on a GPU;
its arithmetic is tested in Triton's interpreter where Triton is installed.

Legend: B sequences, H query heads, H_kv key heads, G = H / H_kv, D head size, P parts of a sequence's keys.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_KEYS = 64  # keys of a loop's turn
_ROWS = 16  # least rows of a product on tensor cores; the G query heads of a key head are padded to it
_PROGRAMS = 512  # about four for each of a big GPU's processors
_MOST_PARTS = 32


def num_parts(num_sequences: int, num_kv_heads: int) -> int:
    """Returns P: fixed for a batch size, as a captured graph wants it."""
    wanted = _PROGRAMS // (num_sequences * num_kv_heads)
    return max(1, min(_MOST_PARTS, triton.next_power_of_2(wanted + 1) // 2))


def attend(query: Tensor, cache: Tensor, tables: Tensor, lengths: Tensor, block_size: int, num_slots: int) -> Tensor:
    """See paged.attend."""
    num_sequences, num_heads, head_dim = query.shape
    num_kv_heads = cache.shape[0] // (2 * num_slots)
    group_size = num_heads // num_kv_heads
    parts = num_parts(num_sequences, num_kv_heads)
    sums = torch.empty(num_sequences, num_heads, parts, head_dim, dtype=torch.float32, device=query.device)
    weights = torch.empty(num_sequences, num_heads, parts, 2, dtype=torch.float32, device=query.device)
    out = torch.empty(num_sequences, num_heads, head_dim, dtype=query.dtype, device=query.device)
    padded = triton.next_power_of_2(head_dim)
    _sum_parts[(num_sequences, num_kv_heads, parts)](
        query,
        cache,
        tables,
        lengths,
        sums,
        weights,
        query.stride(0),
        tables.stride(0),
        num_slots,
        head_dim**-0.5,
        H_KV=num_kv_heads,
        G=group_size,
        G_PADDED=max(_ROWS, triton.next_power_of_2(group_size)),
        D=head_dim,
        D_PADDED=padded,
        BLOCK_SIZE=block_size,
        KEYS=_KEYS,
        PARTS=parts,
    )
    _join_parts[(num_sequences, num_heads)](sums, weights, out, D=head_dim, D_PADDED=padded, PARTS=parts, H=num_heads)
    return out


@triton.jit
def _sum_parts(
    query,
    cache,
    tables,
    lengths,
    sums,
    weights,
    query_stride,
    table_stride,
    num_slots,
    scale,
    H_KV: tl.constexpr,
    G: tl.constexpr,
    G_PADDED: tl.constexpr,
    D: tl.constexpr,
    D_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    KEYS: tl.constexpr,
    PARTS: tl.constexpr,
):
    sequence, head, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(lengths + sequence)
    size = tl.cdiv(tl.cdiv(length, PARTS), KEYS) * KEYS
    start = part * size
    end = tl.minimum(start + size, length)
    rows, columns = tl.arange(0, G_PADDED), tl.arange(0, D_PADDED)
    is_column = columns[None, :] < D
    is_row = rows[:, None] < G
    q = tl.load(
        query + sequence * query_stride + (head * G + rows)[:, None] * D + columns[None, :],
        mask=is_row & is_column,
        other=0.0,
    )
    best = tl.full([G_PADDED], float("-inf"), tl.float32)
    weight = tl.zeros([G_PADDED], tl.float32)
    total = tl.zeros([G_PADDED, D_PADDED], tl.float32)
    # 64 bits: a big GPU's cache has more elements than 32 can count.
    key_rows = head.to(tl.int64) * num_slots
    value_rows = (head + H_KV).to(tl.int64) * num_slots
    for first in range(start, end, KEYS):
        positions = first + tl.arange(0, KEYS)
        is_key = positions < end
        blocks = tl.load(tables + sequence * table_stride + positions // BLOCK_SIZE, mask=is_key, other=0)
        slots = blocks.to(tl.int64) * BLOCK_SIZE + positions % BLOCK_SIZE
        is_element = is_key[:, None] & is_column
        k = tl.load(cache + (key_rows + slots)[:, None] * D + columns[None, :], mask=is_element, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        scores = tl.where(is_key[None, :], scores, float("-inf"))
        new_best = tl.maximum(best, tl.max(scores, 1))
        kept = tl.exp(best - new_best)
        shares = tl.exp(scores - new_best[:, None])
        v = tl.load(cache + (value_rows + slots)[:, None] * D + columns[None, :], mask=is_element, other=0.0)
        total = total * kept[:, None] + tl.dot(shares.to(v.dtype), v, input_precision="ieee")
        weight = weight * kept + tl.sum(shares, 1)
        best = new_best
    place = ((sequence * H_KV + head) * G + rows) * PARTS + part
    tl.store(sums + place[:, None] * D + columns[None, :], total, mask=is_row & is_column)
    tl.store(weights + place * 2, best, mask=rows < G)
    tl.store(weights + place * 2 + 1, weight, mask=rows < G)


@triton.jit
def _join_parts(sums, weights, out, D: tl.constexpr, D_PADDED: tl.constexpr, PARTS: tl.constexpr, H: tl.constexpr):
    row = tl.program_id(0) * H + tl.program_id(1)
    parts, columns = tl.arange(0, PARTS), tl.arange(0, D_PADDED)
    best = tl.load(weights + (row * PARTS + parts) * 2)
    weight = tl.load(weights + (row * PARTS + parts) * 2 + 1)
    kept = tl.exp(best - tl.max(best, 0))  # 0 for a part without keys
    values = tl.load(sums + (row * PARTS + parts)[:, None] * D + columns[None, :], mask=columns[None, :] < D, other=0.0)
    joined = tl.sum(values * kept[:, None], 0) / tl.sum(weight * kept, 0)
    tl.store(out + row * D + columns, joined, mask=columns < D)
