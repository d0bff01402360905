"""Results of evaluations: one file each, `<job_id>.json`, the newest ones."""

import asyncio
import dataclasses
import json
import logging
from pathlib import Path

from chassis.errors import Code, PlatformError
from evaluator.backends import durable_files
from evaluator.backends.durable_files import disk_errors
from evaluator.core.results import MetricValue, Result

log = logging.getLogger(__name__)


class ResultFiles:
    """Keeps at most `max_results`; the oldest make room."""

    def __init__(self, folder: Path, *, max_results: int) -> None:
        self._folder = folder
        self._max_results = max_results

    def prepare(self) -> None:
        """Makes the folder; blocks."""
        self._folder.mkdir(parents=True, exist_ok=True)

    async def get(self, job_id: str) -> Result | None:
        """Returns a result."""
        return await asyncio.to_thread(self._get, job_id)

    async def put(self, result: Result) -> None:
        """Keeps a result; it is durable when this returns."""
        await asyncio.to_thread(self._put, result)

    def _get(self, job_id: str) -> Result | None:
        path = self._folder / f"{job_id}.json"
        with disk_errors("a result could not be read"):
            if not path.exists():
                return None
            data = path.read_bytes()
        try:
            fields = json.loads(data)
            metrics = {name: MetricValue(**values) for name, values in fields.pop("metrics").items()}
            return Result(**fields, metrics=metrics)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise PlatformError(Code.DATA_LOSS, f"the result of {job_id} cannot be read: {error!r}") from error

    def _put(self, result: Result) -> None:
        with disk_errors("a result could not be kept"):
            data = json.dumps(dataclasses.asdict(result)).encode()
            durable_files.replace(self._folder / f"{result.job_id}.json", data)
            self._make_room()

    def _make_room(self) -> None:
        files = sorted(self._folder.glob("*.json"), key=lambda path: path.stat().st_mtime)
        for path in files[: max(0, len(files) - self._max_results)]:
            log.info("the oldest result makes room", extra={"job_id": path.stem})
            path.unlink()
