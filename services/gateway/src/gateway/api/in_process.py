"""Sends requests to the gateway's own routes without a socket: what asks in somebody's name is treated as they are.

The layers behind authentication see such a request as any other: account, limits, size, routes. So its answer is, byte
for byte, what HTTP would have given. Implements core.batch_run.Endpoints.
"""

import asyncio
import logging
import time
import uuid
from typing import Any

import orjson
from opentelemetry import trace
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Scope

from chassis import context, telemetry
from chassis.errors import PlatformError
from gateway.api import errors
from gateway.core.batch_run import Answer
from gateway.core.ports import Principal

log = logging.getLogger(__name__)


class InProcess:
    """Asks the application that serve() was given; requests are accounted to one route, that of what asks."""

    def __init__(self, accounted_as: str) -> None:
        self._accounted_as = accounted_as
        self._app: ASGIApp | None = None
        self._timeout_s = 0.0

    def serve(self, app: ASGIApp, timeout_s: float) -> None:
        """Takes the layers behind authentication, and the time that a request may take; once, at the start."""
        self._app, self._timeout_s = app, timeout_s

    async def post(self, principal: Principal, endpoint: str, body: bytes) -> Answer:
        """Asks as the principal would over HTTP; what goes wrong is an answer too."""
        assert self._app is not None, "there is no application yet"
        request_id, deadline_s = context.new_request_id(), time.monotonic() + self._timeout_s
        exchange = _Exchange(body)
        with (
            context.use(context.RequestContext(request_id, principal.tenant, deadline_s)),
            telemetry.tracer().start_as_current_span(f"gateway line {endpoint}") as span,
        ):
            span.set_attribute("request_id", request_id)
            state = {
                "request_id": request_id,
                "trace_id": telemetry.trace_id(span) or uuid.uuid4().hex,
                "deadline_s": deadline_s,
                "answer_headers": {},
                "principal": principal,
                "accounted_as": self._accounted_as,
            }
            await exchange.run(self._app, _scope(endpoint, len(body), state))
            if exchange.status >= 500:
                span.set_status(trace.StatusCode.ERROR)
        return exchange.answer(request_id)


class _Exchange:
    """One request and its answer."""

    def __init__(self, body: bytes) -> None:
        self.status = 0
        self._headers = Headers()
        self._body: bytes | None = body
        self._answer = bytearray()

    async def run(self, app: ASGIApp, scope: Scope) -> None:
        try:
            await app(scope, self._receive, self._send)
        except PlatformError as error:
            await self._refuse(error, scope)
        except Exception:
            log.exception("request failed unexpectedly", extra={"path": scope["path"]})
            await self._refuse(errors.internal_error(), scope)

    async def _refuse(self, error: PlatformError, scope: Scope) -> None:
        if not self.status:
            await errors.error_response(error, scope)(scope, self._receive, self._send)

    async def _receive(self) -> Message:
        if self._body is None:  # nobody leaves: who asks cancels the task
            await asyncio.Event().wait()
        body, self._body = self._body, None
        return {"type": "http.request", "body": body, "more_body": False}

    async def _send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self._headers = Headers(raw=message["headers"])
        else:
            self._answer += message.get("body", b"")

    def answer(self, request_id: str) -> Answer:
        retry_after = self._headers.get("retry-after", "")
        return Answer(
            self.status,
            request_id,
            bytes(self._answer),
            error_code=_error_code(self._answer) if self.status >= 400 else "",
            retry_after_s=float(retry_after) if retry_after.isdecimal() else 0.0,
        )


def _error_code(body: bytes | bytearray) -> str:
    return str(orjson.loads(body)["error"].get("code", ""))  # Anthropic's envelope has none


def _scope(path: str, num_bytes: int, state: dict[str, Any]) -> Scope:
    return {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [(b"content-type", b"application/json"), (b"content-length", str(num_bytes).encode())],
        "client": None,
        "server": None,
        "state": state,
    }
