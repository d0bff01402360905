"""The error envelopes: the one place where an exception becomes an HTTP answer.

OpenAI's envelope is the platform's; a client of another API gets that API's own.

Routes raise PlatformError and never build an error by hand.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from http import HTTPStatus

import orjson
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Scope

from chassis.errors import Code, PlatformError, http_status, openai_type
from gateway.api import anthropic_errors, open_inference_errors

log = logging.getLogger(__name__)

INTERNAL_MESSAGE = "the server had an error; quote the x-request-id header when you report it"

_REASONS: Mapping[Code, str] = {
    Code.UNAUTHENTICATED: "invalid_api_key",
    Code.RATE_LIMITED: "rate_limit_exceeded",
    Code.PAYLOAD_TOO_LARGE: "payload_too_large",
    Code.INVALID_ARGUMENT: "invalid_value",
}
_HTTP_CODES: Mapping[int, Code] = {
    404: Code.NOT_FOUND,
    405: Code.METHOD_NOT_ALLOWED,
    413: Code.PAYLOAD_TOO_LARGE,
    415: Code.UNSUPPORTED_MEDIA_TYPE,
}


def error_code(error: PlatformError) -> str:
    """The `code` field of the envelope: the error's own reason, or its class in lower case."""
    return error.reason or _REASONS.get(error.code, error.code.value.lower())


def envelope(error: PlatformError) -> dict[str, object]:
    """OpenAI's error object."""
    return {
        "error": {
            "message": error.message,
            "type": openai_type(error.code),
            "param": error.param,
            "code": error_code(error),
        }
    }


def error_headers(error: PlatformError) -> dict[str, str]:
    """The headers that belong to an error."""
    headers: dict[str, str] = {}
    status = http_status(error.code)
    if error.retry_after_s is not None or status in (429, 503):
        headers["retry-after"] = str(max(1, math.ceil(error.retry_after_s or 1.0)))
    if status == HTTPStatus.UNAUTHORIZED:
        headers["www-authenticate"] = "Bearer"
    if status == HTTPStatus.REQUEST_ENTITY_TOO_LARGE:
        # The rest of the body was not read: the connection cannot be used again.
        headers["connection"] = "close"
    return headers


def error_response(error: PlatformError, scope: Scope) -> Response:
    """The whole answer for an error of the request with that scope."""
    if anthropic_errors.is_spoken(scope):
        content = anthropic_errors.envelope(error, scope["state"]["request_id"])
    elif open_inference_errors.is_spoken(scope["path"]):
        content = open_inference_errors.envelope(error)
    else:
        content = envelope(error)
    return Response(
        orjson.dumps(content),
        status_code=http_status(error.code),
        headers=error_headers(error),
        media_type="application/json",
    )


def internal_error() -> PlatformError:
    """What the client learns of an unexpected exception: nothing of its inside."""
    return PlatformError(Code.INTERNAL, INTERNAL_MESSAGE, reason="internal_error")


def from_http_exception(error: HTTPException, method: str, path: str) -> PlatformError:
    """Translates what the router raises for an unknown path or method."""
    code = _HTTP_CODES.get(error.status_code)
    if code is Code.NOT_FOUND:
        return PlatformError(code, f"unknown request URL: {method} {path}", reason="unknown_url")
    if code is Code.METHOD_NOT_ALLOWED:
        return PlatformError(code, f"{method} is not allowed on {path}", reason="method_not_allowed")
    if code is not None:
        return PlatformError(code, str(error.detail))
    if 400 <= error.status_code < 500:
        return PlatformError(Code.INVALID_ARGUMENT, str(error.detail))
    return internal_error()


def install(app: FastAPI, routes: Sequence[APIRoute] = ()) -> None:
    """Makes every error of the routes leave in the envelope; 405 tells the methods that `routes` have for a path."""

    async def platform_error(request: Request, exc: Exception) -> Response:
        assert isinstance(exc, PlatformError)
        request.scope["state"]["error"] = exc  # for the account of the request
        return error_response(exc, request.scope)

    async def bad_parameter(request: Request, exc: Exception) -> Response:
        assert isinstance(exc, RequestValidationError)
        first = exc.errors()[0]
        param = str(first["loc"][-1])
        error = PlatformError(Code.INVALID_ARGUMENT, f"{param}: {first['msg']}", param=param, reason="invalid_value")
        return error_response(error, request.scope)

    async def http_exception(request: Request, exc: Exception) -> Response:
        assert isinstance(exc, HTTPException)
        response = error_response(from_http_exception(exc, request.method, request.url.path), request.scope)
        if allowed := exc.status_code == HTTPStatus.METHOD_NOT_ALLOWED and _allowed(routes, request.url.path):
            response.headers["allow"] = ", ".join(sorted(allowed))
        return response

    async def unexpected(request: Request, _: Exception) -> Response:
        # Starlette raises the exception again after this answer, and the outermost middleware logs it.
        return error_response(internal_error(), request.scope)

    app.add_exception_handler(PlatformError, platform_error)
    app.add_exception_handler(HTTPException, http_exception)
    app.add_exception_handler(RequestValidationError, bad_parameter)
    app.add_exception_handler(Exception, unexpected)


def _allowed(routes: Sequence[APIRoute], path: str) -> set[str]:
    """Every method of a path: the router itself tells those of the first route that it finds."""
    return {method for route in routes if route.path_regex.match(path) for method in route.methods or ()}


def log_unexpected(error: Exception) -> None:
    """Writes down what the client is not told."""
    log.error("request failed unexpectedly", exc_info=error)
