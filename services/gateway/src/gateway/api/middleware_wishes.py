"""What a request may ask for itself in headers: less time, a lower class than its key's, something of the cache."""

import re
import time
from dataclasses import replace

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from chassis import context
from chassis.errors import Code, PlatformError
from gateway.api.cache_headers import wish_of
from gateway.core.account import Account
from gateway.core.ports import Principal

HEADER_TIMEOUT = "x-request-timeout-s"
HEADER_PRIORITY = "x-pressroom-priority"
_SECONDS = re.compile(r"[0-9]{1,9}(\.[0-9]{1,9})?")
_PRIORITY = re.compile(r"-?[0-9]{1,3}")
_MOST_PRIORITY = 100


class Wishes:
    """Shortens the deadline, lowers the class and leaves word of the cache, as the headers say."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes on; raises INVALID_ARGUMENT, and PERMISSION_DENIED for a class above the key's."""
        headers, state = Headers(scope=scope), scope["state"]
        timeout_s, priority = _timeout_s(headers), _priority(headers)
        if timeout_s is not None:
            state["deadline_s"] = min(state["deadline_s"], time.monotonic() + timeout_s)
            context.enter(replace(context.current(), deadline_s=state["deadline_s"]))
        if priority is not None:
            state["principal"] = _lowered(state["principal"], priority)
        account = state.get("account")
        if isinstance(account, Account):
            account.cache_wish = wish_of(headers, state["principal"])
        await self._app(scope, receive, send)


def _timeout_s(headers: Headers) -> float | None:
    sent = _one(headers, HEADER_TIMEOUT)
    if sent is None:
        return None
    if not _SECONDS.fullmatch(sent) or float(sent) == 0:
        raise _refused(HEADER_TIMEOUT, "must be a number of seconds above 0")
    return float(sent)


def _priority(headers: Headers) -> int | None:
    sent = _one(headers, HEADER_PRIORITY)
    if sent is None:
        return None
    if not _PRIORITY.fullmatch(sent) or abs(int(sent)) > _MOST_PRIORITY:
        raise _refused(HEADER_PRIORITY, f"must be a whole number from -{_MOST_PRIORITY} to {_MOST_PRIORITY}")
    return int(sent)


def _one(headers: Headers, name: str) -> str | None:
    sent = headers.getlist(name)
    if len(sent) > 1:
        raise _refused(name, "must be sent once")
    return sent[0].strip() if sent else None


def _refused(name: str, what: str) -> PlatformError:
    return PlatformError(Code.INVALID_ARGUMENT, f"the header {name} {what}", param=name, reason="invalid_value")


def _lowered(principal: Principal, priority: int) -> Principal:
    most = min(principal.policy.priority, principal.tenant_policy.priority)
    if priority > most:
        raise PlatformError(
            Code.PERMISSION_DENIED,
            f"this key's requests may have priorities up to {most}",
            param=HEADER_PRIORITY,
            reason="priority_not_allowed",
        )
    return replace(principal, policy=replace(principal.policy, priority=priority))
