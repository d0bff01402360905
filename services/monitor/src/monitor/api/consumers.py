"""Hears of finished requests on the bus."""

import logging

from google.protobuf.message import DecodeError
from pressroom.events.v1 import events_pb2

from chassis.bus import Received
from chassis.errors import Code, PlatformError
from monitor.core.tally import FinishedRequest, Tally

log = logging.getLogger(__name__)

DURABLE = "monitor-requests"


class RequestRecords:
    """Handles deliveries of RequestCompleted."""

    def __init__(self, tally: Tally) -> None:
        self._tally = tally

    async def handle(self, received: Received) -> None:
        """Counts the request, once however often it is delivered; what cannot be read is a dead letter."""
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
        log.debug("record heard", extra={"request": event.request_id, "model": event.model, "is_new": is_new})
