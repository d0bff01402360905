"""gRPC: channels, calls that carry the request's context, and the server interceptor that receives it.

A client call is one `async with call(...)` block; a servicer raises PlatformError and knows nothing of statuses.
"""

import asyncio
import ipaddress
import logging
import string
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

import grpc
from opentelemetry import context as otel_context
from opentelemetry import trace

from chassis import context, errors, metrics, telemetry
from chassis.errors import Code, PlatformError

log = logging.getLogger(__name__)

REQUEST_ID = "x-request-id"
TENANT = "x-tenant"
TRACEPARENT = "traceparent"
ERROR_DETAILS = "pressroom-error-bin"
MAX_MESSAGE_BYTES = 64 * 1024 * 1024
_MAX_DETAILS_BYTES = 4096  # gRPC may refuse headers of more than 8 KiB together
_QUIET_METHODS = ("/grpc.health.", "/grpc.reflection.")

_CHANNEL_OPTIONS: list[tuple[str, int]] = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),  # a service that was restarted is found again within a second
    ("grpc.enable_retries", 0),  # retries are a decision of the caller, with a budget; never hidden here
]
# A name may stand for several replicas, as a headless Service of Kubernetes does: calls go round them, and whoever lost
# one asks the name again within a second, where gRPC's default waits 30. An address stands for one server alone.
_NAME_OPTIONS: list[tuple[str, int | str]] = [
    ("grpc.lb_policy_name", "round_robin"),
    ("grpc.dns_min_time_between_resolutions_ms", 1_000),
]
_SERVER_OPTIONS: list[tuple[str, int]] = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.so_reuseport", 0),  # two processes on one port would share its calls without a word
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
]


def connect(address: str) -> grpc.aio.Channel:
    """Opens a channel to "host:port". Does not block; connects on first use. The caller closes it.

    Where host is a name with several addresses, calls are spread over all of them.
    """
    return grpc.aio.insecure_channel(address, options=[*_CHANNEL_OPTIONS, *([] if _is_ip(address) else _NAME_OPTIONS)])


def _is_ip(address: str) -> bool:
    host = address.rpartition(":")[0].strip("[]")
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


@dataclass(slots=True)
class Call:
    """What one outgoing call needs. `span` is the client span, for attributes."""

    timeout_s: float
    metadata: list[tuple[str, str]]
    span: trace.Span = field(default=trace.INVALID_SPAN)


@asynccontextmanager
async def call(name: str, *, timeout_s: float) -> AsyncIterator[Call]:
    """Opens a client span, fills the metadata and translates errors. `timeout_s` shrinks to what the request has left.

    Raises PlatformError: as the server sent it, or UNAVAILABLE, DEADLINE_EXCEEDED and so on from the status. The span
    is not made current, since an async generator may be closed from another context.
    """
    request = context.current()
    remaining_s = request.remaining_s(timeout_s)
    if remaining_s <= 0:
        raise PlatformError(Code.DEADLINE_EXCEEDED, f"no time was left to call {name}")
    span = telemetry.tracer().start_span(name, kind=trace.SpanKind.CLIENT)
    metadata = [(REQUEST_ID, request.request_id), (TENANT, request.tenant), (TRACEPARENT, telemetry.traceparent(span))]
    try:
        yield Call(remaining_s, [(k, v) for k, v in metadata if v], span)
    except grpc.aio.AioRpcError as error:
        translated = from_rpc_error(error, name)
        span.set_status(trace.StatusCode.ERROR, translated.code.value)
        raise translated from error
    except PlatformError as error:
        span.set_status(trace.StatusCode.ERROR, error.code.value)
        raise
    except (asyncio.CancelledError, GeneratorExit):
        span.set_attribute("cancelled", True)
        raise
    finally:
        span.end()


def from_rpc_error(error: grpc.aio.AioRpcError, name: str) -> PlatformError:
    """Turns a failed call into the error that the server raised, or into what its status says."""
    message = error.details() or ""
    for key, value in error.trailing_metadata() or ():
        if key == ERROR_DETAILS and isinstance(value, bytes):
            try:
                return errors.load(message, value)
            except (ValueError, KeyError, TypeError):
                log.warning("error details could not be read", extra={"call": name})
    code = errors.code_from_grpc(error.code().name)
    service = name.split(".", 1)[0]
    if code is Code.UNAVAILABLE:
        return PlatformError(code, f"{service} is not available", retry_after_s=1.0)
    if code is Code.DEADLINE_EXCEEDED:
        return PlatformError(code, f"{service} did not answer in time")
    return PlatformError(code, message or f"{service} failed")


