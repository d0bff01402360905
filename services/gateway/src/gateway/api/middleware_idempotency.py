"""Idempotency-Key on every POST: the first request under a key is carried out, those that repeat it get its answer.

Pure ASGI. A body that is no form is read before the work begins, so that a key that is sent with another request is
refused; a form, which may be large, is hashed while the route reads it. Requests without the header pass untouched.
"""

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from chassis.errors import Code, PlatformError
from gateway.api.fingerprint import BytesFingerprint, Fingerprint, fingerprint_of
from gateway.core import creation
from gateway.core.account import Account, Repeat
from gateway.core.idempotency import (
    MAX_ANSWER_BYTES,
    Answer,
    Claim,
    IdempotencyKeys,
    Kept,
    is_not_kept,
    is_reused,
)

_log = logging.getLogger(__name__)

HEADER = "idempotency-key"
REPLAYED = "idempotent-replayed"


class Idempotency:
    """Stands right around the routes, so that a replay counts as a request like any other."""

    def __init__(self, app: ASGIApp, *, keys: IdempotencyKeys) -> None:
        self._app = app
        self._keys = keys
        self._settling: set[asyncio.Task[None]] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Carries out, replays, or raises what core.idempotency says."""
        headers = Headers(scope=scope)
        keys = headers.getlist(HEADER)
        if not keys or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        key = keys[0] if len(keys) == 1 else ""  # two are none
        fingerprint = fingerprint_of(_about(scope), headers.get("content-type", ""))
        body = None
        if isinstance(fingerprint, BytesFingerprint):
            body = await _whole(receive)
            fingerprint.add(body)
        digest = fingerprint.digest() if body is not None else None
        found = await self._keys.claim(scope["state"]["principal"], key, digest)
        if isinstance(found, Kept):
            await _pass_by(receive, fingerprint, is_read=body is not None)
            await _replay(found, fingerprint, scope, send)
            return
        await self._carry_out(found, fingerprint, scope, _watched(receive, fingerprint, body), send)

    async def _carry_out(
        self, claim: Claim, fingerprint: Fingerprint, scope: Scope, receive: Receive, send: Send
    ) -> None:
        answer = _Listener(send)
        try:
            with creation.use(creation.Creation(claim.id, may_exist=claim.is_second)):
                await self._app(scope, receive, answer.send)
        finally:
            await self._outlive(self._settle(claim, fingerprint, answer, scope["state"].get("error")))

    async def _settle(
        self, claim: Claim, fingerprint: Fingerprint, answer: "_Listener", error: PlatformError | None
    ) -> None:
        try:
            if answer.is_complete and 200 <= answer.status < 300 and error is None:
                await self._keys.store.keep(claim, fingerprint.digest(), answer.kept())
            else:
                is_refused = answer.is_complete and 400 <= answer.status < 500
                await self._keys.store.release(claim, has_done_nothing=is_refused)
        except PlatformError as lost:
            # The key stays claimed until the next start: better than doing the work twice.
            _log.error("an idempotency key could not be settled", extra={"error": repr(lost)})

    async def _outlive(self, work: Coroutine[Any, Any, None]) -> None:
        """Does the work even where the request's task is cancelled meanwhile."""
        task = asyncio.create_task(work)
        self._settling.add(task)
        task.add_done_callback(self._settling.discard)
        await asyncio.shield(task)


class _Listener:
    """Passes an answer on and remembers it, up to the bound."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._pieces: list[bytes] = []
        self._num_bytes = 0
        self._content_type = ""
        self.status = 0
        self.is_complete = False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self._content_type = Headers(raw=message["headers"]).get("content-type", "")
        elif message["type"] == "http.response.body":
            piece = message.get("body", b"")
            self._num_bytes += len(piece)
            if self._num_bytes <= MAX_ANSWER_BYTES:
                self._pieces.append(piece)
        await self._send(message)
        self.is_complete = message["type"] == "http.response.body" and not message.get("more_body", False)

    def kept(self) -> Answer:
        is_small = self._num_bytes <= MAX_ANSWER_BYTES
        return Answer(self.status, self._content_type, b"".join(self._pieces) if is_small else None)


def _about(scope: Scope) -> bytes:
    """What tells requests apart beside their bodies."""
    return b"\0".join((scope["path"].encode("utf-8", "surrogateescape"), scope["query_string"], b""))


async def _whole(receive: Receive) -> bytes:
    pieces = []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise PlatformError(Code.CANCELLED, "the client left while it sent the body")
        pieces.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(pieces)


async def _pass_by(receive: Receive, fingerprint: Fingerprint, *, is_read: bool) -> None:
    """Reads what the client still sends, for its hash alone."""
    while not is_read:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise PlatformError(Code.CANCELLED, "the client left while it sent the form")
        fingerprint.add(message.get("body", b""))
        is_read = not message.get("more_body", False)


def _watched(receive: Receive, fingerprint: Fingerprint, body: bytes | None) -> Receive:
    """Gives the route the body that was read for it, or hashes what it reads."""
    is_given = body is None

    async def watched() -> Message:
        nonlocal is_given
        if not is_given:
            is_given = True
            return {"type": "http.request", "body": body, "more_body": False}
        message = await receive()
        if body is None and message["type"] == "http.request":
            fingerprint.add(message.get("body", b""))
        return message

    return watched


async def _replay(kept: Kept, fingerprint: Fingerprint, scope: Scope, send: Send) -> None:
    if kept.fingerprint != fingerprint.digest():
        raise is_reused()
    answer = kept.answer
    if answer.body is None:
        raise is_not_kept()
    account = scope["state"].get("account")
    if isinstance(account, Account):
        account.repeat, account.finish_reason = Repeat.REPLAYED, "stop"
    headers = [
        (b"content-type", answer.content_type.encode("latin-1")),
        (b"content-length", b"%d" % len(answer.body)),
        (REPLAYED.encode(), b"true"),
    ]
    await send({"type": "http.response.start", "status": answer.status, "headers": headers})
    await send({"type": "http.response.body", "body": answer.body, "more_body": False})
