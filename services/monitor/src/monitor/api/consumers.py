"""Hears of finished requests on the bus."""

import logging
from collections.abc import Awaitable, Callable

from google.protobuf.message import DecodeError
from pressroom.events.v1 import events_pb2

from chassis.bus import Received
from chassis.errors import Code, PlatformError
from monitor.core.samples import Sample, Sampler
from monitor.core.tally import FinishedRequest, Tally

log = logging.getLogger(__name__)

DURABLE = "monitor-requests"
CONCURRENCY = 8  # the handler waits for the disk
# A sick disk delays: only what fails for a quarter of an hour becomes a dead letter.
MAX_DELIVER, BACKOFF_S = 20, (1.0, 5.0, 15.0, 60.0)


class RequestRecords:
    """Handles deliveries of RequestCompleted: counts each, and hands the sampled ones to be profiled."""

    def __init__(self, tally: Tally, sampler: Sampler, admit: Callable[[Sample], Awaitable[None]]) -> None:
        self._tally = tally
        self._sampler = sampler
        self._admit = admit

    async def handle(self, received: Received) -> None:
        """Counts the request, once however often it is delivered; what cannot be read is a dead letter.

        Returns, and so acknowledges, once a sampled record is on disk.
        """
        try:
            event = events_pb2.RequestCompleted.FromString(received.payload)
        except DecodeError as error:
            raise PlatformError(Code.INVALID_ARGUMENT, "a record of a request could not be read") from error
        request = FinishedRequest(
            model=event.model,
            finish_reason=event.finish_reason,
            succeeded=event.http_status < 400,
            prompt_tokens=event.usage.prompt_tokens,
            completion_tokens=event.usage.completion_tokens,
            cached_tokens=event.usage.cached_tokens,
        )
        # The message's id and not the request's: a client may choose the latter and use it twice.
        is_new = self._tally.record(received.message_id, request)
        ended_unix_s = event.started_unix_ms / 1000 + event.duration_s
        sample = self._sampler.take(
            received.message_id, self._tally.label(request), ended_unix_s, event.prompt_text, event.completion_text
        )
        # Not for new ones alone: one that was counted may have failed to reach the disk. The store knows its own.
        if sample is not None:
            await self._admit(sample)
        log.debug(
            "record heard",
            extra={
                "request": event.request_id,
                "model": event.model,
                "is_new": is_new,
                "is_sampled": sample is not None,
            },
        )
