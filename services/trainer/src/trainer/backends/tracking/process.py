"""Starts the process that mirrors a run into MLflow. Implements core.ports.Tracker.

A tracker that fails is a line in the log and never a failed job: the run's own folder is what counts.
"""

import asyncio
import contextlib
import logging
import sys
from pathlib import Path

from trainer.core.ports import RunFolder

log = logging.getLogger(__name__)

_COMMAND = (sys.executable, "-m", "trainer.backends.tracking.mirror")
_TAIL_BYTES = 2000


class MlflowTracker:
    """uri: MLflow's tracking URI; "" for a SQLite file in data_dir, "none" for no tracking."""

    def __init__(self, uri: str, data_dir: Path, experiment: str) -> None:
        self._uri = uri or f"sqlite:///{(data_dir / 'mlflow.db').resolve()}"
        self._artifacts = (data_dir / "mlflow-artifacts").resolve()
        self._experiment = experiment

    async def follow(self, folder: RunFolder) -> None:
        """See Tracker.follow."""
        if self._uri == "none":
            return
        try:
            status, last_words = await self._run(folder)
        except OSError as error:
            status, last_words = -1, repr(error)
        if status != 0:
            log.warning("a run is not tracked", extra={"folder": folder.path.name, "error": last_words})

    async def _run(self, folder: RunFolder) -> tuple[int, str]:
        process = await asyncio.create_subprocess_exec(
            *_COMMAND,
            str(folder.path),
            self._uri,
            self._artifacts.as_uri(),
            self._experiment,
            stdin=asyncio.subprocess.PIPE,  # stays open: the process ends when it closes
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
        )
        assert process.stderr is not None
        tail = b""
        try:
            while piece := await process.stderr.read(4096):
                tail = (tail + piece)[-_TAIL_BYTES:]
            return await process.wait(), tail.decode(errors="replace")
        finally:
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
                await process.wait()
