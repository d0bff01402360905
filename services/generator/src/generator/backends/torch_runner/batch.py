"""Lays a step out as tensors: which tokens, where their keys go, and which keys each of them may see.

Index arithmetic is done in numpy, once a step; all layers share it.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from generator.backends.torch_runner.llama import AttentionGroup, FlatBatch
from generator.backends.torch_runner.lora import AdapterRows, LoraWeights
from generator.backends.torch_runner.paged import PagedGroup
from generator.core.sequences import Work

Ints = NDArray[np.int64]

# Sequences decode together if the longest has at most this many times the keys of the shortest: past that, the
# padding costs more than another call.
_LENGTH_RATIO = 1.5
_SMALL_NUM_KEYS = 128


class BatchLayout:
    """Knows the geometry of the cache; makes FlatBatches."""

    def __init__(
        self,
        num_slots: int,
        block_size: int,
        num_kv_heads: int,
        queries_per_kv: int,
        dtype: torch.dtype,
        is_paged: bool = False,
    ) -> None:
        """is_paged: sequences of one token attend out of the cache as it lies, whatever their lengths."""
        self._block_size = block_size
        self._is_paged = is_paged
        self._queries_per_kv = queries_per_kv
        self._dtype = dtype
        self._head_offsets = np.arange(2 * num_kv_heads, dtype=np.int64) * num_slots

    def order(self, step: list[Work]) -> list[Work]:
        """Sorts a step into the order of the flat batch: decodes by length, then all of more than one row."""
        return sorted(step, key=lambda work: (work.num_positions != 1, work.end))

    def lay_out(self, ordered: list[Work]) -> FlatBatch:
        """Makes the tensors of a step that `order` sorted."""
        tokens = np.concatenate([w.token_ids for w in ordered])
        positions = np.concatenate([np.arange(w.sequence.num_computed, w.reach) for w in ordered])
        slots = np.concatenate([self._slots(w, w.sequence.num_computed, w.reach) for w in ordered])
        return FlatBatch(
            token_ids=torch.from_numpy(tokens.astype(np.int64)),
            positions=torch.from_numpy(positions),
            write_rows=torch.from_numpy(self.write_rows(slots)),
            groups=self._groups(ordered),
            adapters=_adapter_rows(ordered),
        )

    def write_rows(self, slots: Ints) -> Ints:
        """Returns the rows of a layer's cache that the keys and values of tokens at these slots [N] go to."""
        rows: Ints = (slots[:, None] + self._head_offsets).ravel()
        return rows

    def slots_of(self, works: list[Work]) -> Ints:
        """Returns the slots that works of one token each write."""
        return np.array(
            [
                work.sequence.table[(work.end - 1) // self._block_size] * self._block_size
                + (work.end - 1) % self._block_size
                for work in works
            ],
            dtype=np.int64,
        )

    def _paged_group(self, works: list[Work]) -> PagedGroup:
        tables = np.zeros((len(works), max(len(work.sequence.table) for work in works)), dtype=np.int32)
        for row, work in enumerate(works):
            tables[row, : len(work.sequence.table)] = work.sequence.table
        lengths = np.array([work.end for work in works], dtype=np.int32)
        return PagedGroup(0, len(works), torch.from_numpy(tables), torch.from_numpy(lengths))

    def _groups(self, ordered: list[Work]) -> list[AttentionGroup | PagedGroup]:
        groups: list[AttentionGroup | PagedGroup] = []
        members: list[Work] = []
        start = 0
        if self._is_paged:
            single = [work for work in ordered if work.num_positions == 1]
            if single:
                groups.append(self._paged_group(single))
            start, ordered = len(single), ordered[len(single) :]
            if not ordered:
                return groups
        for work in ordered:
            if members and not self._fits(members, work):
                groups.append(self._group(members, start))
                start = groups[-1].end
                members = []
            members.append(work)
        groups.append(self._group(members, start))
        return groups

    def _fits(self, members: list[Work], work: Work) -> bool:
        most = max(_SMALL_NUM_KEYS, int(members[0].reach * _LENGTH_RATIO))
        return members[0].num_positions == work.num_positions == 1 and work.reach <= most

    def _group(self, members: list[Work], start: int) -> AttentionGroup:
        num_keys = max(work.reach for work in members)
        slots = np.zeros((len(members), num_keys), dtype=np.int64)  # padding reads slot 0, and the mask hides it
        for row, work in enumerate(members):
            slots[row, : work.reach] = self._slots(work, 0, work.reach)
        kv_rows = slots[:, None, :] + self._head_offsets[None, :, None]
        return AttentionGroup(
            start=start,
            end=start + sum(work.num_positions for work in members),
            num_sequences=len(members),
            kv_rows=torch.from_numpy(kv_rows.ravel()),
            num_keys=num_keys,
            mask=self._mask(members, num_keys),
        )

    def _mask(self, members: list[Work], num_keys: int) -> Tensor:
        """A token at position p sees the keys 0..p. Rows repeat for the query heads that share a key head."""
        positions = np.stack([np.arange(work.sequence.num_computed, work.reach) for work in members])  # [B, T]
        hidden = np.arange(num_keys)[None, None, :] > positions[:, :, None]  # [B, T, L]
        mask = torch.zeros(hidden.shape, dtype=self._dtype).masked_fill_(torch.from_numpy(hidden), float("-inf"))
        return mask.repeat(1, self._queries_per_kv, 1).unsqueeze(1)

    def _slots(self, work: Work, start: int, end: int) -> Ints:
        positions = np.arange(start, end)
        table = np.asarray(work.sequence.table, dtype=np.int64)
        slots: Ints = table[positions // self._block_size] * self._block_size + positions % self._block_size
        return slots


def _adapter_rows(ordered: list[Work]) -> list[AdapterRows]:
    """Groups the rows of the flat batch by adapter, whatever order they stand in."""
    rows: dict[int, list[Ints]] = {}
    weights: dict[int, LoraWeights] = {}
    start = 0
    for work in ordered:
        adapter = work.sequence.adapter
        if adapter is not None:
            assert isinstance(adapter, LoraWeights)
            weights[id(adapter)] = adapter
            rows.setdefault(id(adapter), []).append(np.arange(start, start + work.num_positions))
        start += work.num_positions
    groups = []
    for key, adapter in weights.items():
        chosen = np.concatenate(rows[key])
        groups.append(AdapterRows(adapter, None if len(chosen) == start else torch.from_numpy(chosen)))
    return groups
