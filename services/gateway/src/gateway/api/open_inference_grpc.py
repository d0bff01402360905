"""The Open Inference Protocol over gRPC, for clients outside: each call brings its key, as an HTTP request does.

Nothing that a client says of a tenant is believed; what the key says is.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import aclosing, asynccontextmanager
from typing import Any

import grpc.aio
from pressroom.inference import grpc_service_pb2 as wire
from pressroom.inference import grpc_service_pb2_grpc
from starlette.datastructures import Headers

from chassis import context, telemetry
from chassis.errors import Code, PlatformError
from contracts.names import HEADER_REQUEST_ID, HEADER_TRACE_ID
from gateway.api.middleware import SANE_REQUEST_ID
from gateway.api.middleware_access import credential_of, require_allowed
from gateway.api.open_inference import EXTENSIONS, SERVER_NAME, SERVER_VERSION, OpenInference, Sender
from gateway.api.open_inference_tensors import BYTES, check_datatype, from_raw, to_raw
from gateway.api.scopes import require_scope
from gateway.api.settlement import Recorder
from gateway.core.account import Account
from gateway.core.graph import Deadline
from gateway.core.open_inference import ONLY_VERSION, InferRequest, InferResponse, Parameter, Tensor, TensorKind
from gateway.core.ports import Keys, Principal, RequestLimiter
from gateway.core.readiness import Readiness

ROUTE = "/v2/models/{model}/infer"
_MAX_TENSORS = 64
_MAX_REQUESTS = 10_000  # of one stream
_EMPTY_FINAL = "triton_enable_empty_final_response"
_IS_FINAL = "triton_final_response"
_CONTENTS: Mapping[str, str] = {
    BYTES: "bytes_contents",
    "BOOL": "bool_contents",
    "INT8": "int_contents",
    "INT16": "int_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "UINT8": "uint_contents",
    "UINT16": "uint_contents",
    "UINT32": "uint_contents",
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
}


class InferenceServicer(grpc_service_pb2_grpc.GRPCInferenceServiceServicer):
    """Answers calls of the protocol."""

    def __init__(
        self,
        inference: OpenInference,
        readiness: Readiness,
        keys: Keys,
        limiter: RequestLimiter,
        recorder: Recorder,
        *,
        timeout_s: float,
    ) -> None:
        self._inference = inference
        self._readiness = readiness
        self._keys = keys
        self._limiter = limiter
        self._recorder = recorder
        self._timeout_s = timeout_s

    async def ServerLive(self, _: wire.ServerLiveRequest, __: grpc.aio.ServicerContext) -> wire.ServerLiveResponse:
        """The process runs. Needs no key."""
        return wire.ServerLiveResponse(live=True)

    async def ServerReady(self, _: wire.ServerReadyRequest, __: grpc.aio.ServicerContext) -> wire.ServerReadyResponse:
        """The services behind it answer. Needs no key."""
        context.enter(context.RequestContext())
        return wire.ServerReadyResponse(ready=await self._readiness.check())

    async def ServerMetadata(
        self, _: wire.ServerMetadataRequest, __: grpc.aio.ServicerContext
    ) -> wire.ServerMetadataResponse:
        """What this server is. Needs no key."""
        return wire.ServerMetadataResponse(name=SERVER_NAME, version=SERVER_VERSION, extensions=EXTENSIONS)

    async def ModelReady(
        self, request: wire.ModelReadyRequest, rpc: grpc.aio.ServicerContext
    ) -> wire.ModelReadyResponse:
        """Whether the sender can ask the model."""
        principal = await self._known(rpc)
        try:
            await self._inference.describe(principal, request.name, request.version)
        except PlatformError as error:
            if error.code is not Code.NOT_FOUND:
                raise
            return wire.ModelReadyResponse(ready=False)
        return wire.ModelReadyResponse(ready=True)

    async def ModelMetadata(
        self, request: wire.ModelMetadataRequest, rpc: grpc.aio.ServicerContext
    ) -> wire.ModelMetadataResponse:
        """What a model takes and gives; raises NOT_FOUND."""
        kind = await self._inference.describe(await self._known(rpc), request.name, request.version)

        def tensors(kinds: tuple[TensorKind, ...]) -> list[wire.ModelMetadataResponse.TensorMetadata]:
            return [
                wire.ModelMetadataResponse.TensorMetadata(name=one.name, datatype=one.datatype, shape=one.shape)
                for one in kinds
            ]

        return wire.ModelMetadataResponse(
            name=kind.name,
            versions=[ONLY_VERSION],
            platform=kind.platform,
            inputs=tensors(kind.inputs),
            outputs=tensors(kind.outputs),
        )

    async def ModelInfer(
        self, request: wire.ModelInferRequest, rpc: grpc.aio.ServicerContext
    ) -> wire.ModelInferResponse:
        """Asks a model; a cancelled call stops the work."""
        principal = await self._authenticated(rpc)
        async with self._sender(principal, rpc, context.current().request_id) as sender:
            answer = await self._inference.infer(sender, _request_of(request))
        is_raw = bool(request.raw_input_contents)
        return await asyncio.to_thread(_response, answer, is_raw) if answer.is_large else _response(answer, is_raw)

    async def ModelStreamInfer(
        self, requests: AsyncIterator[wire.ModelInferRequest], rpc: grpc.aio.ServicerContext
    ) -> AsyncIterator[wire.ModelStreamInferResponse]:
        """Asks models one after the other; what goes wrong with one is told in its response, and the next is asked."""
        principal = await self._authenticated(rpc)
        num_requests = 0
        async for request in requests:
            num_requests += 1
            if num_requests > _MAX_REQUESTS:
                raise PlatformError(Code.INVALID_ARGUMENT, f"a stream has at most {_MAX_REQUESTS} requests")
            try:
                async with (
                    self._sender(principal, rpc, context.new_request_id()) as sender,
                    aclosing(self._answers(sender, request)) as answers,
                ):
                    async for answer in answers:
                        yield wire.ModelStreamInferResponse(infer_response=answer)
            except PlatformError as error:
                refused = wire.ModelInferResponse(model_name=request.model_name, id=request.id)
                yield wire.ModelStreamInferResponse(error_message=error.message, infer_response=refused)

    async def _answers(
        self, sender: Sender, request: wire.ModelInferRequest
    ) -> AsyncGenerator[wire.ModelInferResponse]:
        wanted = _request_of(request)
        is_raw = bool(request.raw_input_contents)
        if _is_streamed(wanted):
            async with aclosing(self._inference.stream(sender, wanted)) as answers:
                async for answer in answers:
                    yield _response(answer, is_raw)
        else:
            yield _response(await self._inference.infer(sender, wanted), is_raw)
        if wanted.parameters.get(_EMPTY_FINAL) is True:
            last = wire.ModelInferResponse(model_name=request.model_name, model_version=ONLY_VERSION, id=request.id)
            last.parameters[_IS_FINAL].bool_param = True
            yield last

    async def _authenticated(self, rpc: grpc.aio.ServicerContext) -> Principal:
        """Who calls; from here on the call is the tenant's."""
        sent = [
            (name.encode(), value.encode("utf-8"))
            for name, value in rpc.invocation_metadata() or ()
            if isinstance(value, str)
        ]
        principal = await self._keys.authenticate(credential_of(Headers(raw=sent)))
        called = context.current()
        request_id = called.request_id if SANE_REQUEST_ID.fullmatch(called.request_id) else context.new_request_id()
        # Whatever the client said of a tenant is dropped here.
        context.enter(context.RequestContext(request_id, principal.tenant, called.deadline_s))
        return principal

    async def _known(self, rpc: grpc.aio.ServicerContext) -> Principal:
        """Who calls, counted against the request limit."""
        principal = await self._authenticated(rpc)
        require_allowed(await self._limiter.hit(principal))
        require_scope(principal, ROUTE)
        return principal

    @asynccontextmanager
    async def _sender(
        self, principal: Principal, rpc: grpc.aio.ServicerContext, request_id: str
    ) -> AsyncIterator[Sender]:
        """Opens an account for one request and settles it, whatever way it ends."""
        remaining_s = self._timeout_s if (left_s := rpc.time_remaining()) is None else min(left_s, self._timeout_s)
        deadline = Deadline.after(remaining_s)
        context.enter(context.RequestContext(request_id, principal.tenant, deadline.at_s))
        traceparent = telemetry.traceparent()
        account = Account(
            request_id=request_id,
            trace_id=traceparent.split("-")[1] if traceparent else "",
            traceparent=traceparent,
            route=ROUTE,
            principal=principal,
        )
        rpc.set_trailing_metadata([(HEADER_REQUEST_ID, account.request_id), (HEADER_TRACE_ID, account.trace_id)])
        async with self._recorder.settling(account) as outcome:
            require_allowed(await self._limiter.hit(principal))
            require_scope(principal, ROUTE)
            yield Sender(principal, account, deadline)
            outcome.status = 200


