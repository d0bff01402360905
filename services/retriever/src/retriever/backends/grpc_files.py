"""Uploaded files, streamed from the gateway over gRPC and checked against their digest."""

import hashlib

import grpc
from pressroom.gateway.v1 import gateway_pb2, gateway_pb2_grpc

from chassis import rpc
from chassis.errors import Code, PlatformError


class GrpcFiles:
    """The gateway's FileService. The caller owns the channel."""

    def __init__(self, channel: grpc.aio.Channel, *, timeout_s: float, max_bytes: int) -> None:
        self._stub = gateway_pb2_grpc.FileServiceStub(channel)
        self._timeout_s = timeout_s
        self._max_bytes = max_bytes

    async def read(self, file_id: str, sha256: str) -> bytes:
        """Returns the bytes of a file of the current tenant.

        Raises NOT_FOUND, PAYLOAD_TOO_LARGE, and DATA_LOSS where the digest (hex, "" for unknown) is another.
        """
        data, digest = bytearray(), hashlib.sha256()
        async with rpc.call("gateway.ReadFile", timeout_s=self._timeout_s) as call:
            request = gateway_pb2.ReadFileRequest(file_id=file_id)
            stream = self._stub.ReadFile(request, timeout=call.timeout_s, metadata=call.metadata)
            try:
                async for piece in stream:
                    data += piece.data
                    digest.update(piece.data)  # piece by piece: the whole would hold the loop up
                    if len(data) > self._max_bytes:
                        message = f"file: it is larger than {self._max_bytes} bytes, which is the most that is ingested"
                        raise PlatformError(Code.PAYLOAD_TOO_LARGE, message, param="file")
            finally:
                stream.cancel()
            call.span.set_attribute("size_bytes", len(data))
        found = digest.hexdigest()
        if sha256 and found != sha256:
            message = f"file: the stored bytes have sha256 {found}, the upload had {sha256}"
            raise PlatformError(Code.DATA_LOSS, message, param="file")
        return bytes(data)
