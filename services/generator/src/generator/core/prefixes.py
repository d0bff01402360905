"""Keys of the prefix cache: equal keys mean the same tokens from the first one on, for the same tenant and adapter.

A key hashes the key of the block before and the block's tokens, so it stands for the whole prefix. The hash is
cryptographic (BLAKE2b, 256 bits): nobody can make a prompt that is answered from another one's keys and values.
"""

from array import array
from collections.abc import Sequence as Seq
from hashlib import blake2b

_KEY_BYTES = 32


def root(salt: str, adapter: str) -> bytes:
    """Returns what a chain begins with. An empty salt is one of its own; `adapter` is a content hash, "" the base."""
    parts = (salt.encode(), adapter.encode())
    return _hash(b"".join(len(part).to_bytes(8, "little") + part for part in parts))


def extend(keys: list[bytes], chain_root: bytes, token_ids: Seq[int], block_size: int, num_blocks: int) -> None:
    """Appends keys until the chain has one for each of the first `num_blocks` blocks; their tokens must be there."""
    for number in range(len(keys), num_blocks):
        tokens = array("I", token_ids[number * block_size : (number + 1) * block_size])
        keys.append(_hash((keys[-1] if keys else chain_root) + tokens.tobytes()))


def _hash(content: bytes) -> bytes:
    return blake2b(content, digest_size=_KEY_BYTES).digest()
