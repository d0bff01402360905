"""The routes of /v2: the Open Inference Protocol over REST, with Triton's binary data and its generate extension."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import aclosing
from typing import Annotated, Any

import orjson
from fastapi import APIRouter, Request
from pydantic import Field
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from chassis.errors import Code, PlatformError
from gateway.api import errors
from gateway.api.identity import principal_of
from gateway.api.inference import account_of, deadline_of, finished_before_client_left, json_response
from gateway.api.json_body import Body, parse_json, validate
from gateway.api.open_inference import EXTENSIONS, SERVER_NAME, SERVER_VERSION, OpenInference, Sender
from gateway.api.open_inference_tensors import BYTES, check_datatype, from_raw, to_raw
from gateway.api.openapi import documented
from gateway.api.openapi_schemas import FLAG, TEXT, array, record
from gateway.core.open_inference import (
    MAX_ELEMENTS,
    ONLY_VERSION,
    InferRequest,
    InferResponse,
    ModelKind,
    Tensor,
    TensorKind,
)
from gateway.core.readiness import Readiness

_MODEL = "/v2/models/{model}"
_SSE_HEADERS = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-store")]
_HEADER_LENGTH = "inference-header-content-length"

Name = Annotated[str, Field(min_length=1, max_length=256)]
Parameters = Annotated[dict[Name, bool | int | float | str], Field(max_length=64)]


class InferInput(Body):
    name: Name
    datatype: Annotated[str, Field(max_length=40)]
    shape: Annotated[list[Annotated[int, Field(ge=0, le=MAX_ELEMENTS)]], Field(min_length=1, max_length=8)]
    parameters: Parameters | None = None
    data: Any = None


class InferOutput(Body):
    name: Name
    parameters: Parameters | None = None

    @property
    def is_binary(self) -> bool | None:
        """Whether it is wanted as bytes; None where it is not said."""
        said = (self.parameters or {}).get("binary_data")
        return said if isinstance(said, bool) else None


class InferBody(Body):
    """The request."""

    id: Annotated[str, Field(max_length=256)] | None = None
    parameters: Parameters | None = None
    inputs: Annotated[list[InferInput], Field(min_length=1, max_length=64)]
    outputs: Annotated[list[InferOutput], Field(max_length=64)] | None = None

    def binary_outputs(self) -> Callable[[str], bool]:
        """Says of an output's name whether it is wanted as bytes."""
        every = (self.parameters or {}).get("binary_data_output") is True
        said = {one.name: one.is_binary for one in self.outputs or ()}
        return lambda name: every if (own := said.get(name)) is None else own


class GenerateBody(Body):
    """Triton's generate: parameters beside the text or in `parameters`."""

    text_input: str
    id: Annotated[str, Field(max_length=256)] | None = None
    parameters: Parameters | None = None


_TENSOR = record({"name": TEXT, "datatype": TEXT, "shape": array({"type": "integer"})})
_KIND = record(
    {"name": TEXT, "versions": array(TEXT), "platform": TEXT, "inputs": array(_TENSOR), "outputs": array(_TENSOR)}
)


def open_inference_router(inference: OpenInference, readiness: Readiness) -> APIRouter:
    """Makes the routes."""
    router = APIRouter()

    @router.get("/v2", response_model=None)
    @documented(record({"name": TEXT, "version": TEXT, "extensions": array(TEXT)}))
    async def server_metadata() -> dict[str, Any]:
        return {"name": SERVER_NAME, "version": SERVER_VERSION, "extensions": EXTENSIONS}

    @router.get("/v2/health/live", response_model=None)
    @documented(record({"live": FLAG}))
    async def live() -> dict[str, Any]:
        return {"live": True}

    @router.get("/v2/health/ready", response_model=None)
    @documented(record({"ready": FLAG}))
    async def ready() -> dict[str, Any]:
        if not await readiness.check():
            raise PlatformError(Code.UNAVAILABLE, "a service that models need does not answer", retry_after_s=1.0)
        return {"ready": True}

    @documented(_KIND)
    async def model_metadata(request: Request, model: str, version: str = "") -> dict[str, Any]:
        return _kind_shape(await inference.describe(principal_of(request), model, version))

    @documented(record({"name": TEXT, "ready": FLAG}))
    async def model_ready(request: Request, model: str, version: str = "") -> dict[str, Any]:
        await inference.describe(principal_of(request), model, version)
        return {"name": model, "ready": True}

    async def infer(request: Request, model: str, version: str = "") -> Response:
        body, wanted = await _read(request, model, version)
        return _Answer(inference.infer(_sender(request), wanted), lambda answer: _infer_response(answer, body))

    async def generate(request: Request, model: str, version: str = "") -> Response:
        wanted = await _read_generate(request, model, version)
        await inference.check_generates(principal_of(request), model)
        return _Answer(inference.infer(_sender(request), wanted), _generate_response)

    async def generate_stream(request: Request, model: str, version: str = "") -> Response:
        wanted = await _read_generate(request, model, version)
        await inference.check_generates(principal_of(request), model)
        return _Stream(inference.stream(_sender(request), wanted))

    for path in (_MODEL, _MODEL + "/versions/{version}"):
        router.add_api_route(path, model_metadata, methods=["GET"], response_model=None)
        router.add_api_route(path + "/ready", model_ready, methods=["GET"], response_model=None)
        # The protocol has a document of its own, open_inference_rest.yaml; what makes a tensor whole no schema says.
        for action, endpoint in (("infer", infer), ("generate", generate), ("generate_stream", generate_stream)):
            router.add_api_route(
                f"{path}/{action}", endpoint, methods=["POST"], response_model=None, include_in_schema=False
            )
    return router


