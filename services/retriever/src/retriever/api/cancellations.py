"""Remembers which jobs somebody asked to stop. Cancellations are broadcast, for requests of every kind."""

from collections import OrderedDict

from google.protobuf.message import DecodeError
from pressroom.events.v1 import events_pb2

from chassis.bus import Received
from chassis.errors import Code, PlatformError

_REMEMBERED = 4096


class Cancellations:
    """A bounded memory: a job may be cancelled long before a worker gets to it."""

    def __init__(self) -> None:
        self._ids: OrderedDict[str, None] = OrderedDict()

    def __contains__(self, job_id: str) -> bool:
        return job_id in self._ids

    async def handle(self, received: Received) -> None:
        """Takes a control.request.cancel message."""
        try:
            message = events_pb2.RequestCancel.FromString(received.payload)
        except DecodeError as error:
            raise PlatformError(Code.INVALID_ARGUMENT, "a cancellation could not be read") from error
        self._ids[message.id] = None
        while len(self._ids) > _REMEMBERED:
            self._ids.popitem(last=False)

    def forget(self, job_id: str) -> None:
        """Drops a job that has ended."""
        self._ids.pop(job_id, None)
