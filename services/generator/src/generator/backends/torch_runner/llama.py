"""The forward pass of a Llama model over a flat batch: tokens of many sequences side by side, attention for each.

Everything but attention treats all tokens of a step alike, so one decode row costs next to nothing beside others.
Keys and values lie in one tensor a layer, [2 * H_kv * S, D]: a row for each head and slot, keys of all heads first.
So one index reads the keys and values that a sequence needs, wherever its blocks lie.

Legend: N tokens of the step, T tokens of one attention group, B sequences of a group, L keys (padded), S slots,
H query heads, H_kv key heads, G = H / H_kv, D head size, E hidden size.
"""

import math
import mmap
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from generator.backends.llama_config import LlamaConfig
from generator.backends.torch_runner import lora, paged
from generator.backends.torch_runner.lora import AdapterRows
from generator.backends.torch_runner.paged import PagedGroup
from generator.backends.torch_runner.rope import rope_tables
from generator.backends.torch_runner.weights import LlamaWeights


@dataclass(slots=True)
class AttentionGroup:
    """Sequences whose attention is one call: tokens [start, end) of the step, an equal number for each sequence.

    Their keys and values are gathered first; a PagedGroup's are not.
    """

    start: int
    end: int
    num_sequences: int
    kv_rows: Tensor  # [B * 2 * H_kv * L], rows of the cache to read
    num_keys: int  # L
    mask: Tensor  # [B, 1, G * T, L], added to the scores; T counts the tokens of one sequence


@dataclass(slots=True)
class FlatBatch:
    """One step as tensors."""

    token_ids: Tensor  # [N]
    positions: Tensor  # [N]
    write_rows: Tensor  # [N * 2 * H_kv], rows of the cache to write
    groups: list[AttentionGroup | PagedGroup]
    adapters: list[AdapterRows]  # one for each adapter of the step; the base's rows are in none

    def to(self, device: torch.device) -> "FlatBatch":
        """Returns the step on a device; itself where it is there."""
        if self.token_ids.device == device:
            return self
        return FlatBatch(
            token_ids=self.token_ids.to(device, non_blocking=True),
            positions=self.positions.to(device, non_blocking=True),
            write_rows=self.write_rows.to(device, non_blocking=True),
            groups=[_group_to(group, device) for group in self.groups],
            adapters=[
                AdapterRows(a.weights, None if a.rows is None else a.rows.to(device, non_blocking=True))
                for a in self.adapters
            ],
        )


def _group_to(group: AttentionGroup | PagedGroup, device: torch.device) -> AttentionGroup | PagedGroup:
    if isinstance(group, PagedGroup):
        tables, lengths = (tensor.to(device, non_blocking=True) for tensor in (group.tables, group.lengths))
        return PagedGroup(group.start, group.end, tables, lengths)
    kv_rows, mask = (tensor.to(device, non_blocking=True) for tensor in (group.kv_rows, group.mask))
    return replace(group, kv_rows=kv_rows, mask=mask)


