"""Keys and tenants as administrators make, change and end them: every change with its row in the audit log.

Knows nothing of where they are stored or how a change reaches the other workers.
"""

import json
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from chassis.errors import Code, PlatformError
from gateway.core import creation
from gateway.core.audit import CONFIGURATION, Change
from gateway.core.keys import KeyRing, KeyRow, KeyStore, TenantRow, secret_hmac, split_key
from gateway.core.policy import UNRESTRICTED, Policy

_SECRET_BYTES = 32

# What a key or tenant becomes, and what the audit log says of it; None: it stays as it is.
KeyRevision = tuple[KeyRow, Change | None]
TenantRevision = tuple[TenantRow, Change | None]


class AccessBook(KeyStore, Protocol):
    """Where keys and tenants are written. A write is durable, and in the audit log, when it returns."""

    async def keys(self) -> list[KeyRow]:
        """Returns every key, oldest first."""
        ...

    async def tenants(self) -> list[TenantRow]:
        """Returns every tenant, by name."""
        ...

    async def revise_key(self, key_id: str, revise: Callable[[KeyRow | None], KeyRevision]) -> KeyRow:
        """Gives the key, or None where there is none, to `revise` and writes what it returns; raises what it raises.

        A tenant that is not there is made, with what the key says of it.
        """
        ...

    async def revise_tenant(self, tenant: str, revise: Callable[[TenantRow | None], TenantRevision]) -> TenantRow:
        """The same for a tenant."""
        ...


class Announcer(Protocol):
    """Tells the other workers."""

    async def access_changed(self, *, key_ids: list[str], tenants: list[str]) -> None:
        """Says that keys, and all keys of tenants, changed; never raises: the workers' caches expire anyway."""
        ...


@dataclass(frozen=True, slots=True)
class NewKey:
    """What a key is to be."""

    tenant: str
    requests_per_minute: int | None = None
    is_admin: bool = False
    policy: Policy = UNRESTRICTED
    name: str = ""
    metadata: Mapping[str, str] = field(default_factory=dict)
    expires_unix_s: int | None = None


