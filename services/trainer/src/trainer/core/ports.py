"""What a finetune needs of the world."""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from trainer.core.runs import Adapter, Run, RunEvent, Step, TrainOrder

ChildMessage = Mapping[str, Any]  # what a child tells: see backends.lora.child


class Files(Protocol):
    """Where uploads are read from."""

    async def read(self, file_id: str, sha256: str) -> bytes:
        """Returns the bytes of a file of the current tenant. Raises PlatformError."""
        ...


class RunFolder(Protocol):
    """What is kept of one run. Its methods block for a small file's time; raise OSError where the disk is full."""

    @property
    def path(self) -> Path:
        """Where it lies."""
        ...

    def save(self, run: Run) -> None:
        """Replaces what is known of the run."""
        ...

    def add_event(self, event: RunEvent) -> None:
        """Appends an event."""
        ...

    def steps(self) -> list[Step]:
        """Returns the steps done so far, without gap or double."""
        ...

    def write_input(self, data: bytes, spec: Mapping[str, Any]) -> None:
        """Puts down what the child reads."""
        ...

    def prune(self) -> None:
        """Removes all but the run, its events and its steps."""
        ...


class RunFolders(Protocol):
    """All runs."""

    def begin(self, order: TrainOrder) -> tuple[Run, RunFolder]:
        """Opens a run's folder, with what an earlier attempt has left there."""
        ...

    def prune(self) -> None:
        """Drops the oldest runs that have ended, above a number."""
        ...


class Trainings(Protocol):
    """Runs the child that trains."""

    async def run(self, folder: RunFolder, on_message: Callable[[ChildMessage], Awaitable[None]]) -> "ChildEnd":
        """Returns how the child ended; kills it where cancelled. Raises only what `on_message` raises."""
        ...


class ChildEnd(Protocol):
    """How a child ended."""

    @property
    def status(self) -> int:
        """0, an exit status, or minus the signal's number."""
        ...

    @property
    def last_words(self) -> str:
        """Tail of its standard error."""
        ...


class Adapters(Protocol):
    """The adapters in the model store. Methods block; raise OSError where the disk is full."""

    def find(self, order: TrainOrder) -> Adapter | None:
        """Returns the adapter that the order's job has published already."""
        ...

    def publish(self, order: TrainOrder, folder: RunFolder, made: Mapping[str, Any]) -> Adapter:
        """Puts the run's adapter into the store, whole or not at all."""
        ...

    def remove(self, job_id: str) -> None:
        """Takes a job's adapter, whole or half, out of the store."""
        ...

    def versions(self, base: str) -> Sequence[Adapter]:
        """Returns all adapters of a base ("": of any), newest first."""
        ...


class Announcer(Protocol):
    """Says that an adapter can be loaded."""

    async def published(self, adapter: Adapter) -> None:
        """Stores the event; saying it twice is saying it once. Raises UNAVAILABLE."""
        ...


class Serving(Protocol):
    """The engine that is to serve the adapter."""

    async def load(self, adapter: Adapter) -> None:
        """Returns once a probe was answered through the adapter. Raises PlatformError."""
        ...

    async def unload(self, adapter_id: str) -> None:
        """Takes it away again; one that is not loaded is no error. Raises PlatformError."""
        ...


class Tracker(Protocol):
    """Mirrors a run into the experiment tracker, beside the work; never raises and never delays for long."""

    async def follow(self, folder: RunFolder) -> None:
        """Mirrors until the run has ended and all of it is told, or until cancelled."""
        ...


class Watcher(Protocol):
    """Whoever follows the job."""

    def check(self) -> None:
        """Raises where the job is to stop."""
        ...

    async def report(self, done: int, total: int) -> None:
        """Takes steps done and steps in all."""
        ...
