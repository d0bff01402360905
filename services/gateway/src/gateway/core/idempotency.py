"""Idempotency-Key: a request that is sent again under its key gets the answer of the first time, and does nothing.

Stripe's semantics. A key belongs to an access key, is claimed before the work begins and is kept for a day. Only good
answers are kept: what failed has created nothing, or is found again by its ids (see core.creation), so that a later try
may do it. Knows neither HTTP nor SQLite.
"""

import hmac
from dataclasses import dataclass, field
from typing import Protocol

from chassis.errors import Code, PlatformError
from gateway.core.ports import Principal

KEPT_S = 24 * 3600.0
MAX_KEYS = 10_000  # of one tenant at a time
MAX_ANSWER_BYTES = 128 * 1024
_RETRY_AFTER_S = 1.0


@dataclass(frozen=True, slots=True)
class Slot:
    """Where a key's answer is kept, and what unlocks it: without the client's key nobody can read it again."""

    id: bytes
    tenant: str
    secret: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Answer:
    """What was answered. body None: it was too large to keep."""

    status: int
    content_type: str
    body: bytes | None


@dataclass(frozen=True, slots=True)
class Claim:
    """The right to do the work. is_second: a try before this one was cut short, and may have done some of it."""

    slot: Slot
    id: str
    is_second: bool


@dataclass(frozen=True, slots=True)
class Kept:
    """The work was done, and this was answered to the request with that fingerprint."""

    fingerprint: bytes
    answer: Answer


class IdempotencyStore(Protocol):
    """Where claims and answers are kept. A write is durable when it returns."""

    async def claim(self, slot: Slot, fingerprint: bytes | None) -> Claim | Kept:
        """Claims the slot, atomically, or returns what is kept there.

        Raises CONFLICT where the work is being done, UNPROCESSABLE where it is another request's (as far as the
        fingerprints are known), RATE_LIMITED where the tenant has MAX_KEYS.
        """
        ...

    async def keep(self, claim: Claim, fingerprint: bytes, answer: Answer) -> None:
        """The work is done."""
        ...

    async def release(self, claim: Claim, *, has_done_nothing: bool) -> None:
        """The work was not done: another try may do it, any request's where this one has done nothing."""
        ...


@dataclass(frozen=True, slots=True)
class IdempotencyKeys:
    """The keys that clients send, and where they are kept."""

    store: IdempotencyStore
    pepper: bytes = field(repr=False)

    async def claim(self, principal: Principal, key: str, fingerprint: bytes | None) -> Claim | Kept:
        """Claims what the sender's key stands for; INVALID_ARGUMENT for what is no key, else raises as the store."""
        return await self.store.claim(_slot(self.pepper, principal, key), fingerprint)


def _slot(pepper: bytes, principal: Principal, key: str) -> Slot:
    if not 1 <= len(key) <= 255 or not key.isascii() or not key.isprintable():
        raise PlatformError(
            Code.INVALID_ARGUMENT,
            "Idempotency-Key must be 1 to 255 printable ASCII characters",
            param="idempotency-key",
            reason="invalid_idempotency_key",
        )
    owned = "\0".join((principal.tenant, principal.key_id, key)).encode()
    return Slot(
        hmac.digest(pepper, b"idempotency slot\0" + owned, "sha256"),
        principal.tenant,
        hmac.digest(pepper, b"idempotency answer\0" + owned, "sha256"),
    )


def is_in_progress() -> PlatformError:
    """The error while the first request is being worked on."""
    return PlatformError(
        Code.CONFLICT,
        "a request with this Idempotency-Key is in progress; send it again in a moment to get its answer",
        param="idempotency-key",
        reason="idempotency_in_progress",
        retry_after_s=_RETRY_AFTER_S,
    )


def is_reused() -> PlatformError:
    """The error for another request under the key of a former one."""
    return PlatformError(
        Code.UNPROCESSABLE,
        "this Idempotency-Key was sent with another request before: use a new key for a new request",
        param="idempotency-key",
        reason="idempotency_key_reused",
    )


def is_not_kept() -> PlatformError:
    """The error for an answer that is gone: the work must not be done twice, and cannot be shown."""
    return PlatformError(
        Code.CONFLICT,
        f"the request with this Idempotency-Key was carried out; its answer, of more than {MAX_ANSWER_BYTES} bytes, "
        "was not kept",
        param="idempotency-key",
        reason="idempotency_answer_not_kept",
    )


def too_many_keys() -> PlatformError:
    """The error for a tenant with too many keys."""
    return PlatformError(
        Code.RATE_LIMITED,
        f"{MAX_KEYS} Idempotency-Keys of yours are kept, each for a day; send this request without one, or later",
        param="idempotency-key",
        reason="too_many_idempotency_keys",
        retry_after_s=60.0,
    )
