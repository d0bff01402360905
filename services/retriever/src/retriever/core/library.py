"""The documents of a tenant as they are indexed: one, a list of them, and away with one."""

from collections.abc import Sequence
from dataclasses import dataclass

from chassis.errors import Code, PlatformError
from retriever.core.documents import Chunk, ChunkRef, check_collection, check_id, check_tenant
from retriever.core.ports import ChunkStore

MAX_LIST = 1000
DEFAULT_LIST = 100


@dataclass(frozen=True, slots=True)
class Entry:
    """A document as it is indexed, or an upload that held several."""

    document_id: str
    external_id: str
    title: str
    collection: str
    num_chunks: int
    metadata_json: str
    content_sha256: str
    indexed_unix_s: int
    num_documents: int


class Library:
    """Reads and removes documents; only those whose indexing has finished are told of."""

    def __init__(self, store: ChunkStore) -> None:
        self._store = store

    async def get(self, tenant: str, document_id: str) -> Entry:
        """Returns a document, or the sum of an upload's documents; raises NOT_FOUND."""
        refs = await self._refs(tenant, document_id)
        complete = {(ref.document_id, ref.revision): ref for ref in refs if ref.ordinal == 0}
        counted = [ref for ref in refs if (ref.document_id, ref.revision) in complete]
        if not counted:
            raise _unknown(document_id)
        own = [ref for ref in complete.values() if ref.document_id == document_id]
        if own:
            first = max(own, key=lambda ref: ref.indexed_unix_s)
            num_chunks = sum(ref.document_id == document_id and ref.revision == first.revision for ref in counted)
            chunks = await self._store.read(tenant, [first.key])
            if not chunks:
                raise _unknown(document_id)
            return _entry(chunks[0], num_chunks)
        return _sum(document_id, counted)

    async def list(self, tenant: str, *, collection: str, limit: int, after: str) -> tuple[list[Entry], bool]:
        """Returns documents, newest first, and whether more follow; raises INVALID_ARGUMENT naming the field."""
        check_tenant(tenant)
        limit = limit or DEFAULT_LIST
        if not 1 <= limit <= MAX_LIST:
            raise PlatformError(Code.INVALID_ARGUMENT, f"limit is {limit}, it must be 1 to {MAX_LIST}", param="limit")
        heads = await self._store.heads(tenant, check_collection(collection) if collection else None)
        newest = {head.document_id: head for head in sorted(heads, key=lambda h: (h.indexed_unix_s, h.document_id))}
        ordered = list(reversed(newest.values()))
        start = 0
        if after:
            ids = [head.document_id for head in ordered]
            if check_id(after, "after") not in newest:
                raise PlatformError(Code.INVALID_ARGUMENT, f"after: there is no document {after}", param="after")
            start = ids.index(after) + 1
        page = ordered[start : start + limit]
        chunks = {chunk.key: chunk for chunk in await self._store.read(tenant, [head.key for head in page])}
        entries = [_entry(chunks[head.key], chunks[head.key].num_chunks) for head in page if head.key in chunks]
        return entries, start + limit < len(ordered)

    async def delete(self, tenant: str, document_id: str) -> int:
        """Removes a document, or all documents of an upload; returns how many chunks went. Raises NOT_FOUND."""
        refs = await self._refs(tenant, document_id)
        if not refs:
            raise _unknown(document_id)
        await self._store.remove(tenant, [ref.key for ref in refs])
        return len(refs)

    async def _refs(self, tenant: str, document_id: str) -> Sequence[ChunkRef]:
        check_tenant(tenant)
        check_id(document_id)
        return await self._store.find(tenant, document_ids=[document_id], upload_id=document_id)


def _entry(chunk: Chunk, num_chunks: int) -> Entry:
    return Entry(
        chunk.document_id,
        chunk.external_id,
        chunk.title,
        chunk.collection,
        num_chunks,
        chunk.metadata_json,
        chunk.content_sha256,
        chunk.indexed_unix_s,
        num_documents=1,
    )


def _sum(upload_id: str, refs: Sequence[ChunkRef]) -> Entry:
    return Entry(
        document_id=upload_id,
        external_id="",
        title="",
        collection=refs[0].collection,
        num_chunks=len(refs),
        metadata_json="{}",
        content_sha256="",
        indexed_unix_s=max(ref.indexed_unix_s for ref in refs),
        num_documents=len({ref.document_id for ref in refs}),
    )


def _unknown(document_id: str) -> PlatformError:
    return PlatformError(Code.NOT_FOUND, f"there is no document {document_id}", param="document_id")
