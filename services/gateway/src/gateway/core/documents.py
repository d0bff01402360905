"""Documents that clients hand in: from the upload to the job that indexes it, and away again.

The library writes the file first, then its row, the document, the job and the message to publish in one transaction:
what was answered with 202 will be indexed, whatever dies in between. Knows nothing of HTTP, SQLite, gRPC or the bus.
"""

import hashlib
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import BinaryIO, Protocol

from chassis.errors import Code, PlatformError
from gateway.core import creation
from gateway.core.content import Inspector
from gateway.core.jobs import Canceller, Job, JobStatus, JobStore
from gateway.core.outbox import Message

DEFAULT_COLLECTION = "default"


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A file as it lies on disk, under an id of ours."""

    file_id: str
    sha256: str
    size_bytes: int


@dataclass(frozen=True, slots=True)
class FileRow:
    """What is known of a file."""

    file_id: str
    tenant: str
    sha256: str
    size_bytes: int
    content_type: str
    filename: str
    is_withdrawn: bool = False  # its job was cancelled or superseded: no worker is to read it any more


@dataclass(frozen=True, slots=True)
class Description:
    """What the client says of a document."""

    content_type: str
    filename: str = ""
    title: str = ""
    external_id: str = ""
    collection: str = DEFAULT_COLLECTION
    metadata: Mapping[str, str | int | float | bool] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Document:
    """A document as we know it; what the index knows of it is asked there."""

    document_id: str
    tenant: str
    description: Description
    job_id: str
    status: JobStatus  # of its latest job
    file_id: str
    size_bytes: int
    created_unix_ms: int


@dataclass(frozen=True, slots=True)
class Submission:
    """All that one upload writes in one transaction."""

    document: Document
    file: FileRow
    job: Job
    message: Message


@dataclass(frozen=True, slots=True)
class Indexed:
    """What the index knows of a document."""

    document_id: str
    external_id: str
    title: str
    collection: str
    num_chunks: int
    metadata: Mapping[str, object]
    indexed_unix_s: int


class Inspection(Protocol):
    """Looks at the bytes of a file as they pass; both methods raise PlatformError to refuse it."""

    def feed(self, piece: bytes) -> None:
        """Takes the next bytes."""
        ...

    def finish(self) -> None:
        """Judges the whole."""
        ...


class FileStore(Protocol):
    """Where files lie. Every method blocks in a thread of its own, not on the loop."""

    async def save(self, source: BinaryIO, inspector: Inspection) -> StoredFile:
        """Copies the source, durable when it returns; nothing remains of one that the inspector refuses."""
        ...

    async def delete(self, file_ids: Sequence[str]) -> None:
        """Removes files; one that is gone already is no error."""
        ...


class DocumentStore(Protocol):
    """Where documents are kept. A write is durable when it returns."""

    async def submit(self, submission: Submission) -> Sequence[str]:
        """Writes it and returns the files that nothing needs any more.

        A document with the same id is replaced; its former job still runs to its end.
        """
        ...

    async def get(self, tenant: str, document_id: str) -> Document | None:
        """Returns the tenant's document."""
        ...

    async def newest(self, tenant: str, *, collection: str | None, limit: int, after: str | None) -> Sequence[Document]:
        """Returns the tenant's documents, newest first, those behind `after`."""
        ...

    async def delete(self, tenant: str, document_id: str) -> Sequence[str]:
        """Removes the document; returns the files that nothing needs any more."""
        ...


class FileShelf(Protocol):
    """What is needed to hand files out."""

    async def file(self, tenant: str, file_id: str) -> FileRow | None:
        """Returns what is known of the tenant's file."""
        ...


class FileContent(Protocol):
    """The bytes of files."""

    def read(self, row: FileRow) -> AsyncIterator[bytes]:
        """Yields them in pieces of at most 1 MiB; raises DATA_LOSS when they are not those that were stored."""
        ...


class DocumentIndex(Protocol):
    """What makes documents searchable. Raises PlatformError, UNAVAILABLE when it is away."""

    async def get(self, tenant: str, document_id: str) -> Indexed | None:
        """Returns what is indexed under an id, which may be one that the index made (a line of a JSONL upload)."""
        ...

    async def delete(self, tenant: str, document_id: str) -> int | None:
        """Removes the chunks; returns how many, None where the id is unknown."""
        ...


