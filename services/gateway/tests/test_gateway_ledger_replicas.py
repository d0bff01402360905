"""The question to the generator's replicas, whatever becomes of them while it is asked."""

import asyncio

import grpc.aio
import pytest
from pressroom.common.v1 import common_pb2
from pressroom.generator.v1 import generator_pb2 as pb
from pressroom.generator.v1 import generator_pb2_grpc

from chassis.errors import Code, PlatformError
from gateway.backends.generator_usage import GeneratorUsage
from gateway.core.services import Usage
from testkit import eventually


class Replica(generator_pb2_grpc.GeneratorServiceServicer):
    """Knows one usage, and tells it when it may."""

    def __init__(self):
        self.num_asked = 0
        self.may_tell = asyncio.Event()

    async def CloseUsage(self, request, context):
        self.num_asked += 1
        await self.may_tell.wait()
        usage = common_pb2.Usage(prompt_tokens=2, completion_tokens=3)
        return pb.CloseUsageResponse(usage=usage, num_calls=1, instance="one")


@pytest.fixture
async def served():
    replica, server = Replica(), grpc.aio.server()
    generator_pb2_grpc.add_GeneratorServiceServicer_to_server(replica, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield replica, f"127.0.0.1:{port}"
    await server.stop(None)


@pytest.fixture
async def usages():
    asked = GeneratorUsage(["generator:9000"])
    yield asked
    await asked.close()


def names(monkeypatch, usages, addresses):
    """What the generator's name stands for from here on."""

    async def looked_up(address, timeout_s):
        return set(addresses)

    monkeypatch.setattr(usages, "_looked_up", looked_up)


async def test_replica_that_tells(served, usages, monkeypatch):
    replica, address = served
    replica.may_tell.set()
    names(monkeypatch, usages, [address])
    final = await usages.final("u", timeout_s=10.0)
    assert (final.usage, final.num_calls, final.is_complete) == (Usage(2, 3, 0), 1, True)


async def test_replica_that_goes_while_it_is_asked_is_one_that_does_not_answer(served, usages, monkeypatch):
    replica, address = served
    names(monkeypatch, usages, [address])
    asking = asyncio.create_task(usages.final("u", timeout_s=30.0))
    await eventually(lambda: replica.num_asked)
    names(monkeypatch, usages, ["127.0.0.1:1"])  # nobody is there
    for asked in (usages.final("v", timeout_s=5.0), asking):
        with pytest.raises(PlatformError) as caught:
            await asked
        assert caught.value.code is Code.UNAVAILABLE
