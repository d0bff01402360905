"""Uploaded files, streamed from their owner over gRPC, bounded in size and checked against their digest.

Knows no wire types: contracts.jobs.open_file makes the call.
"""

import hashlib
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Protocol

import grpc

from chassis import rpc
from chassis.errors import Code, PlatformError


class Piece(Protocol):
    """One message of the stream."""

    @property
    def data(self) -> bytes: ...


class PieceStream(Protocol):
    """The running call."""

    def __aiter__(self) -> AsyncIterator[Piece]: ...
    def cancel(self) -> bool: ...


OpenFile = Callable[[grpc.aio.Channel, str, float, Sequence[tuple[str, str]]], PieceStream]


class GrpcFiles:
    """The gateway's FileService. The caller owns the channel."""

    def __init__(self, channel: grpc.aio.Channel, open_file: OpenFile, *, timeout_s: float, max_bytes: int) -> None:
        self._channel = channel
        self._open_file = open_file
        self._timeout_s = timeout_s
        self._max_bytes = max_bytes

    async def read(self, file_id: str, sha256: str) -> bytes:
        """Returns the bytes of a file of the current tenant.

        Raises NOT_FOUND, PAYLOAD_TOO_LARGE, and DATA_LOSS where the digest (hex, "" for unknown) is another.
        """
        data, digest = bytearray(), hashlib.sha256()
        async with rpc.call("gateway.ReadFile", timeout_s=self._timeout_s) as call:
            stream = self._open_file(self._channel, file_id, call.timeout_s, call.metadata)
            try:
                async for piece in stream:
                    data += piece.data
                    digest.update(piece.data)  # piece by piece: the whole would hold the loop up
                    if len(data) > self._max_bytes:
                        message = f"file: it is larger than {self._max_bytes} bytes, which is the most that is taken"
                        raise PlatformError(Code.PAYLOAD_TOO_LARGE, message, param="file")
            finally:
                stream.cancel()
            call.span.set_attribute("size_bytes", len(data))
        found = digest.hexdigest()
        if sha256 and found != sha256:
            message = f"file: the stored bytes have sha256 {found}, the upload had {sha256}"
            raise PlatformError(Code.DATA_LOSS, message, param="file")
        return bytes(data)