def _is_streamed(request: InferRequest) -> bool:
    said = request.parameters.get("stream")
    for tensor in request.inputs:
        if tensor.name == "stream" and len(tensor.values) == 1:
            said = bool(tensor.values[0])
    return said is True


def _request_of(request: wire.ModelInferRequest) -> InferRequest:
    """Reads a request; raises INVALID_ARGUMENT."""
    raw = request.raw_input_contents
    if len(request.inputs) > _MAX_TENSORS or len(request.parameters) > _MAX_TENSORS:
        raise _refused(f"a request has at most {_MAX_TENSORS} inputs and parameters")
    if raw and len(raw) != len(request.inputs):
        raise _refused(f"there are {len(request.inputs)} inputs, and {len(raw)} raw_input_contents")
    inputs = (
        from_raw(one.name, one.datatype, one.shape, raw[place]) if raw else _from_contents(one)
        for place, one in enumerate(request.inputs)
    )
    return InferRequest(
        request.model_name,
        request.model_version,
        request.id,
        {name: _parameter(name, value) for name, value in request.parameters.items()},
        tuple(inputs),
        tuple(one.name for one in request.outputs),
    )


def _from_contents(one: wire.ModelInferRequest.InferInputTensor) -> Tensor:
    check_datatype(one.name, one.datatype)
    tensor = Tensor(one.name, one.datatype, tuple(one.shape), list(getattr(one.contents, _CONTENTS[one.datatype])))
    tensor.check()
    return tensor


