"""From the engine's thread to the event loop: what a step did to streams and requests, told in few calls."""

import asyncio
import logging
from collections.abc import Callable

from generator.core.active import Active
from generator.core.adapters import LoadedAdapter
from generator.core.events import Summary
from generator.core.stream import TokenStream

log = logging.getLogger(__name__)


class Outbox:
    """Filled under the engine's lock and delivered without it, both on the engine's thread."""

    def __init__(self, on_unused: Callable[[LoadedAdapter], None]) -> None:
        """on_unused is called on the loop when the last request of an adapter has ended."""
        self._on_unused = on_unused
        self._loop: asyncio.AbstractEventLoop | None = None
        self._to_wake: dict[TokenStream, None] = {}
        self._settled: list[tuple[Active, Summary]] = []
        self._unused: list[LoadedAdapter] = []

    @property
    def has_endings(self) -> bool:
        """Whether some request's end waits to be told."""
        return bool(self._settled)

    def attach(self) -> None:
        """Takes the running loop as the one to deliver to."""
        self._loop = asyncio.get_running_loop()

    def wake(self, stream: TokenStream) -> None:
        """Has a stream's reader woken: it has news."""
        self._to_wake[stream] = None

    def settle(self, active: Active, summary: Summary) -> None:
        """Has the end of a request told."""
        self._settled.append((active, summary))

    def leave(self, adapter: LoadedAdapter) -> None:
        """Has it told that nobody uses an adapter any more."""
        self._unused.append(adapter)

    def deliver(self) -> None:
        """Hands all of it to the loop."""
        to_wake, self._to_wake = list(self._to_wake), {}
        settled, self._settled = self._settled, []
        unused, self._unused = self._unused, []
        if to_wake:
            self.call(_wake_all, to_wake)
        for active, summary in settled:
            self.call(active.context.run, active.on_settled, summary)
        for adapter in unused:
            self.call(self._on_unused, adapter)

    def call(self, function: Callable[..., object], *arguments: object) -> None:
        """Calls a function on the loop, soon."""
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:  # the loop is closed: the process is ending and nobody reads any more
            log.debug("the loop was closed before the engine")


def _wake_all(streams: list[TokenStream]) -> None:
    for stream in streams:
        stream.wake()
