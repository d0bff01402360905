"""The generator's book of usage, asked over gRPC. Implements core.ledger.FinalUsages.

A call of the generator may have gone to any replica behind its name, and each knows its own calls only: so all of them
are asked, each by its address.
"""

import asyncio
import socket
from collections.abc import Sequence
from dataclasses import dataclass, field

import grpc.aio
from pressroom.generator.v1 import generator_pb2 as pb
from pressroom.generator.v1 import generator_pb2_grpc

from chassis import context, rpc
from chassis.errors import Code, PlatformError
from gateway.core.ledger import Final
from gateway.core.services import Usage


@dataclass(slots=True)
class _Replica:
    channel: grpc.aio.Channel
    stub: generator_pb2_grpc.GeneratorServiceStub = field(init=False)

    def __post_init__(self) -> None:
        self.stub = generator_pb2_grpc.GeneratorServiceStub(self.channel)


class GeneratorUsage:
    """Keeps a channel to each replica behind the addresses. Close it at the end."""

    def __init__(self, addresses: Sequence[str]) -> None:
        self._told = tuple(addresses)
        self._replicas: dict[str, _Replica] = {}

    async def final(self, usage_id: str, *, timeout_s: float) -> Final:
        """See FinalUsages.final. Raises UNAVAILABLE where no replica answers; one that does not makes it incomplete."""
        addresses = await self._addresses(timeout_s)
        asked = [self._ask(replica, usage_id, timeout_s) for replica in await self._connected(addresses)]
        found = await asyncio.gather(*asked, return_exceptions=True)
        answers: dict[str, pb.CloseUsageResponse] = {}
        errors: list[PlatformError] = []
        for one in found:
            if isinstance(one, pb.CloseUsageResponse):
                answers[one.instance] = one  # a replica with two addresses is one replica
            elif isinstance(one, PlatformError):
                errors.append(one)
            elif isinstance(one, asyncio.CancelledError):  # not we were: the channel was closed, its replica is gone
                errors.append(PlatformError(Code.UNAVAILABLE, "the replica is gone", retry_after_s=1.0))
            else:
                raise one
        if not answers:
            raise errors[0]
        usages = [
            Usage(a.usage.prompt_tokens, a.usage.completion_tokens, a.usage.cached_tokens) for a in answers.values()
        ]
        return Final(
            usage=sum(usages, Usage()),
            num_calls=sum(answer.num_calls for answer in answers.values()),
            is_complete=not errors,
        )

    async def close(self) -> None:
        """Closes the channels."""
        replicas, self._replicas = list(self._replicas.values()), {}
        for replica in replicas:
            await replica.channel.close()

    async def _ask(self, replica: _Replica, usage_id: str, timeout_s: float) -> pb.CloseUsageResponse:
        # The request has ended, and with it the deadline that it had.
        with context.use(context.RequestContext(context.current().request_id)):
            async with rpc.call("generator.CloseUsage", timeout_s=timeout_s) as out:
                response: pb.CloseUsageResponse = await replica.stub.CloseUsage(
                    pb.CloseUsageRequest(usage_id=usage_id), timeout=out.timeout_s, metadata=out.metadata
                )
                return response

    async def _addresses(self, timeout_s: float) -> list[str]:
        found = await asyncio.gather(*(self._looked_up(address, timeout_s) for address in self._told))
        return sorted(set().union(*found))

    async def _looked_up(self, address: str, timeout_s: float) -> set[str]:
        host, _, port = address.rpartition(":")
        try:
            async with asyncio.timeout(timeout_s):
                found = await asyncio.get_running_loop().getaddrinfo(host, int(port), type=socket.SOCK_STREAM)
        except (OSError, TimeoutError) as error:
            message = f"the generator's name cannot be looked up: {error}"
            raise PlatformError(Code.UNAVAILABLE, message, retry_after_s=1.0) from error
        hosts = {(family, str(address[0])) for family, _, _, _, address in found}
        return {f"[{ip}]:{port}" if family == socket.AF_INET6 else f"{ip}:{port}" for family, ip in hosts}

    async def _connected(self, addresses: list[str]) -> list[_Replica]:
        for address in addresses:
            if address not in self._replicas:
                self._replicas[address] = _Replica(rpc.connect(address))
        wanted = [self._replicas[address] for address in addresses]
        for address in set(self._replicas) - set(addresses):
            await self._replicas.pop(address).channel.close()
        return wanted
