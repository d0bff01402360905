"""The routes of /v1/files: OpenAI's paths and shapes."""

from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Annotated, Any, Literal
from urllib.parse import quote

from fastapi import APIRouter, Query, Request
from pydantic import ConfigDict
from starlette.datastructures import FormData
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from gateway.api.identity import principal_of
from gateway.api.inference import json_response
from gateway.api.json_body import Body, unsupported, validate
from gateway.api.multipart import fields_of, file_of, printable, read_form
from gateway.api.openapi import documented
from gateway.api.openapi_schemas import COUNT, FILE, FLAG, TEXT, TIME, form, one_of, page, record
from gateway.core.documents import FileContent
from gateway.core.uploads import Purpose, Upload, Uploads

_FORM_FIELDS = ("purpose", "expires_after[anchor]", "expires_after[seconds]")
_MAX_PAGE = 1_000  # OpenAI's clients may ask for 10,000, and read page by page what has_more announces
_MAX_FILENAME_CHARS = 255


class _UploadBody(Body):
    """What a client says of its file."""

    model_config = ConfigDict(extra="forbid")

    purpose: Literal["assistants", "batch", "fine-tune", "vision", "user_data", "evals"]


_CLIENTS_PURPOSES = [purpose for purpose in Purpose if purpose is not Purpose.BATCH_OUTPUT]
FILE_OBJECT = record(
    {
        "id": TEXT,
        "object": one_of("file"),
        "bytes": COUNT,
        "created_at": TIME,
        "expires_at": {"type": "null"},
        "filename": TEXT,
        "purpose": one_of(*Purpose),
        "status": one_of("processed"),
    }
)


def files_router(uploads: Uploads, content: FileContent, *, max_upload_bytes: int) -> APIRouter:
    """Makes POST and GET /v1/files, GET and DELETE /v1/files/{id}, GET /v1/files/{id}/content."""
    router = APIRouter()

    @router.post("/v1/files", response_model=None)
    @documented(FILE_OBJECT, form=form({"file": FILE, "purpose": one_of(*_CLIENTS_PURPOSES)}))
    async def upload_file(request: Request) -> dict[str, Any]:
        tenant = principal_of(request).tenant
        form = await read_form(request, max_upload_bytes, _FORM_FIELDS)
        try:
            return file_shape(await _add(uploads, tenant, form))
        finally:
            await form.close()

    @router.get("/v1/files", response_model=None)
    @documented(page(FILE_OBJECT, with_ends=True))
    async def list_files(
        request: Request,
        purpose: Annotated[str | None, Query(max_length=100)] = None,
        limit: Annotated[int, Query(ge=1, le=10_000)] = _MAX_PAGE,
        after: Annotated[str | None, Query(max_length=100)] = None,
        order: Literal["asc", "desc"] = "desc",
    ) -> Response:
        limit = min(limit, _MAX_PAGE)
        found = await uploads.page(
            principal_of(request).tenant, purpose=purpose, limit=limit + 1, after=after, newest_first=order == "desc"
        )
        # Written by orjson: FastAPI's own encoder would hold up the event loop over a long page.
        return json_response(page_shape([file_shape(one) for one in found[:limit]], has_more=len(found) > limit))

    @router.get("/v1/files/{file_id}", response_model=None)
    @documented(FILE_OBJECT)
    async def get_file(request: Request, file_id: str) -> dict[str, Any]:
        return file_shape(await uploads.get(principal_of(request).tenant, file_id))

    @router.delete("/v1/files/{file_id}", response_model=None)
    @documented(record({"id": TEXT, "object": one_of("file"), "deleted": FLAG}))
    async def delete_file(request: Request, file_id: str) -> dict[str, Any]:
        await uploads.delete(principal_of(request).tenant, file_id)
        return {"id": file_id, "object": "file", "deleted": True}

    @router.get("/v1/files/{file_id}/content", response_model=None)
    @documented(media_type="application/octet-stream")
    async def get_content(request: Request, file_id: str) -> Response:
        upload = await uploads.get(principal_of(request).tenant, file_id)
        pieces = _checked(content, upload)
        # What cannot be opened is a real HTTP status: the headers go out after the first piece is at hand.
        return _Content(upload, await anext(pieces), pieces)

    return router


def file_shape(upload: Upload) -> dict[str, Any]:
    """OpenAI's file object."""
    return {
        "id": upload.upload_id,
        "object": "file",
        "bytes": upload.row.size_bytes,
        "created_at": upload.created_unix_ms // 1000,
        "expires_at": None,
        "filename": upload.row.filename,
        "purpose": upload.purpose.value,
        "status": "processed",
        "status_details": None,
    }


def page_shape(data: list[dict[str, Any]], *, has_more: bool) -> dict[str, Any]:
    """OpenAI's list object."""
    return {
        "object": "list",
        "data": data,
        "first_id": data[0]["id"] if data else None,
        "last_id": data[-1]["id"] if data else None,
        "has_more": has_more,
    }


async def _add(uploads: Uploads, tenant: str, form: FormData) -> Upload:
    file = file_of(form)
    fields: Mapping[str, str] = fields_of(form)
    if any(name.startswith("expires_after") for name in fields):
        raise unsupported("expires_after", "files do not expire: delete them")
    body = validate(fields, _UploadBody)
    filename = printable(file.filename or "")[-_MAX_FILENAME_CHARS:]
    return await uploads.add(
        tenant,
        file.file,
        filename=filename or "upload",
        content_type=printable(file.content_type or "")[:200],
        purpose=Purpose(body.purpose),
    )


async def _checked(content: FileContent, upload: Upload) -> AsyncGenerator[bytes]:
    """Yields the file's pieces, the last one only when the whole has the checksum that it should have.

    A damaged file thus ends short of its content-length, and no client takes it for whole.
    """
    held = b""
    async for piece in content.read(upload.row):
        if held:
            yield held
        held = piece
    yield held


class _Content(StreamingResponse):
    """A file's bytes, as a download."""

    def __init__(self, upload: Upload, first: bytes, rest: AsyncGenerator[bytes]) -> None:
        self._first = first
        self._rest = rest
        headers = {
            "content-length": str(upload.row.size_bytes),
            "content-disposition": f"attachment; filename*=UTF-8''{quote(upload.row.filename, safe='')}",
            # What a stranger uploaded is never to be shown as a page of ours.
            "x-content-type-options": "nosniff",
        }
        super().__init__(self._pieces(), media_type="application/octet-stream", headers=headers)

    async def _pieces(self) -> AsyncGenerator[bytes]:
        yield self._first
        async for piece in self._rest:
            yield piece

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the bytes; closes the file even where the client left."""
        async with aclosing(self._rest):
            await super().__call__(scope, receive, send)