def make_server(service: str, max_connection_age_s: float | None = None) -> grpc.aio.Server:
    """Makes a server whose handlers run inside `ServerInterceptor`; the caller adds servicers and a port.

    max_connection_age_s: age at which a client is asked to connect anew; the calls that run on the old one go on.
    """
    age = [] if max_connection_age_s is None else [("grpc.max_connection_age_ms", int(max_connection_age_s * 1000))]
    return grpc.aio.server(interceptors=[ServerInterceptor(service)], options=[*_SERVER_OPTIONS, *age])


class ServerInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Gives every handler its context and span; writes the log line and the metrics; maps errors to statuses."""

    def __init__(self, service: str) -> None:
        self._service = service

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler]],
        details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler:
        handler = await continuation(details)
        method = details.method
        is_stream_to_one = handler is not None and handler.request_streaming and not handler.response_streaming
        if handler is None or method.startswith(_QUIET_METHODS) or is_stream_to_one:
            return handler
        if handler.response_streaming:
            behavior = handler.stream_stream if handler.request_streaming else handler.unary_stream
            make = (
                grpc.stream_stream_rpc_method_handler
                if handler.request_streaming
                else grpc.unary_stream_rpc_method_handler
            )

            async def stream(request: Any, rpc_context: grpc.aio.ServicerContext) -> AsyncIterator[Any]:
                async with self._served(method, rpc_context):
                    async for response in behavior(request, rpc_context):
                        yield response

            return make(stream, handler.request_deserializer, handler.response_serializer)

        async def unary(request: Any, rpc_context: grpc.aio.ServicerContext) -> Any:
            async with self._served(method, rpc_context):
                return await handler.unary_unary(request, rpc_context)

        return grpc.unary_unary_rpc_method_handler(unary, handler.request_deserializer, handler.response_serializer)

    @asynccontextmanager
    async def _served(self, method: str, rpc_context: grpc.aio.ServicerContext) -> AsyncIterator[None]:
        metadata = {k: v for k, v in rpc_context.invocation_metadata() or () if isinstance(v, str)}
        # gRPC runs every call in a task of its own, so what is set here ends with the call.
        context.enter(_request_context(metadata, rpc_context.time_remaining()))
        short = method.rsplit("/", 1)[-1]
        span = telemetry.tracer().start_span(
            f"{self._service}.{short}", context=telemetry.parent_from(metadata), kind=trace.SpanKind.SERVER
        )
        span.set_attribute("request_id", context.current().request_id)
        otel_context.attach(trace.set_span_in_context(span))
        started, code = time.perf_counter(), "OK"
        try:
            yield
        except PlatformError as error:
            code = error.code.value
            await _abort(rpc_context, error)
        except (asyncio.CancelledError, GeneratorExit):
            code = Code.CANCELLED.value
            raise
        except grpc.aio.AbortError:
            code = "ABORTED"
            raise
        except Exception:
            code = Code.INTERNAL.value
            log.exception("rpc failed unexpectedly", extra={"method": short})
            await _abort(rpc_context, PlatformError(Code.INTERNAL, f"{self._service} failed; its log has the cause"))
        finally:
            self._finish(short, code, time.perf_counter() - started, span)

    def _finish(self, method: str, code: str, duration_s: float, span: trace.Span) -> None:
        metrics.REQUESTS.labels(self._service, method, code).inc()
        metrics.REQUEST_SECONDS.labels(self._service, method).observe(duration_s)
        log.info("rpc finished", extra={"method": method, "code": code, "duration_s": round(duration_s, 6)})
        span.set_attribute("code", code)
        if code not in ("OK", Code.CANCELLED.value):
            span.set_status(trace.StatusCode.ERROR, code)
        span.end()


def _request_context(metadata: dict[str, str], time_remaining_s: float | None) -> context.RequestContext:
    deadline_s = None if time_remaining_s is None else time.monotonic() + time_remaining_s
    return context.RequestContext(metadata.get(REQUEST_ID, ""), metadata.get(TENANT, ""), deadline_s)


def _sendable(message: str) -> str:
    """Cuts what gRPC cannot carry: details travel percent-encoded in a header, and an over-long one fails the call."""
    message = message.encode(errors="replace").decode()
    while len(quote(message, safe=string.printable)) > _MAX_DETAILS_BYTES:
        message = f"{message[: len(message) // 2]}..."
    return message


async def _abort(rpc_context: grpc.aio.ServicerContext, error: PlatformError) -> None:
    status = grpc.StatusCode[errors.grpc_status(error.code)]
    trailing: Sequence[tuple[str, bytes]] = ((ERROR_DETAILS, errors.dump(error)),)
    await rpc_context.abort(status, _sendable(error.message), trailing_metadata=trailing)
