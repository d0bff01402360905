"""What the gateway calls out to everybody on the bus.

Implements core.administration.Announcer and core.jobs.Canceller.
"""

import logging

from pressroom.events.v1 import events_pb2

from chassis.bus import Bus
from chassis.errors import PlatformError
from contracts import subjects

_log = logging.getLogger(__name__)


class BusControl:
    """Broadcasts control messages. A lost one is logged and made good elsewhere (see the two protocols)."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus

    async def access_changed(self, *, key_ids: list[str], tenants: list[str]) -> None:
        """Says that keys, and all keys of tenants, are no longer what they were; never raises."""
        message = events_pb2.KeysRevoked(key_ids=key_ids, tenants=tenants)
        await self._say(subjects.CONTROL_KEYS_REVOKED, message.SerializeToString())

    async def cancel(self, work_id: str, reason: str) -> None:
        """Says that a job or request is to be stopped; never raises."""
        message = events_pb2.RequestCancel(id=work_id, reason=reason)
        await self._say(subjects.CONTROL_REQUEST_CANCEL, message.SerializeToString())

    async def _say(self, subject: str, payload: bytes) -> None:
        try:
            await self._bus.broadcast(subject, payload)
        except PlatformError as error:
            _log.warning("broadcast was not sent", extra={"subject": subject, "error": repr(error)})