class Administration:
    """Makes, changes and ends keys and tenants. `actor` is the id of the key that orders it."""

    def __init__(
        self,
        book: AccessBook,
        pepper: bytes,
        ring: KeyRing,
        announcer: Announcer,
        *,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._book = book
        self._pepper = pepper
        self._ring = ring
        self._announcer = announcer
        self._now = now
        self._configured: set[str] = set()  # ids of the keys that the configuration gives

    async def create_key(self, actor: str, wanted: NewKey) -> tuple[str, str]:
        """Makes a key and returns its id and the whole key, which nobody can read again."""
        key_id, secret = creation.new_id("key")[:16], secrets.token_urlsafe(_SECRET_BYTES)
        row = KeyRow(
            key_id,
            wanted.tenant,
            self._hmac(secret),
            wanted.is_admin,
            wanted.requests_per_minute,
            int(self._now()),
            policy=wanted.policy,
            name=wanted.name,
            metadata=wanted.metadata,
            expires_unix_s=wanted.expires_unix_s,
        )

        def revise(found: KeyRow | None) -> KeyRevision:
            if found is not None:
                raise _was_made(key_id)
            return row, Change(actor, "key.created", key_id, _told_of_key(row))

        await self._book.revise_key(key_id, revise)
        await self._announce_key(key_id)
        return key_id, f"sk-{key_id}-{secret}"

    async def configure_key(self, key: str, tenant: str, *, is_admin: bool, allows_text: bool) -> None:
        """Writes a key that the configuration gives; raises INVALID_ARGUMENT when it is malformed.

        One that was revoked stays so unless its secret has changed. allows_text is for a tenant that is new.
        """
        parts = split_key(key)
        if parts is None:
            raise PlatformError(Code.INVALID_ARGUMENT, "a bootstrap key must be sk-<id>-<secret>, secret of 16 or more")
        key_id, secret = parts
        row = KeyRow(key_id, tenant, self._hmac(secret), is_admin, None, int(self._now()), allows_text=allows_text)

        def revise(found: KeyRow | None) -> KeyRevision:
            if found is None:
                return row, Change(CONFIGURATION, "key.created", key_id, _told_of_key(row))
            is_same = found.secret_hmac == row.secret_hmac
            wanted = replace(
                found,
                tenant=tenant,
                secret_hmac=row.secret_hmac,
                is_admin=is_admin,
                requests_per_minute=None,
                revoked_unix_s=found.revoked_unix_s if is_same else None,
                former_hmac=None,
                former_until_unix_s=None,
            )
            if wanted == found:
                return found, None
            return wanted, Change(
                CONFIGURATION, "key.changed", key_id, _difference(found, wanted) | {"new_secret": not is_same}
            )

        await self._book.revise_key(key_id, revise)
        self._configured.add(key_id)
        await self._announce_key(key_id)

    async def keys(self) -> list[KeyRow]:
        """Returns every key, oldest first."""
        return await self._book.keys()

    async def key(self, key_id: str) -> KeyRow:
        """Returns one key; raises NOT_FOUND."""
        row = await self._book.find(key_id)
        if row is None:
            raise _no_key()
        return row

    async def change_key(self, actor: str, key_id: str, change: Callable[[KeyRow], KeyRow]) -> KeyRow:
        """Changes a key; raises NOT_FOUND, and FAILED_PRECONDITION for one that is revoked or configured."""

        def revise(found: KeyRow | None) -> KeyRevision:
            found = self._changeable(found)
            wanted = change(found)
            if wanted == found:
                return found, None
            return wanted, Change(actor, "key.changed", key_id, _difference(found, wanted))

        row = await self._book.revise_key(key_id, revise)
        await self._announce_key(key_id)
        return row

    async def rotate_key(self, actor: str, key_id: str, *, overlap_s: int) -> tuple[str, KeyRow]:
        """Gives a key a new secret; the one before works for overlap_s more, one still older no longer.

        Raises as change_key does.
        """
        secret = secrets.token_urlsafe(_SECRET_BYTES)
        until = int(self._now()) + overlap_s

        def revise(found: KeyRow | None) -> KeyRevision:
            found = self._changeable(found)
            wanted = replace(
                found,
                secret_hmac=self._hmac(secret),
                former_hmac=found.secret_hmac if overlap_s else None,
                former_until_unix_s=until if overlap_s else None,
            )
            return wanted, Change(actor, "key.rotated", key_id, {"overlap_s": overlap_s})

        row = await self._book.revise_key(key_id, revise)
        await self._announce_key(key_id)
        return f"sk-{key_id}-{secret}", row

    async def revoke_key(self, actor: str, key_id: str) -> None:
        """Revokes a key for good; raises NOT_FOUND. Doing it twice is harmless."""
        at = int(self._now())

        def revise(found: KeyRow | None) -> KeyRevision:
            if found is None:
                raise _no_key()
            if found.revoked_unix_s is not None:
                return found, None
            return replace(found, revoked_unix_s=at), Change(actor, "key.revoked", key_id, {"tenant": found.tenant})

        await self._book.revise_key(key_id, revise)
        await self._announce_key(key_id)

    async def tenants(self) -> list[TenantRow]:
        """Returns every tenant, by name."""
        return await self._book.tenants()

    async def tenant(self, tenant: str) -> TenantRow:
        """Returns one tenant; raises NOT_FOUND."""
        row = await self._book.tenant(tenant)
        if row is None:
            raise _no_tenant()
        return row

    async def put_tenant(self, actor: str, wanted: TenantRow) -> TenantRow:
        """Makes a tenant, or makes it what is wanted."""

        def revise(found: TenantRow | None) -> TenantRevision:
            if wanted == found:
                return wanted, None
            action = "tenant.changed" if found else "tenant.created"
            before = found or TenantRow(wanted.tenant)
            return wanted, Change(actor, action, wanted.tenant, _difference(before, wanted))

        return await self._revised(wanted.tenant, revise)

    async def change_tenant(self, actor: str, tenant: str, change: Callable[[TenantRow], TenantRow]) -> TenantRow:
        """Changes a tenant; raises NOT_FOUND."""

        def revise(found: TenantRow | None) -> TenantRevision:
            if found is None:
                raise _no_tenant()
            wanted = change(found)
            if wanted == found:
                return found, None
            return wanted, Change(actor, "tenant.changed", tenant, _difference(found, wanted))

        return await self._revised(tenant, revise)

    async def _revised(self, tenant: str, revise: Callable[[TenantRow | None], TenantRevision]) -> TenantRow:
        row = await self._book.revise_tenant(tenant, revise)
        self._ring.forget((), [tenant])
        await self._announcer.access_changed(key_ids=[], tenants=[tenant])
        return row

    async def _announce_key(self, key_id: str) -> None:
        self._ring.forget([key_id])
        await self._announcer.access_changed(key_ids=[key_id], tenants=[])

    def _changeable(self, found: KeyRow | None) -> KeyRow:
        if found is None:
            raise _no_key()
        if found.key_id in self._configured:
            raise PlatformError(
                Code.FAILED_PRECONDITION,
                "the gateway's configuration gives this key: change it there",
                param="id",
                reason="key_is_configured",
            )
        if found.revoked_unix_s is not None:
            raise PlatformError(Code.FAILED_PRECONDITION, "the key is revoked", param="id", reason="key_revoked")
        return found

    def _hmac(self, secret: str) -> bytes:
        return secret_hmac(self._pepper, secret)


def _told_of_key(row: KeyRow) -> dict[str, Any]:
    return {"tenant": row.tenant} | _difference(KeyRow("", row.tenant, b"", False, None, row.created_unix_s), row)


# What the audit log tells of a change, by the fields' names. Secrets, and what is the tenant's, are not among them.
_TOLD = (
    "tenant",
    "is_admin",
    "requests_per_minute",
    "revoked_unix_s",
    "name",
    "metadata",
    "expires_unix_s",
    "allows_text",
    "disabled_unix_s",
)


def _difference(before: KeyRow | TenantRow, after: KeyRow | TenantRow) -> dict[str, Any]:
    told: dict[str, Any] = {
        name: {"from": getattr(before, name), "to": getattr(after, name)}
        for name in _TOLD
        if getattr(before, name, None) != getattr(after, name, None)
    }
    if before.policy != after.policy:
        told["policy"] = {"from": json.loads(before.policy.to_json()), "to": json.loads(after.policy.to_json())}
    return told


def _no_key() -> PlatformError:
    return PlatformError(Code.NOT_FOUND, "no such key", param="id")


def _no_tenant() -> PlatformError:
    return PlatformError(Code.NOT_FOUND, "no such tenant", param="tenant")


def _was_made(key_id: str) -> PlatformError:
    """The error for a request that was cut short after it had made its key: nobody can tell the secret any more."""
    return PlatformError(
        Code.CONFLICT,
        f"the request with this Idempotency-Key made the key {key_id}, whose secret was lost on the way: revoke or "
        "rotate it, or make another under a new Idempotency-Key",
        param="idempotency-key",
        reason="idempotency_answer_lost",
    )