def _parameter(name: str, value: wire.InferParameter) -> Parameter:
    kind = value.WhichOneof("parameter_choice")
    if kind is None:
        raise _refused(f"the parameter {name[:100]!r} has no value")
    said: Parameter = getattr(value, kind)
    return said


def _response(answer: InferResponse, is_raw: bool) -> wire.ModelInferResponse:
    """Writes a response, with its elements as the request had them."""
    response = wire.ModelInferResponse(model_name=answer.model, model_version=ONLY_VERSION, id=answer.id)
    for name, value in answer.parameters.items():
        _write_parameter(response.parameters[name], value)
    for one in answer.outputs:
        output = response.outputs.add(name=one.name, datatype=one.datatype, shape=one.shape)
        if is_raw:
            response.raw_output_contents.append(to_raw(one))
        else:
            getattr(output.contents, _CONTENTS[one.datatype]).extend(one.values)
    return response


def _write_parameter(target: wire.InferParameter, value: Parameter) -> None:
    match value:
        case bool():
            target.bool_param = value
        case int():
            target.int64_param = value
        case float():
            target.double_param = value
        case str():
            target.string_param = value


def _refused(message: str) -> PlatformError:
    return PlatformError(Code.INVALID_ARGUMENT, message, reason="invalid_value")


AddToServer = Callable[[Any, Any], None]
ADD_TO_SERVER: AddToServer = grpc_service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server
SERVICE = "inference.GRPCInferenceService"
