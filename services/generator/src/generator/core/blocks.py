"""KV memory as blocks of equal size: who holds which, and what is free. Knows nothing of what a block contains."""


class BlockManager:
    """Hands out block numbers 0..num_blocks-1; a block holds the keys and values of `block_size` tokens.

    Invariant: every block is either free or in exactly one table.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        assert num_blocks > 0 and block_size > 0
        self.num_blocks = num_blocks
        self.block_size = block_size
        # A stack: blocks that were used last are in the caches, and memory that was never needed is never touched.
        self._free = list(range(num_blocks - 1, -1, -1))

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return self.num_blocks - len(self._free)

    def blocks_for(self, num_tokens: int) -> int:
        """Returns how many blocks hold so many tokens."""
        return -(-num_tokens // self.block_size)

    def grow(self, table: list[int], num_tokens: int) -> bool:
        """Extends a table until it holds `num_tokens`. Where blocks run out it changes nothing and returns False."""
        missing = self.blocks_for(num_tokens) - len(table)
        if missing > len(self._free):
            return False
        for _ in range(missing):
            table.append(self._free.pop())
        return True

    def release(self, table: list[int]) -> None:
        """Takes back all blocks of a table and empties it."""
        self._free.extend(table)
        table.clear()
