"""The bus: cancels of running requests, and models that were published."""

import logging
from collections.abc import Awaitable, Callable

from google.protobuf.message import DecodeError
from pressroom.events.v1 import events_pb2

from chassis.bus import Received
from chassis.errors import Code, PlatformError
from generator.core.engine import Engine

log = logging.getLogger(__name__)


def make_cancel_handler(engine: Engine) -> Callable[[Received], Awaitable[None]]:
    """Returns the handler of control.request.cancel; every replica hears of every cancel, most have nothing to do."""

    async def cancel(received: Received) -> None:
        try:
            message = events_pb2.RequestCancel.FromString(received.payload)
        except DecodeError:  # a broadcast: there is no dead letter to put it into
            log.warning("cancel could not be read")
            return
        num_cancelled = engine.cancel(message.id) if message.id else 0
        if num_cancelled:
            log.info("request cancelled", extra={"cancelled_id": message.id, "reason": message.reason})

    return cancel


async def on_model_published(received: Received) -> None:
    """Tells that a published adapter is not loaded: this engine cannot yet."""
    try:
        message = events_pb2.ModelPublished.FromString(received.payload)
    except DecodeError as error:
        raise PlatformError(Code.DATA_LOSS, "the event could not be read", retryable=False) from error
    log.warning("published model not loaded: adapters are not supported yet", extra={"model": message.id})
