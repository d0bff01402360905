"""Makes a file searchable: extract, chunk, index. Can be killed anywhere and run again. Knows nothing of the bus."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import PurePath

from chassis.patience import patiently
from retriever.core.chunker import Chunker
from retriever.core.documents import (
    Document,
    check_collection,
    check_external_id,
    check_id,
    check_metadata,
    check_tenant,
    clean_title,
    derived_document_id,
    dump_metadata,
    line_document_id,
    revision_of,
)
from retriever.core.extraction import Extracted, Extractor, kind_of, refused
from retriever.core.indexing import Attempt, IngestPolicy, Plan, Watcher
from retriever.core.ports import ChunkStore, Encoder, Tokenized


@dataclass(frozen=True, slots=True)
class IngestOrder:
    """What is to be indexed, and under which names."""

    job_id: str
    tenant: str
    document_id: str
    content_type: str
    title: str
    external_id: str
    collection: str
    metadata_json: str
    filename: str


@dataclass(frozen=True, slots=True)
class IndexedDocument:
    """A document that is searchable now."""

    document_id: str
    collection: str
    external_id: str
    num_chunks: int
    content_sha256: str


@dataclass(frozen=True, slots=True)
class IngestResult:
    """What a finished order brought about."""

    documents: list[IndexedDocument]
    num_skipped: int  # lines without text

    @property
    def num_chunks(self) -> int:
        """Chunks of all documents."""
        return sum(document.num_chunks for document in self.documents)


class Ingestor:
    """Runs orders. Orders of one tenant run one after another, since they may touch the same documents."""

    def __init__(
        self,
        extractor: Extractor,
        encoder: Encoder,
        store: ChunkStore,
        policy: IngestPolicy,
        *,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._extractor = extractor
        self._encoder = encoder
        self._store = store
        self._policy = policy
        self._chunker = Chunker(policy.chunking)
        self._now = now
        self._locks = _Locks()

    async def run(self, order: IngestOrder, data: bytes, watcher: Watcher) -> IngestResult:
        """Indexes a file. Raises PlatformError: transient where it may be run again, else what is wrong with it."""
        documents, num_skipped = await self._documents(order, data)
        patience = self._policy.patience_s
        version = await patiently(self._encoder.version, budget_s=patience, before_each=watcher.check)

        async def tokenize(texts: Sequence[str]) -> Tokenized:
            return await patiently(lambda: self._encoder.tokenize(texts), budget_s=patience, before_each=watcher.check)

        texts = await self._chunker.chunk([document.text for document in documents], tokenize)
        plans = await asyncio.to_thread(self._plans, documents, texts, version)
        if not plans:
            raise refused("file: it holds no text")
        attempt = Attempt(
            self._store,
            self._encoder,
            self._policy,
            watcher,
            job_id=order.job_id,
            encoder_version=version,
            indexed_unix_s=int(self._now()),
        )
        async with self._locks.hold(order.tenant):
            await attempt.run(order.tenant, order.document_id, plans)
        return IngestResult([_indexed(plan) for plan in plans], num_skipped + len(documents) - len(plans))

    async def undo(self, tenant: str, job_id: str) -> None:
        """Removes what an order's attempts have written; what they have replaced is gone already.

        A document that another order completed stays whole: it relies on the rows that it found.
        """
        async with self._locks.hold(tenant):
            refs = await self._store.find(tenant, job_id=job_id)
            completed = {(ref.document_id, ref.revision) for ref in refs if ref.ordinal == 0}
            begun = {ref.document_id for ref in refs if (ref.document_id, ref.revision) not in completed}
            found = await self._store.find(tenant, document_ids=sorted(begun))
            by_others = {(ref.document_id, ref.revision) for ref in found if ref.ordinal == 0} - completed
            await self._store.remove(
                tenant, [ref.key for ref in refs if (ref.document_id, ref.revision) not in by_others]
            )

    async def _documents(self, order: IngestOrder, data: bytes) -> tuple[list[Document], int]:
        """Checks the order's names and reads the file."""
        check_tenant(order.tenant)
        check_id(order.document_id)
        check_id(order.job_id, "job_id")
        collection = check_collection(order.collection)
        check_external_id(order.external_id)
        metadata = check_metadata(order.metadata_json)
        extraction = await self._extractor.extract(kind_of(order.content_type), data)
        return [_document(order, collection, metadata, found) for found in extraction.documents], extraction.num_skipped

    def _plans(self, documents: list[Document], texts: list[list[str]], version: str) -> list[Plan]:
        """Joins documents and their chunks; digests every text, so not on the loop."""
        return [
            Plan(document, chunks, self._revision(document, version))
            for document, chunks in zip(documents, texts, strict=True)
            if chunks
        ]

    def _revision(self, document: Document, version: str) -> str:
        chunking = self._policy.chunking
        return revision_of(
            document,
            encoder_version=version,
            chunk_tokens=chunking.chunk_tokens,
            overlap_tokens=chunking.overlap_tokens,
        )


def _document(order: IngestOrder, collection: str, metadata: dict[str, object], found: Extracted) -> Document:
    """Names a document that was found in the order's file."""
    if found.line == 0:
        document_id, external_id = order.document_id, order.external_id
        title = clean_title(order.title) or found.title or clean_title(PurePath(order.filename).stem)
    else:
        external_id, title = found.external_id, found.title
        document_id = (
            derived_document_id(order.tenant, collection, external_id)
            if external_id
            else line_document_id(order.document_id, found.line)
        )
    return Document(
        document_id=document_id,
        upload_id=order.document_id,
        tenant=order.tenant,
        collection=collection,
        external_id=external_id,
        title=title,
        text=found.text,
        metadata_json=dump_metadata({**metadata, **found.metadata}),
    )


def _indexed(plan: Plan) -> IndexedDocument:
    document = plan.document
    return IndexedDocument(
        document.document_id, document.collection, document.external_id, len(plan.texts), document.content_sha256
    )


class _Locks:
    """A lock for each tenant that somebody holds or waits for."""

    def __init__(self) -> None:
        self._locks: dict[str, tuple[asyncio.Lock, int]] = {}

    @asynccontextmanager
    async def hold(self, tenant: str) -> AsyncIterator[None]:
        lock, users = self._locks.get(tenant, (asyncio.Lock(), 0))
        self._locks[tenant] = lock, users + 1
        try:
            async with lock:
                yield
        finally:
            _, users = self._locks.pop(tenant)
            if users > 1:
                self._locks[tenant] = lock, users - 1
