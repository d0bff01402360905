"""Tells the bus how one attempt at a job goes."""

import logging
import time
from collections.abc import Callable

from pressroom.common.v1 import common_pb2
from pressroom.events.v1 import events_pb2

from chassis.bus import Bus
from chassis.errors import PlatformError
from contracts.subjects import progress

log = logging.getLogger(__name__)

_LEAST_PAUSE_S = 0.5
# Reports of a later attempt count from higher up, so that they are told from those of an earlier one.
_SEQUENCES_PER_ATTEMPT = 1_000_000


class Reporter:
    """Publishes JobProgress messages with rising sequence numbers."""

    def __init__(self, bus: Bus, job_id: str, attempt: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._bus = bus
        self._job_id = job_id
        self._sequence = attempt * _SEQUENCES_PER_ATTEMPT
        self._clock = clock
        self._next_at = float("-inf")
        self._done = 0
        self._total = 0

    async def running(self, done: int = 0, total: int = 0) -> None:
        """Tells of progress: not more often than twice a second, and a report that is lost is no harm."""
        self._done, self._total = done, total
        if self._clock() < self._next_at:
            return
        self._next_at = self._clock() + _LEAST_PAUSE_S
        try:
            await self._publish(common_pb2.JOB_STATUS_RUNNING)
        except PlatformError as error:
            log.debug("progress was not published", extra={"job_id": self._job_id, "error": repr(error)})

    async def ended(self, status: common_pb2.JobStatus, *, error: str = "", result_json: str = "") -> None:
        """Tells the end; raises UNAVAILABLE where the bus did not take it."""
        await self._publish(status, error=error, result_json=result_json)

    async def _publish(self, status: common_pb2.JobStatus, *, error: str = "", result_json: str = "") -> None:
        self._sequence += 1
        message = events_pb2.JobProgress(
            job_id=self._job_id,
            status=status,
            done=self._done,
            total=self._total,
            error=error,
            result_json=result_json,
            sequence=self._sequence,
            at_unix_ms=int(time.time() * 1000),
        )
        message_id = f"{self._job_id}.{self._sequence}"
        await self._bus.publish(progress(self._job_id), message.SerializeToString(), message_id=message_id)
