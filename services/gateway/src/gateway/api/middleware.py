"""The outermost layer of every request: its ids, its span, its log line, its metrics and its last line of defence.

Pure ASGI like all middleware here: with Starlette's BaseHTTPMiddleware a stalled client that leaves would keep the
stream's generator running for ever.
"""

import logging
import re
import time
import uuid
from typing import Any

from opentelemetry import trace
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from chassis import context, metrics, telemetry
from chassis.errors import PlatformError
from contracts.names import HEADER_REQUEST_ID, HEADER_TRACE_ID
from gateway.api import anthropic_errors, errors

log = logging.getLogger(__name__)

SANE_REQUEST_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,127}")
CLIENT_LEFT = 499  # nginx's status for a client that closed the connection before the answer


class RequestFrame:
    """Gives every request its ids and its span, and makes every failure an answer in the envelope."""

    def __init__(self, app: ASGIApp, *, timeout_s: float) -> None:
        self._app = app
        self._timeout_s = timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one connection event of the server."""
        if scope["type"] != "http":
            raise RuntimeError(f"the gateway serves http only, not {scope['type']}")
        state: dict[str, Any] = scope.setdefault("state", {})
        headers = Headers(scope=scope)
        offered = headers.get(HEADER_REQUEST_ID, "")
        request_id = offered if SANE_REQUEST_ID.fullmatch(offered) else context.new_request_id()
        deadline_s = time.monotonic() + self._timeout_s
        answer_headers = {anthropic_errors.REQUEST_ID: request_id} if anthropic_errors.is_spoken(scope) else {}
        state |= {"request_id": request_id, "deadline_s": deadline_s, "answer_headers": answer_headers}
        parent = telemetry.parent_from({"traceparent": headers.get("traceparent", "")})
        with (
            context.use(context.RequestContext(request_id, "", deadline_s)),
            telemetry.tracer().start_as_current_span(
                f"gateway {scope['method'][:16]}", context=parent, kind=trace.SpanKind.SERVER
            ) as span,
        ):
            # Without a tracer provider (in a unit test) spans have no id, but the header is promised all the same.
            state["trace_id"] = telemetry.trace_id(span) or uuid.uuid4().hex
            await _Exchange(self._app, scope, receive, send, span).run()


class _Exchange:
    """One request and its answer."""

    def __init__(self, app: ASGIApp, scope: Scope, receive: Receive, send: Send, span: trace.Span) -> None:
        self._app = app
        self._scope = scope
        self._receive = receive
        self._send_raw = send
        self._span = span
        self._status = 0
        self._started_s = time.perf_counter()

    async def run(self) -> None:
        try:
            await self._app(self._scope, self._receive, self._send)
        except PlatformError as error:
            await self._refuse(error)
        except Exception:
            log.exception("request failed unexpectedly", extra={"path": self._scope["path"][:200]})
            await self._refuse(errors.internal_error())
        finally:
            self._finish()

    async def _refuse(self, error: PlatformError) -> None:
        if not self._status:
            await errors.error_response(error, self._scope)(self._scope, self._receive, self._send)

    async def _send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._status = message["status"]
            state = self._scope["state"]
            ours = {
                HEADER_REQUEST_ID: state["request_id"],
                HEADER_TRACE_ID: state["trace_id"],
                **state["answer_headers"],
            }
            added = [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in ours.items()]
            names = {name for name, _ in added}
            message["headers"] = [*(one for one in message["headers"] if one[0] not in names), *added]
        await self._send_raw(message)

    def _finish(self) -> None:
        duration_s = time.perf_counter() - self._started_s
        status = self._status or CLIENT_LEFT
        route = getattr(self._scope.get("route"), "path", "unmatched")
        metrics.REQUESTS.labels("gateway", route, str(status)).inc()
        metrics.REQUEST_SECONDS.labels("gateway", route).observe(duration_s)
        self._span.update_name(f"gateway {self._scope['method'][:16]} {route}")
        self._span.set_attributes(
            {"request_id": self._scope["state"]["request_id"], "http.route": route, "http.status": status}
        )
        if status >= 500:
            self._span.set_status(trace.StatusCode.ERROR)
        log.info(
            "request finished",
            extra={
                "method": self._scope["method"][:16],
                "route": route,
                "status": status,
                "duration_s": round(duration_s, 6),
                "key_id": getattr(self._scope["state"].get("principal"), "key_id", None),
            },
        )