class _Answer(Response):
    """Asks while it answers, so that a client that leaves is noticed."""

    def __init__(self, work: Awaitable[InferResponse], write: Callable[[InferResponse], Response]) -> None:
        super().__init__()
        self._work = work
        self._write = write

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Works until everything was sent or the client left."""

        async def send_answer() -> None:
            answer = await self._work
            response = await asyncio.to_thread(self._write, answer) if answer.is_large else self._write(answer)
            await response(scope, receive, send)

        if not await finished_before_client_left(send_answer(), receive):
            scope["state"]["account"].finish_reason = "cancelled"


class _Stream(Response):
    """Sends answers as they come, as server-sent events; what fails after the first is a last one with `error`."""

    def __init__(self, answers: AsyncGenerator[InferResponse]) -> None:
        super().__init__()
        self._answers = answers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Works until everything was sent or the client left."""
        if not await finished_before_client_left(self._send(scope, send), receive):
            scope["state"]["account"].finish_reason = "cancelled"

    async def _send(self, scope: Scope, send: Send) -> None:
        has_begun, last = False, b""
        try:
            async with aclosing(self._answers) as answers:
                async for answer in answers:
                    if not has_begun:
                        has_begun = True
                        await send({"type": "http.response.start", "status": 200, "headers": _SSE_HEADERS})
                    await send({"type": "http.response.body", "body": _event(_generated(answer)), "more_body": True})
        except PlatformError as error:
            if not has_begun:
                raise
            scope["state"]["error"] = error
            last = _event({"error": error.message})
        except Exception as error:
            if not has_begun:
                raise
            errors.log_unexpected(error)
            scope["state"]["error"] = errors.internal_error()
            last = _event({"error": errors.INTERNAL_MESSAGE})
        await send({"type": "http.response.body", "body": last, "more_body": False})


def _event(content: Mapping[str, Any]) -> bytes:
    return b"data: " + orjson.dumps(content) + b"\n\n"


def _sender(request: Request) -> Sender:
    return Sender(principal_of(request), account_of(request), deadline_of(request))


async def _body(request: Request) -> bytes:
    if request.headers.get("content-encoding", "identity").strip().lower() not in ("", "identity"):
        raise PlatformError(
            Code.UNSUPPORTED_MEDIA_TYPE, "send the body without content-encoding", param="content-encoding"
        )
    try:
        return await request.body()
    except ClientDisconnect:
        raise PlatformError(Code.CANCELLED, "the client left while it sent the body") from None


async def _read(request: Request, model: str, version: str) -> tuple[InferBody, InferRequest]:
    """Reads JSON and what bytes follow it; raises INVALID_ARGUMENT."""
    raw = await _body(request)
    said = request.headers.get(_HEADER_LENGTH)
    num_bytes = len(raw)
    if said is not None:
        if not (said.isascii() and said.isdecimal() and len(said) < 10 and int(said) <= len(raw)):
            message = f"{_HEADER_LENGTH} must be the length of the JSON in front of the bytes"
            raise PlatformError(Code.INVALID_ARGUMENT, message, param=_HEADER_LENGTH)
        num_bytes = int(said)
    body = validate(parse_json(raw[:num_bytes]), InferBody)
    wanted = InferRequest(
        model,
        version,
        body.id or "",
        body.parameters or {},
        tuple(_tensors(body.inputs, raw[num_bytes:])),
        tuple(one.name for one in body.outputs or ()),
    )
    return body, wanted


