"""Files that clients keep with us, for finetuning, evaluations and batches, until they delete them.

The bytes are written first, then the row: an upload that was answered is there for good, and one that was not leaves
at most a file that no row knows, which is swept at a later start. Knows nothing of HTTP, SQLite or directories.
"""

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import BinaryIO, Protocol

from chassis.errors import Code, PlatformError
from gateway.core import creation
from gateway.core.content import NotEmpty
from gateway.core.documents import FileRow, FileStore

_UPLOAD_ID = re.compile(r"file-[0-9a-f]{32}")


class Purpose(StrEnum):
    """What a client keeps a file for; OpenAI's words."""

    ASSISTANTS = "assistants"
    BATCH = "batch"
    BATCH_OUTPUT = "batch_output"  # made by us
    FINE_TUNE = "fine-tune"
    VISION = "vision"
    USER_DATA = "user_data"
    EVALS = "evals"


@dataclass(frozen=True, slots=True)
class Upload:
    """A file that a client keeps with us. upload_id is what it is called; row.file_id is its name on disk."""

    upload_id: str
    row: FileRow
    purpose: Purpose
    created_unix_ms: int


class UploadStore(Protocol):
    """Where uploads are kept. A write is durable when it returns."""

    async def add(self, upload: Upload) -> None:
        """Adds an upload; raises FAILED_PRECONDITION when the tenant keeps too much already."""
        ...

    async def get(self, tenant: str, upload_id: str) -> Upload | None:
        """Returns the tenant's upload."""
        ...

    async def page(
        self, tenant: str, *, purpose: str | None, limit: int, after: str | None, newest_first: bool
    ) -> Sequence[Upload]:
        """Returns the tenant's uploads in the order of their making, those behind `after`."""
        ...

    async def delete(self, tenant: str, upload_id: str) -> Upload | None:
        """Removes the tenant's upload and returns it; raises CONFLICT while an unfinished job reads it."""
        ...


class Uploads:
    """Takes files in, tells of them and removes them."""

    def __init__(self, files: FileStore, store: UploadStore, *, now: Callable[[], float] = time.time) -> None:
        self._files = files
        self._store = store
        self._now = now

    async def add(self, tenant: str, source: BinaryIO, *, filename: str, content_type: str, purpose: Purpose) -> Upload:
        """Stores a file; raises INVALID_ARGUMENT for an empty one, UNAVAILABLE for a full disk."""
        upload_id = f"file-{creation.new_id('file')}"
        if creation.may_exist() and (existing := await self._store.get(tenant, upload_id)):
            return existing
        stored = await self._files.save(source, NotEmpty("file"))
        row = FileRow(stored.file_id, tenant, stored.sha256, stored.size_bytes, content_type, filename)
        upload = Upload(upload_id, row, purpose, int(self._now() * 1000))
        try:
            await self._store.add(upload)
        except PlatformError as error:
            if error.code is Code.FAILED_PRECONDITION:  # it was not taken, and we know it
                await self._files.delete([stored.file_id])
            raise
        return upload

    async def get(self, tenant: str, upload_id: str) -> Upload:
        """Returns the tenant's upload; raises NOT_FOUND."""
        upload = await self._store.get(tenant, upload_id)
        if upload is None:
            raise file_not_found(upload_id)
        return upload

    async def page(
        self, tenant: str, *, purpose: str | None, limit: int, after: str | None, newest_first: bool
    ) -> Sequence[Upload]:
        """Returns the tenant's uploads in the order of their making, those behind `after`."""
        return await self._store.page(tenant, purpose=purpose, limit=limit, after=after, newest_first=newest_first)

    async def delete(self, tenant: str, upload_id: str) -> None:
        """Removes an upload; raises NOT_FOUND, and CONFLICT while an unfinished job reads it."""
        upload = await self._store.delete(tenant, upload_id)
        if upload is None:
            raise file_not_found(upload_id)
        await self._files.delete([upload.row.file_id])


def is_upload_id(value: str) -> bool:
    """Says whether a text has the form of an upload's id."""
    return _UPLOAD_ID.fullmatch(value) is not None


def file_not_found(upload_id: str, param: str = "file_id") -> PlatformError:
    """The error for a file that the tenant does not have."""
    return PlatformError(Code.NOT_FOUND, f"no such file: {upload_id[:100]!r}", param=param, reason="file_not_found")


def check_purpose(upload: Upload, wanted: Purpose, param: str, needs: str) -> None:
    """Raises INVALID_ARGUMENT for a file that was uploaded for something else; `needs` says what would do."""
    if upload.purpose is not wanted:
        raise PlatformError(
            Code.INVALID_ARGUMENT,
            f"the file {upload.upload_id} was uploaded for {upload.purpose.value!r}; {needs}",
            param=param,
            reason="invalid_file_purpose",
        )


def file_is_used(upload_id: str) -> PlatformError:
    """The error for a file that cannot go yet."""
    return PlatformError(
        Code.CONFLICT,
        f"the file {upload_id} is read by a job that has not ended; cancel it, or wait for its end",
        param="file_id",
        reason="file_in_use",
    )


def storage_full(max_bytes: int) -> PlatformError:
    """The error for a tenant that keeps too much."""
    return PlatformError(
        Code.FAILED_PRECONDITION,
        f"your files would take more than {max_bytes} bytes together; delete some first",
        param="file",
        reason="storage_limit_exceeded",
    )
