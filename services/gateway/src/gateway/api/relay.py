"""Publishes what the outbox holds, in the order of writing, and outlives every absence of the bus.

A message may be published twice (a crash between publishing and marking): it keeps its id, and consumers are
idempotent. Nobody waits for the relay.
"""

import asyncio
import logging
import time
from collections.abc import Callable

from chassis import context
from chassis.bus import Bus
from chassis.errors import PlatformError
from gateway.core.outbox import Outbox, Pending

_log = logging.getLogger(__name__)

_BATCH = 128
_IDLE_S = 5.0
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 2.0
_PUBLISH_TIMEOUT_S = 5.0
_BETWEEN_S = 0.05  # from one look to the next: a batch costs about as much as one message, and people wait meanwhile
_PRUNE_EVERY_S = 60.0
_KEPT_S = 600.0  # what was published stays so long, for whoever asks what happened


class Relay:
    """One background task; run() until cancelled."""

    def __init__(self, outbox: Outbox, bus: Bus, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._outbox = outbox
        self._bus = bus
        self._clock = clock
        self._pause_s = 0.0
        self._prune_at = 0.0
        self._look_at = 0.0  # what comes after a silence is published at once

    async def run(self) -> None:
        """Publishes until cancelled."""
        while True:
            try:
                await self._outbox.wait(_IDLE_S)
                await asyncio.sleep(self._look_at - self._clock())
                self._look_at = self._clock() + _BETWEEN_S
                while await self._publish_batch():
                    pass
                await self._prune()
            except PlatformError as error:
                await self._rest(error)

    async def _publish_batch(self) -> bool:
        """Publishes some; False when there was nothing. Raises PlatformError when bus or database cannot, now."""
        batch = await self._outbox.unpublished(_BATCH)
        published: list[int] = []
        refused: list[tuple[int, str]] = []
        try:
            for pending in batch:
                reason = await self._publish(pending)
                if reason is None:
                    published.append(pending.id)
                else:
                    refused.append((pending.id, reason))
        finally:
            if published or refused:
                await self._outbox.settle(published, refused)
        if batch and self._pause_s:
            _log.info("outbox is published again")
            self._pause_s = 0.0
        return bool(batch)

    async def _publish(self, pending: Pending) -> str | None:
        """Publishes one; returns why the bus will never take it. Raises PlatformError when it does not take it now."""
        message = pending.message
        try:
            with context.use(context.RequestContext(request_id=message.request_id)):
                await self._bus.publish(
                    message.subject,
                    message.payload,
                    message_id=message.message_id,
                    traceparent=message.traceparent,
                    timeout_s=_PUBLISH_TIMEOUT_S,
                )
        except PlatformError as error:
            if error.retryable:
                raise
            # One that can never be published must not hold up those behind it; the row stays for a person to see.
            _log.error("message was refused by the bus", extra={"outbox_id": pending.id, "error": repr(error)})
            return repr(error)
        return None

    async def _prune(self) -> None:
        if self._clock() >= self._prune_at:
            while await self._outbox.prune(_KEPT_S):
                pass
            self._prune_at = self._clock() + _PRUNE_EVERY_S

    async def _rest(self, error: PlatformError) -> None:
        if not self._pause_s:
            _log.warning("outbox waits, nothing is lost", extra={"error": repr(error)})
        self._pause_s = min(max(self._pause_s * 2, _FIRST_PAUSE_S), _LONGEST_PAUSE_S)
        await asyncio.sleep(self._pause_s)
        self._outbox.notify()
