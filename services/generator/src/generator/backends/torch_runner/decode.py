"""Decoding steps in batches of a few fixed sizes: on a GPU each size is one CUDA graph, launched as a whole.

A step of fewer sequences is padded with rows that read and write a block that nobody else has. The buffers stay where
they are, so that a captured graph finds them. On the CPU the same code runs uncaptured: that is how it is tested, and
what differs on a GPU is the capture alone. Not yet measured on a GPU.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from generator.backends.torch_runner.batch import BatchLayout
from generator.backends.torch_runner.llama import FlatBatch, Llama
from generator.backends.torch_runner.paged import PagedGroup
from generator.core.sequences import Work


@dataclass(slots=True)
class _Bucket:
    """The buffers of one batch size, and what fills `logits` from them."""

    size: int
    batch: FlatBatch
    tables: Tensor
    lengths: Tensor
    logits: Tensor  # [size, V]
    run: Callable[[], None]


def bucket_sizes(max_sequences: int) -> list[int]:
    """Returns 1, 2, 4, ... up to the first that holds them all."""
    sizes = [1]
    while sizes[-1] < max_sequences:
        sizes.append(2 * sizes[-1])
    return sizes


class DecodeBuckets:
    """Runs steps that decode and do nothing else. `spare_block` is a block of the cache that no sequence gets."""

    def __init__(
        self, llama: Llama, layout: BatchLayout, max_sequences: int, context_length: int, spare_block: int
    ) -> None:
        self._llama = llama
        self._layout = layout
        self._spare_block = spare_block
        self._num_table = -(-context_length // llama.block_size)
        self._pool: Any = None
        # The biggest first: the smaller graphs then find room in its memory.
        self._buckets = {size: self._make(size) for size in reversed(bucket_sizes(max_sequences))}
        self._largest = max(self._buckets)

    def fits(self, works: list[Work]) -> bool:
        """Whether a step is one that a bucket can run."""
        return len(works) <= self._largest and all(
            work.num_positions == 1 and work.samples and not work.scored and work.sequence.adapter is None
            for work in works
        )

    def run(self, works: list[Work]) -> Tensor:
        """Computes a step that fits; returns its logits [B, V], which the next step overwrites."""
        size = next(size for size in sorted(self._buckets) if size >= len(works))
        bucket = self._buckets[size]
        self._fill(bucket, works)
        bucket.run()
        return bucket.logits[: len(works)]

    def _make(self, size: int) -> _Bucket:
        llama, device = self._llama, self._llama.device
        tables = torch.full((size, self._num_table), self._spare_block, dtype=torch.int32, device=device)
        lengths = torch.ones(size, dtype=torch.int32, device=device)
        batch = FlatBatch(
            token_ids=torch.zeros(size, dtype=torch.int64, device=device),
            positions=torch.zeros(size, dtype=torch.int64, device=device),
            write_rows=torch.zeros(size * 2 * llama.config.num_kv_heads, dtype=torch.int64, device=device),
            groups=[PagedGroup(0, size, tables, lengths)],
            adapters=[],
        )
        logits = torch.zeros(size, llama.config.vocab_size, dtype=torch.float32, device=device)
        bucket = _Bucket(size, batch, tables, lengths, logits, lambda: None)
        self._fill(bucket, [])

        def compute() -> None:
            logits.copy_(llama.logits(llama.forward(batch)))

        bucket.run = self._capture(compute) if device.type == "cuda" else compute
        return bucket

    def _capture(self, compute: Callable[[], None]) -> Callable[[], None]:
        """Returns the replay of a function's kernels. It runs before: what is set up lazily may not be captured."""
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                compute()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            compute()
        self._pool = graph.pool()
        return graph.replay

    def _fill(self, bucket: _Bucket, works: list[Work]) -> None:
        """Lays a step out in the bucket's buffers, the padding too: rows of the step before may stand there."""
        size, num = bucket.size, len(works)
        tokens, positions = np.zeros(size, dtype=np.int64), np.zeros(size, dtype=np.int64)
        lengths = np.ones(size, dtype=np.int32)
        slots = np.full(size, self._spare_block * self._llama.block_size, dtype=np.int64)
        tables = np.full((size, self._num_table), self._spare_block, dtype=np.int32)
        if works:
            tokens[:num] = [work.sequence.token_ids[work.end - 1] for work in works]
            positions[:num] = [work.end - 1 for work in works]
            lengths[:num] = [work.end for work in works]
            slots[:num] = self._layout.slots_of(works)
            for row, work in enumerate(works):
                mine = work.sequence.table[: self._num_table]
                tables[row, : len(mine)] = mine
        for buffer, values in (
            (bucket.batch.token_ids, tokens),
            (bucket.batch.positions, positions),
            (bucket.batch.write_rows, self._layout.write_rows(slots)),
            (bucket.lengths, lengths),
            (bucket.tables, tables),
        ):
            buffer.copy_(torch.from_numpy(values))
