"""Files that survive a crash: what these functions have returned from is on the disk. They block."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from chassis.errors import Code, PlatformError


@contextmanager
def disk_errors(what: str) -> Iterator[None]:
    """Translates errors of the system; a disk that is full may have room again later, so they may be tried again."""
    try:
        yield
    except OSError as error:
        raise PlatformError(Code.UNAVAILABLE, f"{what}: {error.strerror or error}", retryable=True) from error


def append(path: Path, line: bytes) -> None:
    """Appends a line to a file that is there."""
    with path.open("ab", buffering=0) as file:
        start = file.tell()
        try:
            if file.write(line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(file.fileno())
        except OSError:
            os.truncate(path, start)  # half a line would make the next one unreadable
            raise


def replace(path: Path, data: bytes) -> None:
    """Writes a file whole, or leaves what was there."""
    draft = path.with_suffix(".tmp")
    with draft.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(draft, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Makes names that were made or changed in a folder durable."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
