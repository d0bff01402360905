"""What of the bus needs no server."""

import asyncio
from typing import Any

import pytest

from chassis.bus import Received, StreamSpec
from chassis.nats_bus import NatsBus


class _Client:
    """Stands in for nats-py's client: a fetch that is cancelled while its answer arrives answers all the same."""

    is_connected = True

    def __init__(self, is_there: bool) -> None:
        self._is_there = is_there
        self.fetching = asyncio.Event()

    def jsm(self, **_: object) -> "_Client":
        return self

    jetstream = jsm

    async def add_consumer(self, *_: object) -> None: ...

    async def consumer_info(self, *_: object) -> None:
        raise TimeoutError

    async def pull_subscribe_bind(self, **_: object) -> "_Client":
        return self

    async def fetch(self, *_: object, **__: object) -> list[Any]:
        self.fetching.set()
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            self.is_connected = self._is_there
        return []

    async def unsubscribe(self) -> None: ...


@pytest.mark.parametrize("is_there", [True, False])
async def test_a_consumer_ends_though_its_client_dropped_the_cancellation(is_there: bool) -> None:
    async def handle(_: Received) -> None: ...

    client = _Client(is_there)
    bus = NatsBus(client, "test", [StreamSpec("S", ("s.>",), "limits", 0.0, 1)])  # type: ignore[arg-type]
    bus._ready.set()
    consuming = asyncio.create_task(bus.consume("s.x", durable="d", handler=handle))
    await client.fetching.wait()
    consuming.cancel()
    await asyncio.wait({consuming}, timeout=5)
    assert consuming.cancelled()
