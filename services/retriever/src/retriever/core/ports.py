"""What the retriever's core needs of the outside: an encoder, and a store of chunks that can be searched.

Every method raises PlatformError: UNAVAILABLE (retryable) while the other side is away.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from retriever.core.chunking import TokenPlaces
from retriever.core.documents import Chunk, ChunkRef, chunk_id

Vector = NDArray[np.float32]  # [dimensions], L2-normalised


@dataclass(frozen=True, slots=True)
class Tokenized:
    """Tokenized texts, in order, and what the encoder can read."""

    places: list[TokenPlaces]
    max_tokens: int  # special tokens included
    num_special_tokens: int


@dataclass(frozen=True, slots=True)
class Encoded:
    """Vectors, in the order of the texts, and the version of the encoder that made them."""

    vectors: list[Vector]
    version: str


class Encoder(Protocol):
    """Tokenizes and embeds."""

    async def version(self) -> str:
        """Returns the version of the encoder that answers now."""
        ...

    async def tokenize(self, texts: Sequence[str]) -> Tokenized:
        """Tokenizes texts without cutting them."""
        ...

    async def encode_chunks(self, texts: Sequence[str]) -> Encoded:
        """Embeds chunks; raises OUT_OF_RANGE for one that is longer than the encoder reads, and cuts none."""
        ...

    async def encode_query(self, text: str) -> Encoded:
        """Embeds a query, cut to what the encoder reads."""
        ...


@dataclass(frozen=True, slots=True)
class Scope:
    """Where a search may look."""

    tenant: str
    collection: str


@dataclass(frozen=True, slots=True)
class Candidate:
    """A chunk that a search brought up; a higher score is better."""

    key: str
    document_id: str
    external_id: str
    collection: str
    title: str
    text: str
    metadata_json: str
    ordinal: int
    score: float

    @property
    def chunk_id(self) -> str:
        """The chunk's name towards clients."""
        return chunk_id(self.document_id, self.ordinal)


class ChunkSearch(Protocol):
    """Finds chunks, best first. A limit is at most MAX_CANDIDATES."""

    async def dense(self, scope: Scope, vector: Vector, limit: int) -> list[Candidate]:
        """By cosine."""
        ...

    async def keyword(self, scope: Scope, query: str, limit: int) -> list[Candidate]:
        """By BM25."""
        ...


MAX_CANDIDATES = 16_384  # Milvus's own bound of one search


@dataclass(frozen=True, slots=True)
class Head:
    """The first chunk of a document, as an entry of a list."""

    key: str
    document_id: str
    indexed_unix_s: int


class ChunkStore(Protocol):
    """Keeps chunks. What a write returned is found by every later call."""

    async def find(
        self,
        tenant: str,
        *,
        document_ids: Sequence[str] = (),
        external_ids: Sequence[str] = (),
        upload_id: str = "",
        job_id: str = "",
    ) -> list[ChunkRef]:
        """Returns the tenant's chunks that match any of what is given; none where nothing is given."""
        ...

    async def read(self, tenant: str, keys: Sequence[str]) -> list[Chunk]:
        """Returns chunks by key, in no order; those that are gone are left out."""
        ...

    async def write(self, rows: Sequence[tuple[Chunk, Vector]]) -> None:
        """Inserts or replaces chunks by key."""
        ...

    async def remove(self, tenant: str, keys: Sequence[str]) -> None:
        """Removes chunks; one that is gone already is no error."""
        ...

    async def heads(self, tenant: str, collection: str | None) -> list[Head]:
        """Returns every document's first chunk, in no order; None for all collections."""
        ...
