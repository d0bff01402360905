"""Says on the bus that an adapter can be loaded. Implements core.ports.Announcer."""

from pressroom.events.v1 import events_pb2

from chassis.bus import Bus
from contracts.subjects import EVENTS_MODEL_PUBLISHED
from trainer.core.runs import Adapter


class BusAnnouncer:
    """The caller owns the bus."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus

    async def published(self, adapter: Adapter) -> None:
        """One message id for every time it is said, so that it is stored once."""
        event = events_pb2.ModelPublished(
            id=adapter.id,
            base=adapter.base,
            path=adapter.path,
            manifest_sha256=adapter.manifest_sha256,
            job_id=adapter.job_id,
        )
        message_id = f"{adapter.job_id}.published.{adapter.manifest_sha256[:12]}"
        await self._bus.publish(EVENTS_MODEL_PUBLISHED, event.SerializeToString(), message_id=message_id)
