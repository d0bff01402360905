"""What the workers of long jobs share: how an attempt is told, which jobs are to stop, when a job is given up.

Knows no wire types: contracts.jobs writes and reads the messages, and main joins the two.
"""

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Coroutine
from typing import Any, Literal, Protocol, TypeVar

from chassis.bus import Bus, Received
from chassis.errors import Code, PlatformError
from chassis.patience import is_transient

log = logging.getLogger(__name__)

T = TypeVar("T")

# How a job is consumed: `bus.consume(..., max_deliver=MAX_DELIVER_OF_BUS, ack_wait_s=ACK_WAIT_S, backoff_s=BACKOFF_S)`.
ACK_WAIT_S = 15.0  # a job whose worker was killed is delivered again after this
# A service that is away may stay away for more than 20 minutes before a job fails of it: 45 deliveries, most of them
# 30 s apart, besides what each attempt waits by itself. A crash of ours counts as a delivery too.
MAX_DELIVER = 45
# Deliveries after those run nothing and only tell the end of a job whose last attempt died without a word.
MAX_DELIVER_OF_BUS = MAX_DELIVER + 5
BACKOFF_S = (1.0, 2.0, 5.0, 10.0, 20.0, 30.0)
# What nobody foresaw does not get better by trying all day.
_MAX_UNEXPECTED = 5

_LEAST_PAUSE_S = 0.5
# Reports of a later attempt count from higher up, so that they are told from those of an earlier one.
_SEQUENCES_PER_ATTEMPT = 1_000_000
_REMEMBERED = 4096

Status = Literal["running", "succeeded", "failed", "cancelled"]


class EncodeReport(Protocol):
    """Writes one report; returns its subject and its payload. contracts.jobs.encode_progress is one."""

    def __call__(
        self,
        job_id: str,
        status: Status,
        *,
        done: int,
        total: int,
        error: str,
        result_json: str,
        sequence: int,
        at_unix_ms: int,
    ) -> tuple[str, bytes]: ...


class JobCancelled(Exception):
    """Somebody asked to stop the job; raised between two steps of it."""


class Cancellations:
    """A bounded memory of the jobs to stop: one may be cancelled long before a worker gets to it.

    Cancellations are broadcast, for requests of every kind. `decode` reads the id from a message and raises ValueError
    where it cannot; contracts.jobs.decode_cancel is one.
    """

    def __init__(self, decode: Callable[[bytes], str]) -> None:
        self._decode = decode
        self._ids: OrderedDict[str, None] = OrderedDict()
        self._changed = asyncio.Event()

    def __contains__(self, job_id: str) -> bool:
        return job_id in self._ids

    async def handle(self, received: Received) -> None:
        """Takes a control.request.cancel message."""
        try:
            job_id = self._decode(received.payload)
        except ValueError as error:
            raise PlatformError(Code.INVALID_ARGUMENT, "a cancellation could not be read") from error
        self._ids[job_id] = None
        while len(self._ids) > _REMEMBERED:
            self._ids.popitem(last=False)
        self._changed.set()
        self._changed = asyncio.Event()

    def check(self, job_id: str) -> None:
        """Raises JobCancelled where the job is to stop."""
        if job_id in self._ids:
            raise JobCancelled

    async def run(self, job_id: str, work: Coroutine[Any, Any, T]) -> T:
        """Awaits the work of a job; cancels it and raises JobCancelled as soon as the job is to stop."""
        working = asyncio.create_task(work)
        stopping = asyncio.create_task(self._until_cancelled(job_id))
        try:
            await asyncio.wait({working, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if working.done():
                return working.result()
            raise JobCancelled
        finally:
            working.cancel()
            stopping.cancel()
            await asyncio.wait({working, stopping})

    async def _until_cancelled(self, job_id: str) -> None:
        while job_id not in self._ids:
            await self._changed.wait()

    def forget(self, job_id: str) -> None:
        """Drops a job that has ended."""
        self._ids.pop(job_id, None)


class Reporter:
    """Tells the bus how one attempt at a job goes, with rising sequence numbers."""

    def __init__(
        self,
        bus: Bus,
        encode: EncodeReport,
        job_id: str,
        attempt: int,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._bus = bus
        self._encode = encode
        self._job_id = job_id
        self._sequence = attempt * _SEQUENCES_PER_ATTEMPT
        self._clock = clock
        self._next_at = float("-inf")
        self._done = 0
        self._total = 0

    async def running(self, done: int = 0, total: int = 0, *, result_json: str = "") -> None:
        """Tells of progress: not more often than twice a second, and a report that is lost is no harm.

        The first report that knows the total is told in any case: the next may be minutes away.
        """
        is_news = total > 0 and self._total == 0
        self._done, self._total = done, total
        if self._clock() < self._next_at and not is_news:
            return
        self._next_at = self._clock() + _LEAST_PAUSE_S
        try:
            await self._publish("running", result_json=result_json)
        except PlatformError as error:
            log.debug("progress was not published", extra={"job_id": self._job_id, "error": repr(error)})

    async def ended(
        self, status: Literal["succeeded", "failed", "cancelled"], *, error: str = "", result_json: str = ""
    ) -> None:
        """Tells the end; raises UNAVAILABLE where the bus did not take it."""
        await self._publish(status, error=error, result_json=result_json)

    async def _publish(self, status: Status, *, error: str = "", result_json: str = "") -> None:
        self._sequence += 1
        subject, payload = self._encode(
            self._job_id,
            status,
            done=self._done,
            total=self._total,
            error=error,
            result_json=result_json,
            sequence=self._sequence,
            at_unix_ms=int(time.time() * 1000),
        )
        await self._bus.publish(subject, payload, message_id=f"{self._job_id}.{self._sequence}")


def check_attempt(delivery: int) -> None:
    """Raises INTERNAL where the job was delivered too often to be tried once more: it is only told to have failed."""
    if delivery > MAX_DELIVER:
        raise PlatformError(Code.INTERNAL, f"given up after {MAX_DELIVER} attempts: the last ones were cut off")


def final_reason(error: Exception, delivery: int, service: str) -> str | None:
    """Returns what to tell the client where the job is over; None where it is worth another delivery."""
    if isinstance(error, PlatformError):
        if not is_transient(error):
            return error.message
        return f"given up after {delivery} attempts: {error.message}" if delivery >= MAX_DELIVER else None
    return f"an unexpected error; the {service}'s log has the cause" if delivery >= _MAX_UNEXPECTED else None


def again(error: Exception) -> PlatformError:
    """Makes the error that has the bus deliver the job again, which a code alone may not say."""
    return PlatformError(Code.UNAVAILABLE, f"the job is delivered again: {error}", retryable=True)
