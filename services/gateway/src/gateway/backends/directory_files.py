"""Uploaded files in a directory, under ids of ours. Implements core.documents.FileStore.

A file appears under its name only when all its bytes are on disk. Which tenant a file belongs to stands in the
database; nothing that a client sends ever becomes part of a path.
"""

import asyncio
import contextlib
import hashlib
import os
import re
import tempfile
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Collection, Sequence
from pathlib import Path
from typing import BinaryIO

from chassis.errors import Code, PlatformError
from gateway.core.content import NotEmpty
from gateway.core.documents import FileRow, Inspection, StoredFile

_PIECE_BYTES = 1024 * 1024
_NAME = re.compile(r"file_[0-9a-f]{32}(\.part)?")
_SWEEP_AGE_S = 3600.0  # younger ones may be uploads whose rows are about to be written


class DirectoryFiles:
    """Reads and writes one directory, which must exist."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    async def save(self, source: BinaryIO, inspector: Inspection) -> StoredFile:
        """Copies the source, durable when it returns; raises what the inspector raises, UNAVAILABLE for a full disk."""
        return await asyncio.to_thread(self._save, source, inspector)

    async def write(self, pieces: AsyncIterator[bytes]) -> StoredFile:
        """Writes what comes, durable when it returns; raises UNAVAILABLE for a full disk."""
        # Collected on disk first: save() copies in one thread, and what comes here comes from the loop.
        with tempfile.TemporaryFile(dir=self._directory) as collected:
            try:
                async for piece in pieces:
                    await asyncio.to_thread(collected.write, piece)
                collected.seek(0)
            except OSError as error:
                raise _not_stored() from error
            return await self.save(collected, NotEmpty("results"))

    async def delete(self, file_ids: Sequence[str]) -> None:
        """Removes files; one that is gone already is no error."""
        if file_ids:
            await asyncio.to_thread(self._delete, file_ids)

    async def read(self, row: FileRow) -> AsyncGenerator[bytes]:
        """Yields the bytes in pieces of at most 1 MiB; raises DATA_LOSS when they are not those that were stored."""
        file = await asyncio.to_thread(self._open, row)
        digest = hashlib.sha256()
        try:
            while piece := await asyncio.to_thread(file.read, _PIECE_BYTES):
                digest.update(piece)
                yield piece
        finally:
            file.close()
        if digest.hexdigest() != row.sha256:
            raise PlatformError(
                Code.DATA_LOSS, f"file {row.file_id} is damaged: sha256 {digest.hexdigest()}, stored {row.sha256}"
            )

    async def sweep(self, known: Collection[str]) -> int:
        """Removes old files that no row knows, left by a crash between file and row; returns how many."""
        return await asyncio.to_thread(self._sweep, known)

    def _save(self, source: BinaryIO, inspector: Inspection) -> StoredFile:
        file_id = f"file_{uuid.uuid4().hex}"
        final, part = self._directory / file_id, self._directory / f"{file_id}.part"
        digest, size_bytes = hashlib.sha256(), 0
        try:
            with part.open("xb") as target:
                while piece := source.read(_PIECE_BYTES):
                    inspector.feed(piece)
                    digest.update(piece)
                    target.write(piece)
                    size_bytes += len(piece)
                inspector.finish()
                target.flush()
                os.fsync(target.fileno())
            part.rename(final)
            self._sync_directory()
        except BaseException as error:
            part.unlink(missing_ok=True)
            if isinstance(error, OSError):
                raise _not_stored() from error
            raise
        return StoredFile(file_id, digest.hexdigest(), size_bytes)

    def _delete(self, file_ids: Sequence[str]) -> None:
        for file_id in file_ids:
            assert _NAME.fullmatch(file_id), "file ids are ours"
            (self._directory / file_id).unlink(missing_ok=True)

    def _open(self, row: FileRow) -> BinaryIO:
        assert _NAME.fullmatch(row.file_id), "file ids are ours"
        try:
            return (self._directory / row.file_id).open("rb")
        except OSError as error:
            raise PlatformError(Code.DATA_LOSS, f"file {row.file_id} cannot be read: {error.strerror}") from error

    def _sweep(self, known: Collection[str]) -> int:
        before, num_swept = time.time() - _SWEEP_AGE_S, 0
        for path in self._directory.iterdir():
            if not _NAME.fullmatch(path.name) or path.name in known:
                continue
            with contextlib.suppress(FileNotFoundError):
                if path.stat().st_mtime < before:
                    path.unlink()
                    num_swept += 1
        return num_swept

    def _sync_directory(self) -> None:
        descriptor = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _not_stored() -> PlatformError:
    return PlatformError(Code.UNAVAILABLE, "the file could not be stored", retryable=True)
