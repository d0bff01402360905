"""Uploads in SQLite. Implements core.uploads.UploadStore and core.documents.FileShelf."""

import sqlite3
from collections.abc import Sequence
from typing import Any

from gateway.backends import sqlite_jobs
from gateway.backends.sqlite import Database
from gateway.core.documents import FileRow
from gateway.core.uploads import Purpose, Upload, file_is_used, storage_full

_COLUMNS = "upload_id, file_id, tenant, purpose, filename, content_type, sha256, size_bytes, created_unix_ms"


class SqliteUploads:
    """Reads and writes the table uploads."""

    def __init__(self, database: Database, *, max_tenant_bytes: int) -> None:
        self._database = database
        self._max_tenant_bytes = max_tenant_bytes

    async def add(self, upload: Upload) -> None:
        """Adds an upload; raises FAILED_PRECONDITION when the tenant keeps too much already."""
        row = upload.row

        def unit(connection: sqlite3.Connection) -> None:
            (kept,) = connection.execute(
                "SELECT coalesce(sum(size_bytes), 0) FROM uploads WHERE tenant = ?", (row.tenant,)
            ).fetchone()
            if kept + row.size_bytes > self._max_tenant_bytes:
                raise storage_full(self._max_tenant_bytes)
            insert(connection, upload)

        await self._database.write(unit)

    async def get(self, tenant: str, upload_id: str) -> Upload | None:
        """Returns the tenant's upload."""
        return await self._database.read(lambda connection: find(connection, tenant, upload_id))

    async def file(self, tenant: str, file_id: str) -> FileRow | None:
        """Returns what is known of the file of the tenant's upload; workers name it by the upload's id."""
        upload = await self.get(tenant, file_id)
        return upload.row if upload else None

    async def page(
        self, tenant: str, *, purpose: str | None, limit: int, after: str | None, newest_first: bool
    ) -> Sequence[Upload]:
        """Returns the tenant's uploads in the order of their making, those behind `after`."""
        behind, order = ("<", "DESC") if newest_first else (">", "ASC")

        def query(connection: sqlite3.Connection) -> list[Upload]:
            rows = connection.execute(
                f"""
                SELECT {_COLUMNS} FROM uploads WHERE tenant = :tenant AND (:purpose IS NULL OR purpose = :purpose)
                    AND (:after IS NULL OR seq {behind}
                        (SELECT seq FROM uploads WHERE upload_id = :after AND tenant = :tenant))
                ORDER BY seq {order} LIMIT :limit
                """,
                {"tenant": tenant, "purpose": purpose, "after": after, "limit": limit},
            )
            return [_upload(row) for row in rows]

        return await self._database.read(query)

    async def delete(self, tenant: str, upload_id: str) -> Upload | None:
        """Removes the tenant's upload and returns it; raises CONFLICT while an unfinished job reads it."""

        def unit(connection: sqlite3.Connection) -> Upload | None:
            upload = find(connection, tenant, upload_id)
            if upload is None:
                return None
            if sqlite_jobs.has_unfinished(connection, upload_id):
                raise file_is_used(upload_id)
            connection.execute("DELETE FROM uploads WHERE upload_id = ?", (upload_id,))
            return upload

        return await self._database.write(unit)

    async def file_ids(self) -> set[str]:
        """Returns the names on disk of all uploads."""
        return await self._database.read(
            lambda connection: {file_id for (file_id,) in connection.execute("SELECT file_id FROM uploads")},
            timeout_s=60.0,
        )


def insert(connection: sqlite3.Connection, upload: Upload) -> None:
    """Adds an upload, whatever its tenant keeps already; to be called inside a unit of work."""
    row = upload.row
    connection.execute(
        f"INSERT INTO uploads ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (
            upload.upload_id,
            row.file_id,
            row.tenant,
            upload.purpose,
            row.filename,
            row.content_type,
            row.sha256,
            row.size_bytes,
            upload.created_unix_ms,
        ),
    )


def find(connection: sqlite3.Connection, tenant: str, upload_id: str) -> Upload | None:
    """Returns the tenant's upload, from inside a unit of work or a query."""
    row = connection.execute(
        f"SELECT {_COLUMNS} FROM uploads WHERE upload_id = ? AND tenant = ?", (upload_id, tenant)
    ).fetchone()
    return _upload(row) if row else None


def _upload(row: tuple[Any, ...]) -> Upload:
    upload_id, file_id, tenant, purpose, filename, content_type, sha256, size_bytes, created_unix_ms = row
    return Upload(
        upload_id=upload_id,
        row=FileRow(file_id, tenant, sha256, size_bytes, content_type, filename),
        purpose=Purpose(purpose),
        created_unix_ms=created_unix_ms,
    )
