"""The tasks that the evaluator has: those that it ships, and those of a folder that the operator names.

A file is called `<name>.yaml` or `<name>@<version>.yaml`, after what stands in it. It is read whenever it is asked for,
so that a task can be added without a restart. What is shipped comes first: a folder cannot change it.
"""

import asyncio
import logging
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from chassis.errors import Code, PlatformError
from evaluator.backends.yaml_tasks import read_task
from evaluator.core.tasks import Task

log = logging.getLogger(__name__)

SHIPPED = Path(__file__).resolve().parent.parent / "tasks"
_LABEL = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}(@[a-z0-9._-]{1,32})?")
_MAX_FILES = 200


class TaskFolders:
    """Finds and reads task files, in threads."""

    def __init__(self, folders: Sequence[Path], *, max_bytes: int) -> None:
        self._folders = folders
        self._max_bytes = max_bytes

    async def named(self, label: str) -> Task:
        """Returns a task by "name" or "name@version"; raises NOT_FOUND with the names there are."""
        return await asyncio.to_thread(self._named, label)

    async def read(self, data: bytes) -> Task:
        """Reads a client's own task file; raises INVALID_ARGUMENT that names the field."""
        return await asyncio.to_thread(read_task, data)

    async def all(self) -> Sequence[Task]:
        """Returns every task that can be read, by name; what cannot is told in the log."""
        return await asyncio.to_thread(self._all)

    def _named(self, label: str) -> Task:
        if _LABEL.fullmatch(label):
            name, _, version = label.partition("@")
            for folder in self._folders:
                for candidate in dict.fromkeys((f"{label}.yaml", f"{name}.yaml")):
                    path = folder / candidate
                    if path.is_file() and (not version or self._read(path).version == version):
                        return self._read(path)
        known = ", ".join(task.label for task in self._all()) or "none"
        message = f"task: there is no task {label[:128]!r}; there are {known}"
        raise PlatformError(Code.NOT_FOUND, message, param="task", reason="task_not_found")

    def _all(self) -> Sequence[Task]:
        found: dict[str, Task] = {}
        for path in self._paths():
            try:
                task = self._read(path)
            except PlatformError as error:
                log.warning("a task file cannot be read", extra={"path": str(path), "error": error.message})
                continue
            found.setdefault(task.label, task)
        return [found[label] for label in sorted(found)]

    def _paths(self) -> Iterator[Path]:
        for folder in self._folders:
            try:
                yield from sorted(folder.glob("*.yaml"))[:_MAX_FILES]
            except OSError as error:
                log.warning("a folder of tasks cannot be read", extra={"path": str(folder), "error": str(error)})

    def _read(self, path: Path) -> Task:
        try:
            with path.open("rb") as file:
                data = file.read(self._max_bytes + 1)
        except OSError as error:
            raise PlatformError(Code.INTERNAL, f"task: {path.name} cannot be read: {error.strerror}") from error
        if len(data) > self._max_bytes:
            message = f"task: {path.name} is larger than {self._max_bytes} bytes"
            raise PlatformError(Code.PAYLOAD_TOO_LARGE, message, param="task")
        task = read_task(data)
        if path.stem not in (task.name, task.label):
            message = f"task: {path.name} holds a task of another name, {task.label}"
            raise PlatformError(Code.FAILED_PRECONDITION, message, param="task")
        return task
