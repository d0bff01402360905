"""Documents and the rows of their files in SQLite. Implements core.documents.DocumentStore."""

import json
import sqlite3
from collections.abc import Sequence
from typing import Any

from gateway.backends import sqlite_jobs, sqlite_outbox
from gateway.backends.sqlite import Database
from gateway.backends.sqlite_outbox import SqliteOutbox
from gateway.core.documents import Description, Document, FileRow, Submission
from gateway.core.jobs import JobStatus

_SELECT = """
    SELECT d.document_id, d.tenant, d.content_type, d.filename, d.title, d.external_id, d.collection, d.metadata_json,
        d.job_id, j.status, d.file_id, d.size_bytes, d.created_unix_ms
    FROM documents d JOIN jobs j USING (job_id)
"""


class SqliteDocuments:
    """Reads and writes the tables documents and files."""

    def __init__(self, database: Database, outbox: SqliteOutbox) -> None:
        self._database = database
        self._outbox = outbox

    async def submit(self, submission: Submission) -> Sequence[str]:
        """Writes file, job, document and message in one transaction; returns the files that are freed by it."""

        def unit(connection: sqlite3.Connection) -> list[str]:
            _insert_file(connection, submission.file, submission.document.created_unix_ms)
            sqlite_jobs.insert(connection, submission.job, submission.message.message_id)
            sqlite_outbox.add(connection, submission.message)
            return _put_document(connection, submission.document)

        freed = await self._database.write(unit)
        self._outbox.notify()
        return freed

    async def get(self, tenant: str, document_id: str) -> Document | None:
        """Returns the tenant's document."""

        def query(connection: sqlite3.Connection) -> Document | None:
            row = connection.execute(
                _SELECT + "WHERE d.document_id = ? AND d.tenant = ?", (document_id, tenant)
            ).fetchone()
            return _document(row) if row else None

        return await self._database.read(query)

    async def newest(self, tenant: str, *, collection: str | None, limit: int, after: str | None) -> Sequence[Document]:
        """Returns the tenant's documents, newest first, those behind `after`."""

        def query(connection: sqlite3.Connection) -> list[Document]:
            rows = connection.execute(
                _SELECT
                + """
                WHERE d.tenant = :tenant AND (:collection IS NULL OR d.collection = :collection) AND (:after IS NULL
                    OR d.seq < (SELECT seq FROM documents WHERE document_id = :after AND tenant = :tenant))
                ORDER BY d.seq DESC LIMIT :limit
                """,
                {"tenant": tenant, "collection": collection, "after": after, "limit": limit},
            )
            return [_document(row) for row in rows]

        return await self._database.read(query)

    async def delete(self, tenant: str, document_id: str) -> Sequence[str]:
        """Removes the document; returns the files that nothing needs any more."""

        def unit(connection: sqlite3.Connection) -> list[str]:
            rows = connection.execute(
                "DELETE FROM documents WHERE document_id = ? AND tenant = ? RETURNING file_id", (document_id, tenant)
            ).fetchall()
            return sqlite_jobs.unneeded_files(connection, [file_id for (file_id,) in rows])

        return await self._database.write(unit)

    async def file(self, tenant: str, file_id: str) -> FileRow | None:
        """Returns what is known of the tenant's file."""

        def query(connection: sqlite3.Connection) -> FileRow | None:
            row = connection.execute(
                """
                SELECT file_id, tenant, sha256, size_bytes, content_type, filename, EXISTS (
                    SELECT 1 FROM jobs j
                    WHERE j.file_id = files.file_id AND (j.status = ? OR j.cancel_requested)
                )
                FROM files WHERE file_id = ? AND tenant = ?
                """,
                (JobStatus.CANCELLED, file_id, tenant),
            ).fetchone()
            if row is None:
                return None
            is_withdrawn = bool(row[6])
            return FileRow(row[0], row[1], row[2], row[3], row[4], row[5], is_withdrawn)

        return await self._database.read(query)

    async def file_ids(self) -> set[str]:
        """Returns the ids of all files that have a row."""
        return await self._database.read(
            lambda connection: {file_id for (file_id,) in connection.execute("SELECT file_id FROM files")},
            timeout_s=60.0,
        )


def _insert_file(connection: sqlite3.Connection, file: FileRow, created_unix_ms: int) -> None:
    connection.execute(
        """
        INSERT INTO files (file_id, tenant, sha256, size_bytes, content_type, filename, created_unix_ms)
        VALUES (?, ?, ?, ?, ?, ?, ?)
        """,
        (file.file_id, file.tenant, file.sha256, file.size_bytes, file.content_type, file.filename, created_unix_ms),
    )


def _put_document(connection: sqlite3.Connection, document: Document) -> list[str]:
    # A replaced document gets a new place in the list: it is the newest. The file of the former one is freed when its
    # job has ended, or now if it has.
    former = connection.execute(
        "DELETE FROM documents WHERE document_id = ? RETURNING file_id", (document.document_id,)
    ).fetchall()
    description = document.description
    connection.execute(
        """
        INSERT INTO documents (document_id, tenant, external_id, title, collection, content_type, filename,
            metadata_json, size_bytes, job_id, file_id, created_unix_ms)
        VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
        """,
        (
            document.document_id,
            document.tenant,
            description.external_id,
            description.title,
            description.collection,
            description.content_type,
            description.filename,
            json.dumps(dict(description.metadata)),
            document.size_bytes,
            document.job_id,
            document.file_id,
            document.created_unix_ms,
        ),
    )
    return sqlite_jobs.unneeded_files(connection, [file_id for (file_id,) in former])


def _document(row: tuple[Any, ...]) -> Document:
    document_id, tenant, content_type, filename, title, external_id, collection, metadata_json, *rest = row
    job_id, status, file_id, size_bytes, created_unix_ms = rest
    return Document(
        document_id=document_id,
        tenant=tenant,
        description=Description(content_type, filename, title, external_id, collection, json.loads(metadata_json)),
        job_id=job_id,
        status=JobStatus(status),
        file_id=file_id,
        size_bytes=size_bytes,
        created_unix_ms=created_unix_ms,
    )
