"""One durable consumer on JetStream: runs the handler and answers the server for it."""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import nats.errors
from nats.aio.msg import Msg
from opentelemetry import trace

from chassis import context, metrics, telemetry
from chassis.bus import DEAD_PREFIX, MESSAGE_ID, REQUEST_ID, Handler, Received
from chassis.errors import PlatformError

log = logging.getLogger(__name__)

ANSWER_TIMEOUT_S = 5.0
_RETRY_S = 0.5

Store = Callable[[str, bytes, dict[str, str], float], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Consumer:
    """One durable consumer: runs the handler and answers the server for it."""

    service: str
    store: Store  # of the bus, for dead letters
    subject: str
    durable: str
    handler: Handler
    max_deliver: int
    ack_wait_s: float
    backoff_s: tuple[float, ...]

    async def take(self, message: Msg) -> None:
        headers = dict(message.headers or {})
        received = Received(
            message.subject, message.data, headers.get(MESSAGE_ID, ""), message.metadata.num_delivered, headers
        )
        if received.num_delivered > self.max_deliver:  # it took the process down with it each time
            await self._bury(message, received, "delivered too often")
            return
        heartbeat = asyncio.create_task(self._keep_alive(message))
        try:
            error = await self._handle(received)
        except asyncio.CancelledError:  # this process stops: another may have it at once, not after ack_wait
            with contextlib.suppress(nats.errors.Error, OSError):
                await message.nak()
            raise
        finally:
            heartbeat.cancel()
        if error is None:
            await self._ack(message)
        elif self._hopeless(error) or received.num_delivered >= self.max_deliver:
            await self._bury(message, received, repr(error))
        else:
            delay_s = self.backoff_s[min(received.num_delivered, len(self.backoff_s)) - 1] if self.backoff_s else 0.0
            await message.nak(delay=delay_s)
            self._count("retry")

    async def _ack(self, message: Msg) -> None:
        try:
            await message.ack_sync(timeout=ANSWER_TIMEOUT_S)
        except (TimeoutError, nats.errors.Error, OSError) as error:  # done, but it may come again
            log.warning("ack was not confirmed", extra={"consumer": self.durable, "error": repr(error)})
            self._count("unconfirmed")
            return
        self._count("ack")

    async def _handle(self, received: Received) -> Exception | None:
        """Runs the handler in the publisher's trace and request; returns what it raised."""
        span = telemetry.tracer().start_span(
            f"{self.durable} {received.subject}",
            context=telemetry.parent_from(received.headers),
            kind=trace.SpanKind.CONSUMER,
        )
        span.set_attribute("messaging.message.id", received.message_id)
        span.set_attribute("messaging.delivery", received.num_delivered)
        request = context.RequestContext(request_id=received.headers.get(REQUEST_ID, ""))
        with trace.use_span(span, end_on_exit=True, record_exception=False), context.use(request):
            try:
                await self.handler(received)
            except Exception as error:
                expected = isinstance(error, PlatformError)
                log.log(
                    logging.WARNING if expected else logging.ERROR,
                    "message was not handled",
                    exc_info=None if expected else error,
                    extra={"consumer": self.durable, "error": repr(error), "delivery": received.num_delivered},
                )
                span.set_status(trace.StatusCode.ERROR, repr(error)[:200])
                return error
        return None

    async def _keep_alive(self, message: Msg) -> None:
        while True:
            await asyncio.sleep(self.ack_wait_s / 3)
            try:
                await message.in_progress()
            except (nats.errors.Error, OSError) as error:  # the handler goes on; the message may come again
                log.debug("heartbeat failed", extra={"consumer": self.durable, "error": repr(error)})

    async def _bury(self, message: Msg, received: Received, error: str) -> None:
        headers = {
            MESSAGE_ID: f"dead-{self.durable}-{received.message_id or message.metadata.sequence.stream}",
            "Pressroom-Consumer": self.durable,
            "Pressroom-Error": " ".join(error.split())[:500],
            "Pressroom-Delivered": str(received.num_delivered),
        }
        if "traceparent" in received.headers:
            headers["traceparent"] = received.headers["traceparent"]
        try:
            await self.store(DEAD_PREFIX + received.subject, received.payload, headers, ANSWER_TIMEOUT_S)
        except PlatformError as lost:  # not buried, so not finished either: it comes again
            log.warning("dead letter could not be stored", extra={"consumer": self.durable, "error": repr(lost)})
            await message.nak(delay=_RETRY_S)
            return
        log.error("message became a dead letter", extra={"consumer": self.durable, "error": error})
        await message.term()
        self._count("dead")

    @staticmethod
    def _hopeless(error: Exception) -> bool:
        return isinstance(error, PlatformError) and not error.retryable

    def _count(self, outcome: str) -> None:
        metrics.BUS_MESSAGES.labels(self.service, self.durable, outcome).inc()