class Llama:
    """A model with its key and value memory. Not thread-safe; no gradients."""

    def __init__(
        self, config: LlamaConfig, weights: LlamaWeights, num_blocks: int, block_size: int, context_length: int
    ) -> None:
        self.config = config
        self._weights = weights
        self.dtype = weights.embedding.dtype
        self.device = weights.embedding.device
        self.num_blocks = num_blocks
        self.block_size = block_size
        shape = (config.num_layers, 2 * config.num_kv_heads * num_blocks * block_size, config.head_dim)
        if self.device.type == "cpu":
            self._cache = _lazy_zeros(*shape, dtype=self.dtype)
        else:
            self._cache = torch.zeros(shape, dtype=self.dtype, device=self.device)
        self._cos, self._sin = rope_tables(
            config.head_dim, config.rope_theta, config.rope_scaling, context_length, self.dtype, self.device
        )

    def forward(self, batch: FlatBatch) -> Tensor:
        """Computes a step: writes keys and values, returns the final hidden states [N, E]."""
        hidden = F.embedding(batch.token_ids, self._weights.embedding)
        cos = self._cos[batch.positions].unsqueeze(1)  # [N, 1, D]
        sin = self._sin[batch.positions].unsqueeze(1)
        for number, (layer, cache) in enumerate(zip(self._weights.layers, self._cache, strict=True)):
            adapters = [(group.weights.layers[number], group.rows) for group in batch.adapters]
            x = self._norm(hidden, layer.attention_norm)
            qkv = F.linear(x, layer.qkv)
            for adapter, rows in adapters:
                lora.add(qkv, x, adapter.qkv, rows)
            attended = self._attention(cache, qkv, cos, sin, batch)
            hidden = torch.addmm(hidden, attended, layer.output.t())
            for adapter, rows in adapters:
                lora.add(hidden, attended, adapter.output, rows)
            x = self._norm(hidden, layer.mlp_norm)
            gate_up = F.linear(x, layer.gate_up)
            for adapter, rows in adapters:
                lora.add(gate_up, x, adapter.gate_up, rows)
            gate, up = gate_up.chunk(2, dim=-1)
            inner = F.silu(gate).mul_(up)
            hidden = torch.addmm(hidden, inner, layer.down.t())
            for adapter, rows in adapters:
                lora.add(hidden, inner, adapter.down, rows)
        return self._norm(hidden, self._weights.final_norm)

    def logits(self, hidden: Tensor) -> Tensor:
        """Returns float32 logits [rows, vocabulary] of hidden states [rows, E]."""
        return F.linear(hidden, self._weights.head).float()

    def _norm(self, hidden: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(hidden, (self.config.hidden_size,), weight, self.config.rms_norm_eps)

    def _attention(self, cache: Tensor, qkv: Tensor, cos: Tensor, sin: Tensor, batch: FlatBatch) -> Tensor:
        config = self.config
        heads = qkv.view(-1, config.num_heads + 2 * config.num_kv_heads, config.head_dim)
        rotated = heads[:, : config.num_heads + config.num_kv_heads]
        # RoPE as x * cos + swap_halves(x) * sin, in place; the table's sine carries the sign of the first half.
        swapped = rotated.roll(config.head_dim // 2, dims=-1)
        rotated.mul_(cos).addcmul_(swapped, sin)
        cache.index_copy_(0, batch.write_rows, heads[:, config.num_heads :].reshape(-1, config.head_dim))
        query = heads[:, : config.num_heads]
        outputs = [self._attend_group(cache, query[group.start : group.end], group) for group in batch.groups]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _attend_group(self, cache: Tensor, query: Tensor, group: AttentionGroup | PagedGroup) -> Tensor:
        if isinstance(group, AttentionGroup):
            return self._attend(cache, query, group)
        out = paged.attend(query, cache, group, self.block_size, self.num_blocks * self.block_size)
        return out.view(query.shape[0], -1)

    def _attend(self, cache: Tensor, query: Tensor, group: AttentionGroup) -> Tensor:
        """Attends for [B * T] tokens. The G query heads of a key head stand as G more positions, so nothing repeats."""
        config, num_sequences = self.config, group.num_sequences
        per_key_head = config.num_heads // config.num_kv_heads
        kv = cache.index_select(0, group.kv_rows)
        kv = kv.view(num_sequences, 2 * config.num_kv_heads, group.num_keys, config.head_dim)
        folded = query.view(num_sequences, -1, config.num_kv_heads, per_key_head, config.head_dim)
        folded = folded.permute(0, 2, 3, 1, 4).reshape(num_sequences, config.num_kv_heads, -1, config.head_dim)
        out = F.scaled_dot_product_attention(
            folded, kv[:, : config.num_kv_heads], kv[:, config.num_kv_heads :], attn_mask=group.mask
        )
        out = out.view(num_sequences, config.num_kv_heads, per_key_head, -1, config.head_dim).permute(0, 3, 1, 2, 4)
        return out.reshape(query.shape[0], config.num_heads * config.head_dim)


def _lazy_zeros(*shape: int, dtype: torch.dtype) -> Tensor:
    """Returns zeros whose pages the system gives when they are first written: an idle engine does not hold them.

    Zeros, not empty: padding reads slots that nobody wrote, and a NaN there would survive the mask.
    """
    memory = mmap.mmap(-1, math.prod(shape) * dtype.itemsize)
    memory.madvise(mmap.MADV_NOHUGEPAGE)  # the heads' rows lie far apart: with huge pages the first token touches all
    return torch.frombuffer(memory, dtype=dtype).view(shape)
