"""The platform's one error type and the table that maps its codes to gRPC, HTTP and OpenAI's error types.

A service's core may import it; it imports nothing but the standard library.
"""

import json
from dataclasses import dataclass
from enum import StrEnum


class Code(StrEnum):
    """What kind of thing went wrong, independent of any transport."""

    INVALID_ARGUMENT = "INVALID_ARGUMENT"
    UNAUTHENTICATED = "UNAUTHENTICATED"
    PERMISSION_DENIED = "PERMISSION_DENIED"
    NOT_FOUND = "NOT_FOUND"
    METHOD_NOT_ALLOWED = "METHOD_NOT_ALLOWED"
    CONFLICT = "CONFLICT"
    OUT_OF_RANGE = "OUT_OF_RANGE"
    PAYLOAD_TOO_LARGE = "PAYLOAD_TOO_LARGE"
    UNSUPPORTED_MEDIA_TYPE = "UNSUPPORTED_MEDIA_TYPE"
    UNPROCESSABLE = "UNPROCESSABLE"
    RATE_LIMITED = "RATE_LIMITED"
    OVERLOADED = "OVERLOADED"
    UNAVAILABLE = "UNAVAILABLE"
    DEADLINE_EXCEEDED = "DEADLINE_EXCEEDED"
    CANCELLED = "CANCELLED"
    UNIMPLEMENTED = "UNIMPLEMENTED"
    FAILED_PRECONDITION = "FAILED_PRECONDITION"
    DATA_LOSS = "DATA_LOSS"
    INTERNAL = "INTERNAL"


@dataclass(frozen=True, slots=True)
class _Mapping:
    grpc: str
    http: int
    openai_type: str
    retryable: bool = False


_TABLE: dict[Code, _Mapping] = {
    Code.INVALID_ARGUMENT: _Mapping("INVALID_ARGUMENT", 400, "invalid_request_error"),
    Code.UNAUTHENTICATED: _Mapping("UNAUTHENTICATED", 401, "authentication_error"),
    Code.PERMISSION_DENIED: _Mapping("PERMISSION_DENIED", 403, "permission_error"),
    Code.NOT_FOUND: _Mapping("NOT_FOUND", 404, "invalid_request_error"),
    Code.METHOD_NOT_ALLOWED: _Mapping("INVALID_ARGUMENT", 405, "invalid_request_error"),
    Code.CONFLICT: _Mapping("ALREADY_EXISTS", 409, "invalid_request_error"),
    Code.OUT_OF_RANGE: _Mapping("OUT_OF_RANGE", 400, "invalid_request_error"),
    Code.PAYLOAD_TOO_LARGE: _Mapping("INVALID_ARGUMENT", 413, "invalid_request_error"),
    Code.UNSUPPORTED_MEDIA_TYPE: _Mapping("INVALID_ARGUMENT", 415, "invalid_request_error"),
    Code.UNPROCESSABLE: _Mapping("INVALID_ARGUMENT", 422, "invalid_request_error"),
    Code.RATE_LIMITED: _Mapping("RESOURCE_EXHAUSTED", 429, "rate_limit_error", retryable=True),
    Code.OVERLOADED: _Mapping("RESOURCE_EXHAUSTED", 503, "overloaded_error", retryable=True),
    Code.UNAVAILABLE: _Mapping("UNAVAILABLE", 503, "server_error", retryable=True),
    Code.DEADLINE_EXCEEDED: _Mapping("DEADLINE_EXCEEDED", 504, "server_error"),
    Code.CANCELLED: _Mapping("CANCELLED", 499, "invalid_request_error"),
    Code.UNIMPLEMENTED: _Mapping("UNIMPLEMENTED", 501, "not_implemented_error"),
    Code.FAILED_PRECONDITION: _Mapping("FAILED_PRECONDITION", 409, "invalid_request_error"),
    Code.DATA_LOSS: _Mapping("DATA_LOSS", 500, "server_error"),
    Code.INTERNAL: _Mapping("INTERNAL", 500, "server_error"),
}

_FROM_GRPC: dict[str, Code] = {
    "RESOURCE_EXHAUSTED": Code.OVERLOADED,
    "ALREADY_EXISTS": Code.CONFLICT,
    "ABORTED": Code.CONFLICT,
    "UNKNOWN": Code.INTERNAL,
} | {m.grpc: c for c, m in _TABLE.items() if c.value == m.grpc}


class PlatformError(Exception):
    """An error with a meaning that every transport can carry.

    `reason` is OpenAI's `code` field ("context_length_exceeded"), `param` names the field at fault, `retry_after_s`
    says when a retry may succeed. `retryable` defaults to what the code implies.
    """

    def __init__(
        self,
        code: Code,
        message: str,
        *,
        retryable: bool | None = None,
        param: str | None = None,
        reason: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.retryable = _TABLE[code].retryable if retryable is None else retryable
        self.param = param
        self.reason = reason
        self.retry_after_s = retry_after_s

    def __repr__(self) -> str:
        return f"PlatformError({self.code.value}, {self.message!r})"


def grpc_status(code: Code) -> str:
    """Returns the name of the gRPC status that stands for a code."""
    return _TABLE[code].grpc


def http_status(code: Code) -> int:
    """Returns the HTTP status that stands for a code."""
    return _TABLE[code].http


def openai_type(code: Code) -> str:
    """Returns the `type` of OpenAI's error envelope for a code."""
    return _TABLE[code].openai_type


def code_from_grpc(status_name: str) -> Code:
    """Returns the code for a gRPC status that came without details, for example from a proxy."""
    return _FROM_GRPC.get(status_name, Code.INTERNAL)


def dump(error: PlatformError) -> bytes:
    """Serialises what a gRPC status alone would lose."""
    return json.dumps(
        {
            "code": error.code.value,
            "retryable": error.retryable,
            "param": error.param,
            "reason": error.reason,
            "retry_after_s": error.retry_after_s,
        }
    ).encode()


def load(message: str, details: bytes) -> PlatformError:
    """Restores an error from its message and what `dump` wrote; raises ValueError where that is something else."""
    fields = json.loads(details)
    if not isinstance(fields, dict):
        raise ValueError("error details are not an object")
    return PlatformError(
        Code(fields["code"]),
        message,
        retryable=bool(fields.get("retryable")),
        param=fields.get("param"),
        reason=fields.get("reason"),
        retry_after_s=fields.get("retry_after_s"),
    )
