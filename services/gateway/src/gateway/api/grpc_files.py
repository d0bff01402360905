"""The gateway's FileService: hands uploaded files to the workers of the tenant's jobs."""

from collections.abc import AsyncIterator, Sequence

import grpc.aio
from pressroom.gateway.v1 import gateway_pb2, gateway_pb2_grpc

from chassis import context
from chassis.errors import Code, PlatformError
from gateway.core.documents import FileContent, FileRow, FileShelf


class FileServicer(gateway_pb2_grpc.FileServiceServicer):
    """Serves files, each to its own tenant."""

    def __init__(self, shelves: Sequence[FileShelf], content: FileContent) -> None:
        self._shelves = shelves
        self._content = content

    async def ReadFile(
        self, request: gateway_pb2.ReadFileRequest, _: grpc.aio.ServicerContext
    ) -> AsyncIterator[gateway_pb2.ReadFileResponse]:
        """Streams a file in pieces of at most 1 MiB.

        Raises NOT_FOUND, FAILED_PRECONDITION when its job was cancelled or superseded (a worker that missed the call
        to stop learns it here), and DATA_LOSS when the bytes are not those that were uploaded.
        """
        row = await self._find(request.file_id)
        if row is None:
            raise PlatformError(Code.NOT_FOUND, "no such file", param="file_id")
        if row.is_withdrawn:
            raise PlatformError(Code.FAILED_PRECONDITION, "the job of this file was cancelled", reason="job_cancelled")
        async for piece in self._content.read(row):
            yield gateway_pb2.ReadFileResponse(data=piece)

    async def _find(self, file_id: str) -> FileRow | None:
        for shelf in self._shelves:
            row = await shelf.file(context.current().tenant, file_id)
            if row is not None:
                return row
        return None
