"""The routes of documents: hand in, list, look at, remove."""

import io
import json
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from pydantic import ConfigDict, Field, WithJsonSchema
from starlette.datastructures import FormData

from chassis.errors import Code, PlatformError
from gateway.api.http_search import Collection, MetadataKey, MetadataValue
from gateway.api.identity import principal_of
from gateway.api.json_body import Body, parse_json, read_json, validate
from gateway.api.multipart import fields_of, file_of, printable, read_form
from gateway.api.openapi import documented
from gateway.api.openapi_schemas import (
    ANY_OBJECT,
    COUNT,
    FLAG,
    TEXT,
    TEXT_FILE,
    TEXT_PATTERN,
    TIME,
    Schema,
    form,
    nullable,
    one_of,
    page,
    record,
)
from gateway.core.content import HTML, MARKDOWN, media_type_of
from gateway.core.content import TEXT as PLAIN_TEXT
from gateway.core.documents import DEFAULT_COLLECTION, Description, Document, Indexed, Library
from gateway.core.jobs import JobStatus

_MAX_METADATA_BYTES = 16 * 1024
_FORM_FIELDS = ("title", "external_id", "collection", "metadata", "content_type")

# One line of printable text: it ends up in logs, lists and answers.
_Line = Annotated[str, Field(max_length=512, pattern=r"^[^\x00-\x1f\x7f]*$")]


# Those that any text is good for; a PDF or a JSONL file must be one.
_TEXTS = (PLAIN_TEXT, MARKDOWN, HTML)
_CONTENT_TYPE = {"type": "string", "enum": list(_TEXTS)}


class _Described(Body):
    """What a client may say of a document."""

    model_config = ConfigDict(extra="forbid")

    title: _Line | None = None
    external_id: _Line | None = None
    collection: Collection | None = None
    content_type: Annotated[str, Field(max_length=200), WithJsonSchema(_CONTENT_TYPE)] | None = None
    metadata: Annotated[dict[MetadataKey, MetadataValue], Field(max_length=64)] | None = None

    def description(self, content_type: str, filename: str) -> Description:
        metadata = self.metadata or {}
        if len(json.dumps(metadata)) > _MAX_METADATA_BYTES:
            message = f"metadata is larger than {_MAX_METADATA_BYTES} bytes"
            raise PlatformError(Code.INVALID_ARGUMENT, message, param="metadata")
        return Description(
            content_type=content_type,
            filename=filename,
            title=self.title or "",
            external_id=self.external_id or "",
            collection=self.collection or DEFAULT_COLLECTION,
            metadata=metadata,
        )


class TextBody(_Described):
    """A document as JSON."""

    text: Annotated[str, WithJsonSchema({"type": "string", "pattern": TEXT_PATTERN})]


DOCUMENT = record(
    {
        "document_id": TEXT,
        "object": one_of("document"),
        "external_id": nullable(TEXT),
        "title": TEXT,
        "collection": TEXT,
        "status": TEXT,
        "job_id": nullable(TEXT),
        "filename": nullable(TEXT),
        "content_type": nullable(TEXT),
        "size_bytes": nullable(COUNT),
        "metadata": ANY_OBJECT,
        "created_at": TIME,
    }
)
_LINE_SCHEMA: Schema = {"type": "string", "maxLength": 512, "pattern": r"^[^\u0000-\u001f\u007f]*$"}
_FORM_SCHEMAS: dict[str, Schema] = {
    "title": _LINE_SCHEMA,
    "external_id": _LINE_SCHEMA,
    "collection": {"type": "string", "pattern": "^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$"},
    "metadata": {"type": "object", "propertyNames": {"pattern": "^[A-Za-z_][A-Za-z0-9_]{0,63}$"}, "maxProperties": 64}
    | {"additionalProperties": {"type": ["string", "boolean"], "maxLength": 1024}},
    "content_type": _CONTENT_TYPE,
}
_FORM = form({"file": TEXT_FILE}, _FORM_SCHEMAS)


