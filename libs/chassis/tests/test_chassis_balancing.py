"""A name that stands for several replicas: calls go round them, a lost one is replaced, a new one is found.

The name is asked of a small DNS server of our own, as the headless Service of a cluster would answer it.
"""

import asyncio
import socket
import struct
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import grpc
from pressroom.embedder.v1 import embedder_pb2, embedder_pb2_grpc
from pressroom.generator.v1 import generator_pb2, generator_pb2_grpc

from chassis import rpc
from chassis.errors import PlatformError
from testkit import eventually
from testkit.ports import free_port

TYPE_A, CLASS_IN = 1, 1


class _Names(asyncio.DatagramProtocol):
    """Answers every question for an IPv4 address with `addresses`, valid for no time, and any other with nothing."""

    def __init__(self, *addresses: str) -> None:
        self.addresses = list(addresses)
        self.transport: asyncio.DatagramTransport

    def connection_made(self, transport: asyncio.DatagramTransport) -> None:
        self.transport = transport

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        end = data.index(b"\0", 12) + 5
        (kind,) = struct.unpack("!H", data[end - 4 : end - 2])
        answers = [socket.inet_aton(a) for a in self.addresses] if kind == TYPE_A else []
        head = data[:2] + struct.pack("!HHHHH", 0x8180, 1, len(answers), 0, 0)
        records = b"".join(b"\xc0\x0c" + struct.pack("!HHIH", TYPE_A, CLASS_IN, 0, 4) + a for a in answers)
        self.transport.sendto(head + data[12:end] + records, addr)


class _Replica(embedder_pb2_grpc.EmbedderServiceServicer):
    def __init__(self, address: str) -> None:
        self._address = address

    async def Embed(self, request: embedder_pb2.EmbedRequest, _: object) -> embedder_pb2.EmbedResponse:
        return embedder_pb2.EmbedResponse(model_version=self._address)


class _Talker(generator_pb2_grpc.GeneratorServiceServicer):
    async def Generate(
        self, request: generator_pb2.GenerateRequest, _: object
    ) -> AsyncIterator[generator_pb2.GenerateResponse]:
        for i in range(30):
            yield generator_pb2.GenerateResponse(delta=generator_pb2.Delta(text=str(i)))
            await asyncio.sleep(0.1)


@asynccontextmanager
async def _replicas() -> AsyncIterator[Callable[..., Awaitable[grpc.aio.Server]]]:
    """Gives a function that starts a replica at an address; stops them all, however the test ends."""
    servers: list[grpc.aio.Server] = []

    async def start(address: str, port: int, max_connection_age_s: float | None = None) -> grpc.aio.Server:
        server = rpc.make_server("replica", max_connection_age_s)
        embedder_pb2_grpc.add_EmbedderServiceServicer_to_server(_Replica(address), server)
        generator_pb2_grpc.add_GeneratorServiceServicer_to_server(_Talker(), server)
        server.add_insecure_port(f"{address}:{port}")
        await server.start()
        servers.append(server)
        return server

    try:
        yield start
    finally:
        for server in servers:
            await server.stop(0)


@asynccontextmanager
async def _channel(names: _Names, port: int) -> AsyncIterator[grpc.aio.Channel]:
    loop = asyncio.get_running_loop()
    transport, _ = await loop.create_datagram_endpoint(lambda: names, local_addr=("127.0.0.1", 0))
    dns_port = transport.get_extra_info("sockname")[1]
    try:
        async with rpc.connect(f"dns://127.0.0.1:{dns_port}/replicas.test:{port}") as channel:
            yield channel
    finally:
        transport.close()


async def _ask(channel: grpc.aio.Channel) -> str:
    """The address of the replica that answered; empty where none did."""
    stub = embedder_pb2_grpc.EmbedderServiceStub(channel)
    try:
        async with rpc.call("replica.Embed", timeout_s=5) as call:
            answer = await stub.Embed(embedder_pb2.EmbedRequest(), timeout=call.timeout_s, metadata=call.metadata)
    except PlatformError:
        return ""
    return str(answer.model_version)


async def test_calls_go_round_the_replicas_of_a_name() -> None:
    port = free_port()
    async with _replicas() as start, _channel(_Names("127.0.0.2", "127.0.0.3"), port) as channel:
        for address in ("127.0.0.2", "127.0.0.3"):
            await start(address, port)

        async def both_answer_half() -> bool:  # the first calls may come before the second connection stands
            answers = Counter([await _ask(channel) for _ in range(10)])
            return answers == {"127.0.0.2": 5, "127.0.0.3": 5}

        await eventually(both_answer_half, timeout_s=20)


async def test_a_replica_that_came_back_under_another_address_is_found_within_seconds() -> None:
    port, names = free_port(), _Names("127.0.0.2")
    async with _replicas() as start, _channel(names, port) as channel:
        old = await start("127.0.0.2", port)
        assert await _ask(channel) == "127.0.0.2"
        await old.stop(0)
        names.addresses = ["127.0.0.4"]
        await start("127.0.0.4", port)

        async def found() -> bool:
            return await _ask(channel) == "127.0.0.4"

        await eventually(found, timeout_s=15)  # gRPC's own default would not ask the name again for 30 s


async def test_a_replica_that_was_added_is_found_when_connections_grow_old() -> None:
    port, names = free_port(), _Names("127.0.0.2")
    async with _replicas() as start, _channel(names, port) as channel:
        await start("127.0.0.2", port, max_connection_age_s=1)
        assert await _ask(channel) == "127.0.0.2"
        await start("127.0.0.3", port, max_connection_age_s=1)
        names.addresses.append("127.0.0.3")

        async def both_answer() -> bool:
            return {await _ask(channel) for _ in range(10)} == {"127.0.0.2", "127.0.0.3"}

        await eventually(both_answer, timeout_s=20)


async def test_a_stream_outlives_the_age_of_its_connection() -> None:
    port = free_port()
    async with _replicas() as start, rpc.connect(f"127.0.0.1:{port}") as channel:
        await start("127.0.0.1", port, max_connection_age_s=1)
        stub = generator_pb2_grpc.GeneratorServiceStub(channel)
        async with rpc.call("replica.Generate", timeout_s=30) as call:
            request = generator_pb2.GenerateRequest()
            stream = stub.Generate(request, timeout=call.timeout_s, metadata=call.metadata)
            texts = [response.delta.text async for response in stream]
    assert texts == [str(i) for i in range(30)]
