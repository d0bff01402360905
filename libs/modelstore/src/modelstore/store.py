"""How folders come into the model store and leave it: whole or not at all, whatever kills the process.

A model is made in a folder beside its place and renamed. Whoever renames, or makes such a folder under the store's own
names, holds the store's lock.
"""

import contextlib
import errno
import fcntl
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from chassis.errors import Code, PlatformError

_MAKING = ".making-"
_REPLACED = ".replaced-"
_REMOVED = ".removed-"
_LOCK_NAME = ".lock"
_LOCK_WAIT_S = 600.0
_LOCK_POLL_S = 0.2


@contextlib.contextmanager
def locked(store: Path) -> Iterator[None]:
    """Keeps others from changing the store until this ends, and clears what a killed run left. Blocks."""
    store.mkdir(parents=True, exist_ok=True)
    with lock_file(store / _LOCK_NAME, _LOCK_WAIT_S, f"another run has changed {store}"):
        _clear_leftovers(store)
        yield


@contextlib.contextmanager
def lock_file(path: Path, wait_s: float, who: str, waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Holds a lock that the kernel frees when its process dies; tells `waiting` once if another holds it.

    Raises DEADLINE_EXCEEDED with `who` after `wait_s`.
    """
    deadline_s, told = time.monotonic() + wait_s, False
    with path.open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() > deadline_s:
                    raise PlatformError(Code.DEADLINE_EXCEEDED, f"{who} for more than {wait_s:.0f} s") from error
                if not told:
                    told = True
                    waiting()
                time.sleep(_LOCK_POLL_S)
        yield


@contextlib.contextmanager
def making(store: Path, model_id: str) -> Iterator[Path]:
    """Gives an empty folder beside the model's place, gone at the end unless it was put in place."""
    folder = store / f"{_MAKING}{model_id}-{os.getpid()}"
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def put_in_place(folder: Path, place: Path) -> None:
    """Moves a whole folder to where it is read from. The one before it goes, though not for those who have it open."""
    _settle(folder)
    replaced = place.with_name(f"{_REPLACED}{place.name}-{os.getpid()}")
    if place.exists():
        os.rename(place, replaced)
    os.rename(folder, place)
    _fsync(place.parent)
    _delete(replaced)


def take_away(place: Path) -> None:
    """Removes a model: hidden by one rename, then deleted."""
    removed = place.with_name(f"{_REMOVED}{place.name}-{os.getpid()}")
    os.rename(place, removed)
    _fsync(place.parent)
    _delete(removed)


def link_or_copy(source: Path, target: Path) -> None:
    """Gives a file of the store, which never changes, a second name; copies where the file system has no links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def check_space(store: Path, what: str, needed_bytes: int) -> None:
    """Raises OSError(ENOSPC) with both numbers where the store's disk is too full."""
    if (free_bytes := shutil.disk_usage(store).free) < needed_bytes:
        raise OSError(errno.ENOSPC, f"{what} needs {needed_bytes} bytes, {free_bytes} are free in {store}")


def _settle(directory: Path) -> None:
    """Makes the files readable by all, and durable before the rename makes them visible."""
    directory.chmod(0o755)
    for path in [*directory.iterdir(), directory]:
        if path.is_file() and path.stat().st_mode & 0o777 != 0o644:
            path.chmod(0o644)
        _fsync(path)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _clear_leftovers(store: Path) -> None:
    """The lock says that nobody is at it now. What was killed between its two renames gets its old self back."""
    for path in store.iterdir():
        if path.name.startswith(_REPLACED):
            place = store / path.name.removeprefix(_REPLACED).rpartition("-")[0]
            if not place.exists():
                os.rename(path, place)
                continue
        if path.name.startswith((_MAKING, _REPLACED, _REMOVED)):
            _delete(path)


def _delete(path: Path) -> None:
    """Deletes a folder; of a link to one, only the link."""
    if path.is_symlink():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path, ignore_errors=True)
