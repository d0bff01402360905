"""The generator, asked to load an adapter. Implements core.ports.Serving."""

import grpc.aio
from pressroom.generator.v1 import generator_pb2 as pb
from pressroom.generator.v1 import generator_pb2_grpc

from chassis import rpc
from chassis.errors import Code, PlatformError
from trainer.core.runs import Adapter

_UNLOAD_TIMEOUT_S = 10.0


class GrpcGenerator:
    """The caller owns the channel."""

    def __init__(self, channel: grpc.aio.Channel, *, load_timeout_s: float) -> None:
        self._stub = generator_pb2_grpc.GeneratorServiceStub(channel)
        self._load_timeout_s = load_timeout_s

    async def load(self, adapter: Adapter) -> None:
        """See Serving.load."""
        request = pb.LoadAdapterRequest(adapter=adapter.id, path=adapter.path, manifest_sha256=adapter.manifest_sha256)
        async with rpc.call("generator.LoadAdapter", timeout_s=self._load_timeout_s) as call:
            await self._stub.LoadAdapter(request, timeout=call.timeout_s, metadata=call.metadata)

    async def unload(self, adapter_id: str) -> None:
        """See Serving.unload."""
        request = pb.UnloadAdapterRequest(adapter=adapter_id)
        try:
            async with rpc.call("generator.UnloadAdapter", timeout_s=_UNLOAD_TIMEOUT_S) as call:
                await self._stub.UnloadAdapter(request, timeout=call.timeout_s, metadata=call.metadata)
        except PlatformError as error:
            if error.code is not Code.NOT_FOUND:
                raise
