"""Who may pass and how often: authentication, request limits, scopes and the size of bodies."""

import asyncio
import math
import time

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from chassis import context
from chassis.errors import Code, PlatformError
from gateway.api.scopes import require_scope
from gateway.core.limit_answers import say_request_limit
from gateway.core.ports import Keys, LimitState, RequestLimiter

_MAX_KEY_CHARS = 256
_MAX_TOKEN_CHARS = 8192  # a signed token is longer than any key
_PROTECTED = frozenset({"/v1", "/admin", "/generate", "/rerank"})
_UPLOADS = ("/v1/documents", "/v1/files")


def is_protected(path: str) -> bool:
    """Says whether a path needs a key; what is none of ours is simply not found."""
    return path.startswith(("/v1/", "/admin/", "/v2/models/")) or path in _PROTECTED


class Authentication:
    """Lets only known keys through and leaves the principal in the scope's state."""

    def __init__(self, app: ASGIApp, *, keys: Keys, open_app: ASGIApp) -> None:
        self._app = app
        self._open_app = open_app
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes open paths on to the routes themselves, and the others once their key is known."""
        if not is_protected(scope["path"]):
            await self._open_app(scope, receive, send)
            return
        principal = await self._keys.authenticate(credential_of(Headers(scope=scope)))
        state = scope["state"]
        state["principal"] = principal
        # The request's task ends with the request, and the outermost layer resets what was before.
        context.enter(context.RequestContext(state["request_id"], principal.tenant, state["deadline_s"]))
        await self._app(scope, receive, send)


def credential_of(headers: Headers) -> str:
    """The one credential of a request: a bearer's, or a key in Anthropic's header; raises UNAUTHENTICATED."""
    bearers, plain = headers.getlist("authorization"), headers.getlist("x-api-key")
    if not bearers and not plain:
        raise PlatformError(
            Code.UNAUTHENTICATED,
            "no API key: send the header 'Authorization: Bearer sk-...' or 'x-api-key: sk-...'",
            reason="invalid_api_key",
        )
    # Never two, even if they are the same: a proxy and we might each believe another one.
    if len(bearers) + len(plain) > 1:
        raise PlatformError(Code.UNAUTHENTICATED, "send one credential, in one header", reason="invalid_api_key")
    if plain:
        return _sane(plain[0], _MAX_KEY_CHARS)
    scheme, _, credential = bearers[0].partition(" ")
    if scheme.lower() != "bearer":
        raise _malformed()
    return _sane(credential, _MAX_TOKEN_CHARS)


def _sane(credential: str, max_chars: int) -> str:
    credential = credential.strip(" ")
    if not credential or not credential.isascii() or len(credential) > max_chars:
        raise _malformed()
    return credential


def _malformed() -> PlatformError:
    return PlatformError(
        Code.UNAUTHENTICATED, "the Authorization header must be one 'Bearer <key>'", reason="invalid_api_key"
    )


class RateLimit:
    """Counts every request of a key that has a limit, and says so in its answer's headers."""

    def __init__(self, app: ASGIApp, *, limiter: RequestLimiter) -> None:
        self._app = app
        self._limiter = limiter

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes on, or raises RATE_LIMITED."""
        state = await self._limiter.hit(scope["state"]["principal"])
        say_request_limit(scope["state"]["answer_headers"], state)
        require_allowed(state)
        await self._app(scope, receive, send)


def require_allowed(state: LimitState) -> None:
    """Raises RATE_LIMITED for a request that is one too many."""
    if not state.allowed:
        raise PlatformError(
            Code.RATE_LIMITED,
            f"this key may send {state.limit} requests per minute; try again in {math.ceil(state.reset_s)} s",
            reason="rate_limit_exceeded",
            retry_after_s=state.reset_s,
        )


class Permission:
    """Holds keys that have scopes to their routes."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes on, or raises PERMISSION_DENIED."""
        require_scope(scope["state"]["principal"], scope["path"])
        await self._app(scope, receive, send)


class BodyCap:
    """Refuses bodies that are too large, by what they say and by what really arrives, and those that never end."""

    def __init__(self, app: ASGIApp, *, max_body_bytes: int, max_upload_bytes: int) -> None:
        self._app = app
        self._max_body_bytes = max_body_bytes
        self._max_upload_bytes = max_upload_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes on with a receive that counts."""
        headers = Headers(scope=scope)
        cap = self._cap(scope["path"], headers.get("content-type", ""))
        said = headers.get("content-length", "")
        if said.isdecimal() and int(said) > cap:
            raise _too_large(cap)
        await self._app(scope, _counted(receive, cap, scope["state"]["deadline_s"]), send)

    def _cap(self, path: str, content_type: str) -> int:
        is_upload = path in _UPLOADS and content_type.lower().startswith("multipart/")
        return self._max_upload_bytes if is_upload else self._max_body_bytes


def _counted(receive: Receive, cap: int, deadline_s: float) -> Receive:
    num_bytes, is_complete = 0, False

    async def counted() -> Message:
        nonlocal num_bytes, is_complete
        if is_complete:  # what is awaited now is the client's leaving
            return await receive()
        try:
            async with asyncio.timeout(deadline_s - time.monotonic()):
                message = await receive()
        except TimeoutError:
            raise PlatformError(Code.DEADLINE_EXCEEDED, "the body did not arrive in time") from None
        is_complete = not message.get("more_body", False)
        num_bytes += len(message.get("body", b""))
        if num_bytes > cap:
            raise _too_large(cap)
        return message

    return counted


def _too_large(cap: int) -> PlatformError:
    return PlatformError(
        Code.PAYLOAD_TOO_LARGE, f"the body is larger than the {cap} bytes that are read", reason="payload_too_large"
    )
