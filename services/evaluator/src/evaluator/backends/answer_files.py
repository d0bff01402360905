"""What was got so far for each job: one file each, `<job_id>.jsonl`, only ever appended to.

The first line names the fingerprint of what was asked, each further line is one answer or one predicted text. A line
that a crash cut short is dropped when the file is opened again.
"""

import asyncio
import dataclasses
import json
import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path

from evaluator.backends import durable_files
from evaluator.backends.durable_files import disk_errors
from evaluator.core.results import Answer, TextBits

log = logging.getLogger(__name__)

_KEPT_S = 14 * 86_400.0  # a file that nobody appended to for so long belongs to a job that no longer exists
_KINDS: dict[str, type[Answer] | type[TextBits]] = {"answer": Answer, "text": TextBits}


class FileJournal:
    """One job's file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = asyncio.Lock()
        self.answers: dict[int, Answer] = {}
        self.texts: dict[int, TextBits] = {}

    async def append(self, entry: Answer | TextBits) -> None:
        """Keeps one more entry; it is on the disk when this returns."""
        async with self._lock:
            await asyncio.to_thread(self._append, entry)
        self.take(entry)

    def take(self, entry: Answer | TextBits) -> None:
        """Takes note of an entry that is in the file."""
        if isinstance(entry, Answer):
            self.answers[entry.index] = entry
        else:
            self.texts[entry.index] = entry

    def _append(self, entry: Answer | TextBits) -> None:
        kind = "answer" if isinstance(entry, Answer) else "text"
        with disk_errors("an answer could not be kept"):
            durable_files.append(self._path, _line({"kind": kind} | dataclasses.asdict(entry)))


class AnswerFiles:
    """The files of all jobs, in one folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    async def open(self, job_id: str, fingerprint: str) -> FileJournal:
        """Returns a job's journal; an empty one where what was kept is of another fingerprint."""
        return await asyncio.to_thread(self._open, job_id, fingerprint)

    async def remove(self, job_id: str) -> None:
        """Forgets a job's journal, if there is one."""
        await asyncio.to_thread(self._remove, job_id)

    def prepare(self) -> None:
        """Makes the folder and removes what jobs left that no longer exist; blocks."""
        self._folder.mkdir(parents=True, exist_ok=True)
        for path in self._folder.iterdir():
            if time.time() - path.stat().st_mtime > _KEPT_S:
                log.info("old answers removed", extra={"path": path.name})
                path.unlink()

    def _open(self, job_id: str, fingerprint: str) -> FileJournal:
        path = self._folder / f"{job_id}.jsonl"
        with disk_errors("the answers of a job could not be opened"):
            if path.exists():
                try:
                    return _read(path, fingerprint)
                except (ValueError, TypeError, KeyError, AttributeError) as error:
                    log.warning(
                        "what was kept of a job is of no use: asked anew",
                        extra={"job_id": job_id, "error": repr(error)},
                    )
            durable_files.replace(path, _line({"fingerprint": fingerprint}))
        return FileJournal(path)

    def _remove(self, job_id: str) -> None:
        with disk_errors("the answers of a job could not be removed"):
            (self._folder / f"{job_id}.jsonl").unlink(missing_ok=True)


def _read(path: Path, fingerprint: str) -> FileJournal:
    """Reads a file; raises one of four errors where it is of another fingerprint or damaged."""
    header, *lines = (json.loads(line) for line in _whole_lines(path))
    if header["fingerprint"] != fingerprint:
        raise ValueError("the task changed since the last attempt")
    journal = FileJournal(path)
    for fields in lines:
        journal.take(_KINDS[fields.pop("kind")](**fields))
    return journal


def _whole_lines(path: Path) -> list[bytes]:
    """Returns the lines of a file; cuts off what follows the last newline."""
    data = path.read_bytes()
    end = data.rfind(b"\n") + 1
    if end < len(data):
        os.truncate(path, end)
    return data[:end].splitlines()


def _line(fields: Mapping[str, object]) -> bytes:
    return json.dumps(fields).encode() + b"\n"
