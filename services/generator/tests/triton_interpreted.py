"""Holds the Triton kernel to the plain attention, with TRITON_INTERPRET=1 in the environment; exits with 1 where it
differs. float16 in place of bfloat16, whose products the interpreter gets wrong."""

import sys

import torch

from generator.backends.torch_runner import triton_decode
from generator.backends.torch_runner.paged import attend_plainly

CASES = (
    # key heads, query heads of each, head size, block size, lengths
    (2, 3, 8, 4, (1, 9, 70)),
    (1, 4, 64, 16, (200, 130)),
    (2, 8, 128, 16, (300,)),
    (3, 1, 96, 8, (64, 65)),
    (8, 4, 64, 16, (5,) * 70),
)
NUM_BLOCKS = 160


def main() -> int:
    torch.manual_seed(0)
    is_wrong = False
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float16, 2e-3)):
        for num_kv_heads, group, size, block_size, lengths in CASES:
            cache = torch.randn(2 * num_kv_heads * NUM_BLOCKS * block_size, size).to(dtype)
            width = max(-(-length // block_size) for length in lengths)
            tables = torch.zeros(len(lengths), width, dtype=torch.int32)
            free = iter(torch.randperm(NUM_BLOCKS).tolist())
            for row, length in enumerate(lengths):
                for place in range(-(-length // block_size)):
                    tables[row, place] = next(free)
            heads = torch.randn(len(lengths), num_kv_heads * (group + 2), size).to(dtype)
            query = heads[:, : num_kv_heads * group]  # strided, as in the model
            arguments = (cache, tables, torch.tensor(lengths, dtype=torch.int32), block_size, NUM_BLOCKS * block_size)
            difference = (attend_plainly(query, *arguments) - triton_decode.attend(query, *arguments)).abs().max()
            print(dtype, num_kv_heads, group, size, len(lengths), float(difference))
            is_wrong = is_wrong or not difference < tolerance
    return int(is_wrong)


if __name__ == "__main__":
    sys.exit(main())
