"""A transport whose writes of one turn of the event loop leave together.

uvloop sends every write at once, with a system call and a packet each. A stream's head and the events that are there
already leave in one here: when the task that writes them waits for more, and never later, since no timer is involved.
"""

import asyncio
from typing import Any

_MAX_HELD_BYTES = 64 * 1024


class CorkedTransport:
    """Wraps a transport for a protocol that writes by `write` and ends by `close`; all else passes through."""

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport = transport
        self._loop = loop
        self._held: list[bytes] = []
        self._held_bytes = 0

    def write(self, data: bytes) -> None:
        """Holds the data until the loop turns, or until there is much of it."""
        if not self._held:
            self._loop.call_soon(self._flush)
        self._held.append(data)
        self._held_bytes += len(data)
        if self._held_bytes > _MAX_HELD_BYTES:
            self._flush()

    def close(self) -> None:
        """Sends what is held, then closes."""
        self._flush()
        self._transport.close()

    def write_eof(self) -> None:
        """Sends what is held, then says that nothing more comes."""
        self._flush()
        self._transport.write_eof()

    def _flush(self) -> None:
        held, self._held, self._held_bytes = self._held, [], 0
        if held and not self._transport.is_closing():
            self._transport.write(b"".join(held))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)