def _tensors(inputs: Sequence[InferInput], raw: bytes) -> Iterable[Tensor]:
    at = 0
    for one in inputs:
        size = (one.parameters or {}).get("binary_data_size")
        if size is None:
            yield _from_json(one)
            continue
        if isinstance(size, bool) or not isinstance(size, int) or not 0 <= size <= len(raw) - at:
            message = f"the input {one.name!r} has no {str(size)[:20]} bytes behind the JSON"
            raise PlatformError(Code.INVALID_ARGUMENT, message, param="binary_data_size", reason="invalid_value")
        yield from_raw(one.name, one.datatype, one.shape, raw[at : at + size])
        at += size
    if at != len(raw):
        raise PlatformError(
            Code.INVALID_ARGUMENT, f"{len(raw) - at} bytes behind the JSON belong to no input", param="inputs"
        )


def _from_json(one: InferInput) -> Tensor:
    check_datatype(one.name, one.datatype)
    values: list[Any] = []
    for value in _flat(one.data):
        if isinstance(value, bool) is not (one.datatype == "BOOL") or isinstance(value, str) is not (
            one.datatype == BYTES
        ):
            raise PlatformError(
                Code.INVALID_ARGUMENT,
                f"{one.name}: the data are not {one.datatype}",
                param="data",
                reason="invalid_type",
            )
        values.append(value.encode() if isinstance(value, str) else value)
        if len(values) > MAX_ELEMENTS:
            raise PlatformError(Code.INVALID_ARGUMENT, f"{one.name}: too many elements", param="data")
    return Tensor(one.name, one.datatype, tuple(one.shape), values)


def _flat(data: object) -> Iterable[object]:
    """The elements row by row, from nested lists or one list; JSON has checked the depth."""
    if not isinstance(data, list):
        raise PlatformError(
            Code.INVALID_ARGUMENT, "data must be a list, nested as the shape says or flat", param="data"
        )
    for item in data:
        if isinstance(item, list):
            yield from _flat(item)
        else:
            yield item


async def _read_generate(request: Request, model: str, version: str) -> InferRequest:
    fields = parse_json(await _body(request))
    body = validate(fields, GenerateBody)
    beside = {
        name: value
        for name, value in fields.items()
        if name not in ("text_input", "id", "parameters") and isinstance(value, bool | int | float | str)
    }
    prompt = Tensor("text_input", BYTES, (1,), [body.text_input.encode()])
    return InferRequest(model, version, body.id or "", beside | (body.parameters or {}), (prompt,))


def _infer_response(answer: InferResponse, body: InferBody) -> Response:
    is_binary, blobs, outputs = body.binary_outputs(), [], []
    for one in answer.outputs:
        shown: dict[str, Any] = {"name": one.name, "datatype": one.datatype, "shape": list(one.shape)}
        if is_binary(one.name):
            blobs.append(to_raw(one))
            shown["parameters"] = {"binary_data_size": len(blobs[-1])}
        else:
            shown["data"] = [value.decode() if isinstance(value, bytes) else value for value in one.values]
        outputs.append(shown)
    head = {
        "model_name": answer.model,
        "model_version": ONLY_VERSION,
        "id": answer.id,
        "parameters": dict(answer.parameters),
        "outputs": outputs,
    }
    content = orjson.dumps(head)
    if not blobs:
        return Response(content, media_type="application/json")
    return Response(
        b"".join([content, *blobs]),
        media_type="application/octet-stream",
        headers={_HEADER_LENGTH: str(len(content))},
    )


def _generate_response(answer: InferResponse) -> Response:
    return json_response(_generated(answer))


def _generated(answer: InferResponse) -> dict[str, Any]:
    """What generate says of one text, or of a piece of it."""
    shown = {one.name: one.values[0].decode() for one in answer.outputs if isinstance(one.values[0], bytes)}
    return {"model_name": answer.model, "model_version": ONLY_VERSION, "id": answer.id} | shown


def _kind_shape(kind: ModelKind) -> dict[str, Any]:
    def shapes(tensors: Sequence[TensorKind]) -> list[dict[str, Any]]:
        return [{"name": one.name, "datatype": one.datatype, "shape": list(one.shape)} for one in tensors]

    return {
        "name": kind.name,
        "versions": [ONLY_VERSION],
        "platform": kind.platform,
        "inputs": shapes(kind.inputs),
        "outputs": shapes(kind.outputs),
    }
