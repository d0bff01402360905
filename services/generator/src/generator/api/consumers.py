"""The bus: cancels of running requests, and models that were published."""

import logging
from collections.abc import Awaitable, Callable

from google.protobuf.message import DecodeError
from pressroom.events.v1 import events_pb2

from chassis.bus import Received
from chassis.errors import Code, PlatformError
from generator.core.adapters import FULL
from generator.core.engine import Engine
from generator.core.library import ANOTHER_BASE, AdapterLibrary, AdapterOrder

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


def make_published_handler(library: AdapterLibrary) -> Callable[[Received], Awaitable[None]]:
    """Returns the handler of events.model.published: the adapter answers before the event is acked.

    Where others in use leave no room, it will when it is asked for.
    """

    async def publish(received: Received) -> None:
        try:
            message = events_pb2.ModelPublished.FromString(received.payload)
        except DecodeError as error:
            raise PlatformError(Code.DATA_LOSS, "the event could not be read", retryable=False) from error
        order = AdapterOrder(message.id, message.path, message.manifest_sha256)
        try:
            await library.load(order, only_newer=True)
        except PlatformError as error:
            if error.reason == ANOTHER_BASE:  # some other generator's
                log.info("published adapter is not for this base", extra={"adapter": order.id, "error": error.message})
                return
            if error.reason == FULL and library.is_known(order):
                log.info("published adapter waits to be asked for", extra={"adapter": order.id})
                return
            if error.code is Code.NOT_FOUND:  # a store that is shared over a network may lag behind the event
                raise PlatformError(error.code, error.message, retryable=True) from error
            raise

    return publish
