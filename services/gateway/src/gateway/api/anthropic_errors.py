"""Anthropic's error envelope, and which requests are told of errors in it."""

from collections.abc import Mapping

from starlette.datastructures import Headers
from starlette.types import Scope

from chassis.errors import Code, PlatformError, http_status

REQUEST_ID = "request-id"  # Anthropic's name for the header
_VERSION = "anthropic-version"  # a header that all of its clients send

_TYPES: Mapping[int, str] = {
    401: "authentication_error",
    402: "billing_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    501: "invalid_request_error",
    504: "timeout_error",
}


def is_spoken(scope: Scope) -> bool:
    """Whether the request is one of Anthropic's API, by its path or by the header of its clients."""
    path = scope["path"]
    return path == "/v1/messages" or path.startswith("/v1/messages/") or _VERSION in Headers(scope=scope)


def envelope(error: PlatformError, request_id: str) -> dict[str, object]:
    """The error object; the field at fault is told in the message, as there is no other place for it."""
    message = error.message
    if error.param and error.param not in message:
        message = f"{error.param}: {message}"
    return {"type": "error", "error": {"type": _type(error.code), "message": message}, "request_id": request_id}


def _type(code: Code) -> str:
    if code is Code.OVERLOADED:
        return "overloaded_error"
    status = http_status(code)
    return _TYPES.get(status, "invalid_request_error" if status < 500 else "api_error")
