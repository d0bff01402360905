"""Reads forms with one file from strangers: bounded, and every refusal names the field."""

from collections.abc import AsyncGenerator, Sequence

from fastapi import Request
from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect

from chassis.errors import Code, PlatformError

_MAX_FIELD_BYTES = 64 * 1024


async def read_form(request: Request, max_bytes: int, fields: Sequence[str]) -> FormData:
    """Reads the form; the caller closes it. `fields` are those that it may have beside the file."""

    async def bounded() -> AsyncGenerator[bytes]:
        num_bytes = 0
        async for piece in request.stream():
            num_bytes += len(piece)
            # The form around the file is counted too, so it gets a little room.
            if num_bytes > max_bytes + _MAX_FIELD_BYTES:
                raise PlatformError(
                    Code.PAYLOAD_TOO_LARGE, f"an upload may have {max_bytes} bytes at most", param="file"
                )
            yield piece

    media_type = request.headers.get("content-type", "").split(";", 1)[0].strip().lower()
    if media_type != "multipart/form-data":
        raise PlatformError(Code.UNSUPPORTED_MEDIA_TYPE, "send the file as multipart/form-data", param="content-type")
    if request.headers.get("content-encoding", "identity").strip().lower() not in ("", "identity"):
        raise PlatformError(
            Code.UNSUPPORTED_MEDIA_TYPE, "send the body without content-encoding", param="content-encoding"
        )
    parser = MultiPartParser(
        request.headers, bounded(), max_files=1, max_fields=len(fields), max_part_size=_MAX_FIELD_BYTES
    )
    try:
        return await parser.parse()
    except MultiPartException as error:
        raise PlatformError(Code.INVALID_ARGUMENT, f"the form is not valid: {error.message}") from None
    except ClientDisconnect:
        raise PlatformError(Code.CANCELLED, "the client left while it sent the form") from None


def file_of(form: FormData) -> UploadFile:
    """The file of the form; raises INVALID_ARGUMENT where there is none."""
    upload = form.get("file")
    if not isinstance(upload, UploadFile):
        raise PlatformError(
            Code.INVALID_ARGUMENT, "the form needs a file", param="file", reason="missing_required_parameter"
        )
    return upload


def fields_of(form: FormData) -> dict[str, str]:
    """The form's other fields; raises INVALID_ARGUMENT for one that appears twice."""
    fields: dict[str, str] = {}
    for name, value in form.multi_items():
        if name in fields or (name == "file" and not isinstance(value, UploadFile)):
            raise PlatformError(Code.INVALID_ARGUMENT, f"{name[:100]} appears twice in the form", param=name[:100])
        if isinstance(value, str):
            fields[name] = value
    return fields


def printable(text: str) -> str:
    """Drops what would break a log line, a header or a terminal; for the names that clients give their files."""
    return "".join(char for char in text if char.isprintable())