def documents_router(library: Library, *, max_upload_bytes: int) -> APIRouter:
    """Makes POST and GET /v1/documents, GET and DELETE /v1/documents/{id}."""
    router = APIRouter()

    @router.post("/v1/documents", status_code=202, response_model=None)
    @documented(record({"job_id": TEXT, "document_id": TEXT}), body=TextBody, form=_FORM, file_types=_TEXTS, status=202)
    async def submit_document(request: Request) -> dict[str, Any]:
        tenant = principal_of(request).tenant
        media_type = request.headers.get("content-type", "").split(";", 1)[0].strip().lower()
        if media_type == "multipart/form-data":
            document = await _submit_form(request, tenant, library, max_upload_bytes)
        else:
            body = await read_json(request, TextBody)
            description = body.description(_declared(body.content_type), "")
            document = await library.submit(tenant, io.BytesIO(body.text.encode()), description, param="text")
        return {"job_id": document.job_id, "document_id": document.document_id}

    @router.get("/v1/documents", response_model=None)
    @documented(page(DOCUMENT))
    async def list_documents(
        request: Request,
        collection: Annotated[str | None, Query(max_length=64)] = None,
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
        after: Annotated[str | None, Query(max_length=100)] = None,
    ) -> dict[str, Any]:
        tenant = principal_of(request).tenant
        found = await library.newest(tenant, collection=collection, limit=limit + 1, after=after)
        data = [_document_shape(document) for document in found[:limit]]
        return {"object": "list", "data": data, "has_more": len(found) > limit}

    @router.get("/v1/documents/{document_id}", response_model=None)
    @documented(record(DOCUMENT["properties"] | {"num_chunks": COUNT}))
    async def get_document(request: Request, document_id: str) -> dict[str, Any]:
        document, indexed = await library.get(principal_of(request).tenant, document_id)
        num_chunks = indexed.num_chunks if indexed else 0
        if document is not None:
            title = document.description.title or (indexed.title if indexed else "")
            return {**_document_shape(document), "title": title, "num_chunks": num_chunks}
        assert indexed is not None
        return {**_indexed_shape(indexed), "num_chunks": num_chunks}

    @router.delete("/v1/documents/{document_id}", response_model=None)
    @documented(record({"document_id": TEXT, "object": one_of("document"), "deleted": FLAG, "num_chunks": COUNT}))
    async def delete_document(request: Request, document_id: str) -> dict[str, Any]:
        num_chunks = await library.delete(principal_of(request).tenant, document_id)
        return {"document_id": document_id, "object": "document", "deleted": True, "num_chunks": num_chunks}

    return router


async def _submit_form(request: Request, tenant: str, library: Library, max_upload_bytes: int) -> Document:
    form = await read_form(request, max_upload_bytes, _FORM_FIELDS)
    try:
        upload = file_of(form)
        described = _described(form)
        filename = printable(upload.filename or "")[:255]
        if described.content_type:
            media_type = _declared(described.content_type, filename)
        else:
            media_type = media_type_of(upload.content_type, filename)
        description = described.description(media_type, filename)
        return await library.submit(tenant, upload.file, description, param="file")
    finally:
        await form.close()


def _described(form: FormData) -> _Described:
    fields: dict[str, Any] = dict(fields_of(form))
    if isinstance(fields.get("metadata"), str):
        try:
            fields["metadata"] = parse_json(fields["metadata"].encode())
        except PlatformError as error:
            message = error.message.replace("the body", "metadata", 1)
            raise PlatformError(Code.INVALID_ARGUMENT, message, param="metadata", reason=error.reason) from None
    return validate(fields, _Described)


def _declared(content_type: str | None, filename: str | None = None) -> str:
    try:
        return media_type_of(content_type or PLAIN_TEXT, filename)
    except PlatformError as error:
        raise PlatformError(error.code, error.message, param="content_type") from None


def _status(status: JobStatus) -> str:
    """A document is indexed when its job has succeeded; the other words are the job's."""
    return "indexed" if status is JobStatus.SUCCEEDED else status.value


def _document_shape(document: Document) -> dict[str, Any]:
    description = document.description
    return {
        "document_id": document.document_id,
        "object": "document",
        "external_id": description.external_id or None,
        "title": description.title,
        "collection": description.collection,
        "status": _status(document.status),
        "job_id": document.job_id,
        "filename": description.filename or None,
        "content_type": description.content_type,
        "size_bytes": document.size_bytes,
        "metadata": dict(description.metadata),
        "created_at": document.created_unix_ms // 1000,
    }


def _indexed_shape(indexed: Indexed) -> dict[str, Any]:
    """A document that only the index knows: one line of a JSONL upload."""
    return {
        "document_id": indexed.document_id,
        "object": "document",
        "external_id": indexed.external_id or None,
        "title": indexed.title,
        "collection": indexed.collection,
        "status": _status(JobStatus.SUCCEEDED),
        "job_id": None,
        "filename": None,
        "content_type": None,
        "size_bytes": None,
        "metadata": dict(indexed.metadata),
        "created_at": indexed.indexed_unix_s,
    }