def document_id_for(tenant: str, collection: str, external_id: str) -> str:
    """Returns the id of a document: always the same for an external id, so that ingesting it again replaces it."""
    if not external_id:
        return f"doc_{creation.new_id('document')}"
    digest = hashlib.sha256("\0".join((tenant, collection, external_id)).encode())
    return f"doc_{digest.hexdigest()[:32]}"


class Library:
    """Takes documents in, tells of them and removes them."""

    def __init__(
        self,
        files: FileStore,
        documents: DocumentStore,
        jobs: JobStore,
        index: DocumentIndex,
        canceller: Canceller,
        ingest_message: Callable[[Document, FileRow], Message],
        *,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._files = files
        self._documents = documents
        self._jobs = jobs
        self._index = index
        self._canceller = canceller
        self._ingest_message = ingest_message
        self._now = now

    async def submit(self, tenant: str, source: BinaryIO, description: Description, *, param: str) -> Document:
        """Stores the bytes and orders their indexing; `param` names the field that held them in errors."""
        document_id = document_id_for(tenant, description.collection, description.external_id)
        job_id = f"job_{creation.new_id('job')}"
        existing = await self._documents.get(tenant, document_id) if creation.may_exist() else None
        if existing is not None and existing.job_id == job_id:
            return existing
        stored = await self._files.save(source, Inspector(description.content_type, param))
        now_ms = int(self._now() * 1000)
        file = FileRow(
            stored.file_id, tenant, stored.sha256, stored.size_bytes, description.content_type, description.filename
        )
        document = Document(
            document_id=document_id,
            tenant=tenant,
            description=description,
            job_id=job_id,
            status=JobStatus.QUEUED,
            file_id=stored.file_id,
            size_bytes=stored.size_bytes,
            created_unix_ms=now_ms,
        )
        job = Job(
            document.job_id,
            tenant,
            "ingest",
            now_ms,
            document_id=document.document_id,
            file_id=stored.file_id,
        )
        # Whatever stops us between file and rows leaves a file that no row knows: swept at the next start.
        freed = await self._documents.submit(Submission(document, file, job, self._ingest_message(document, file)))
        await self._files.delete(freed)
        return document

    async def get(self, tenant: str, document_id: str) -> tuple[Document | None, Indexed | None]:
        """Returns what we and what the index know of a document; raises NOT_FOUND when neither knows it."""
        document = await self._documents.get(tenant, document_id)
        indexed = await self._index.get(tenant, document_id)
        if document is None and indexed is None:
            raise _unknown()
        return document, indexed

    async def newest(self, tenant: str, *, collection: str | None, limit: int, after: str | None) -> Sequence[Document]:
        """Returns the tenant's documents, newest first."""
        return await self._documents.newest(tenant, collection=collection, limit=limit, after=after)

    async def delete(self, tenant: str, document_id: str) -> int:
        """Removes a document everywhere and returns how many chunks it had.

        Raises NOT_FOUND, and CONFLICT while a worker indexes it. The index goes first: while it is away the document
        stays whole and the call can be repeated.
        """
        document = await self._documents.get(tenant, document_id)
        if document is not None and not document.status.is_final:
            await self._stop(document)
        num_chunks = await self._index.delete(tenant, document_id)
        if document is None and num_chunks is None:
            raise _unknown()
        await self._files.delete(await self._documents.delete(tenant, document_id))
        return num_chunks or 0

    async def _stop(self, document: Document) -> None:
        job = await self._jobs.cancel(document.tenant, document.job_id)
        if job is not None and job.cancel_requested:
            await self._canceller.cancel(job.job_id, "the document is deleted")
        if job is not None and not job.status.is_final:
            raise PlatformError(
                Code.CONFLICT,
                f"the document is being indexed; its job {job.job_id} was told to stop, try again when it has",
                reason="document_busy",
                retryable=True,
                retry_after_s=1.0,
            )


def _unknown() -> PlatformError:
    return PlatformError(Code.NOT_FOUND, "no such document", param="document_id")
