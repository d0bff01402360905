"""KV memory as blocks of equal size: who holds which, what is free, and which hold a prefix that may be used again.

Knows nothing of what a block contains but its key: whoever seals a block vouches that its keys and values are those
of the token prefix that the key stands for (see core/prefixes.py), and that nobody writes to it again.
"""

from collections.abc import Sequence as Seq


class BlockManager:
    """Hands out block numbers 0..num_blocks-1; a block holds the keys and values of `block_size` tokens.

    Invariants: every block is in at least one table (used), or idle, or blank. Idle ones are sealed and can be used
    again by their key; they count as free, and when no blank block is left the one that was idle for longest is taken.
    """

    def __init__(self, num_blocks: int, block_size: int, caches_prefixes: bool = True) -> None:
        assert num_blocks > 0 and block_size > 0
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.caches_prefixes = caches_prefixes
        # A stack: blocks that were used last are in the processor's caches, and memory never needed is never touched.
        self._blank = list(range(num_blocks - 1, -1, -1))
        self._idle: dict[int, None] = {}  # in the order in which they were left
        self._num_users = [0] * num_blocks  # tables that a block is in
        self._key_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}

    @property
    def num_free(self) -> int:
        return len(self._blank) + len(self._idle)

    @property
    def num_used(self) -> int:
        return self.num_blocks - self.num_free

    def blocks_for(self, num_tokens: int) -> int:
        """Returns how many blocks hold so many tokens."""
        return -(-num_tokens // self.block_size)

    def find(self, keys: Seq[bytes]) -> list[int]:
        """Returns the blocks of the longest beginning of a chain of keys that is there, without taking them."""
        found: list[int] = []
        for key in keys:
            block = self._block_of.get(key)
            if block is None:
                break
            found.append(block)
        return found

    def num_needed(self, num_tokens: int, found: Seq[int] = ()) -> int:
        """Returns how many free blocks a new table of `num_tokens` takes that begins with what `find` found."""
        return self.blocks_for(num_tokens) - sum(1 for block in found if self._num_users[block])

    def adopt(self, table: list[int], found: Seq[int]) -> None:
        """Begins an empty table with what `find` found just now."""
        assert not table
        for block in found:
            self._idle.pop(block, None)
            self._num_users[block] += 1
        table.extend(found)

    def grow(self, table: list[int], num_tokens: int) -> bool:
        """Extends a table until it holds `num_tokens`. Where blocks run out it changes nothing and returns False."""
        missing = self.blocks_for(num_tokens) - len(table)
        if missing > self.num_free:
            return False
        for _ in range(missing):
            block = self._blank.pop() if self._blank else self._evict()
            self._num_users[block] = 1
            table.append(block)
        return True

    def seal(self, block: int, key: bytes) -> None:
        """Lets others use a block that is in a table; where another one has the key already, that one stays."""
        assert self._num_users[block] and block not in self._key_of
        if self.caches_prefixes and key not in self._block_of:
            self._key_of[block] = key
            self._block_of[key] = block

    def release(self, table: list[int]) -> None:
        """Takes a table's blocks back and empties it; sealed ones can be found until they are needed for others."""
        # From the end: a prefix's later blocks are of no use without its earlier ones, so they must go first.
        for block in reversed(table):
            self._num_users[block] -= 1
            if self._num_users[block] == 0:
                if block in self._key_of:
                    self._idle[block] = None
                else:
                    self._blank.append(block)
        table.clear()

    def _evict(self) -> int:
        block = next(iter(self._idle))
        del self._idle[block]
        del self._block_of[self._key_of.pop(block)]
        return block
