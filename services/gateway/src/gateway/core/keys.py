"""Access keys: their form, and how they are checked.

A key is `sk-<id>-<secret>`. Only an HMAC of the secret is kept. Knows nothing of where keys are stored, who changes
them (core.administration) or how a change reaches the other workers.
"""

import hashlib
import hmac
import re
import secrets
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

from chassis.errors import Code, PlatformError
from gateway.core.policy import UNRESTRICTED, Policy
from gateway.core.ports import Principal
from gateway.core.recent import Recent

_KEY = re.compile(r"sk-([A-Za-z0-9_]{1,64})-([A-Za-z0-9_-]{16,128})")
_NO_KEY = ("", "")  # stands for what is malformed; no key has that id


@dataclass(frozen=True, slots=True)
class TenantRow:
    """One tenant as it is stored."""

    tenant: str
    allows_text: bool = False  # its prompts and completions may be profiled
    policy: Policy = UNRESTRICTED
    disabled_unix_s: int | None = None


@dataclass(frozen=True, slots=True)
class KeyRow:
    """One key as it is stored, with what its tenant allows (read along with the key, changed by itself)."""

    key_id: str
    tenant: str
    secret_hmac: bytes = field(repr=False)
    is_admin: bool
    requests_per_minute: int | None
    created_unix_s: int
    revoked_unix_s: int | None = None
    allows_text: bool = False
    policy: Policy = UNRESTRICTED
    tenant_policy: Policy = UNRESTRICTED
    is_tenant_disabled: bool = False
    name: str = ""
    metadata: Mapping[str, str] = field(default_factory=dict)
    expires_unix_s: int | None = None
    former_hmac: bytes | None = field(default=None, repr=False)  # of the secret before the last rotation
    former_until_unix_s: int | None = None

    def opens(self, now_unix_s: float) -> bool:
        """Says whether the key with its right secret lets anybody in."""
        is_expired = self.expires_unix_s is not None and self.expires_unix_s <= now_unix_s
        return self.revoked_unix_s is None and not is_expired and not self.is_tenant_disabled


class KeyStore(Protocol):
    """Where keys and tenants are kept."""

    async def find(self, key_id: str) -> KeyRow | None:
        """Returns the key, revoked or not."""
        ...

    async def tenant(self, tenant: str) -> TenantRow | None:
        """Returns the tenant, disabled or not."""
        ...


class KeyRing:
    """Checks keys through a small cache. Implements ports.Keys.

    A change is seen here at once when it is announced (forget), and after ttl_s at the latest when it is not.
    """

    def __init__(
        self,
        store: KeyStore,
        pepper: bytes,
        *,
        ttl_s: float = 0.9,  # a change is seen within a second, with what it takes to be written
        max_cached: int = 10_000,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._pepper = pepper
        self._now = now
        self._keys = Recent(store.find, ttl_s=ttl_s, max_kept=max_cached, clock=clock)
        self._tenants = Recent(store.tenant, ttl_s=ttl_s, max_kept=max_cached, clock=clock)
        self._absent = secrets.token_bytes(hashlib.sha256().digest_size)

    async def authenticate(self, key: str) -> Principal:
        """Returns who owns the key; raises UNAUTHENTICATED alike whatever is wrong with it.

        A refusal costs one read of the store and the same steps, whether the key is malformed, its id unknown, its
        secret wrong or its time over: neither the answer nor the time tells them apart.
        """
        key_id, secret = split_key(key) or _NO_KEY
        digest = secret_hmac(self._pepper, secret)
        entry = self._keys.kept(key_id)
        if entry is not None and self._opens(entry.value, digest):
            assert entry.value is not None
            return _principal(entry.value)
        # The store decides: the key or its secret may be newer than what is remembered.
        row = await self._keys.read(key_id, entry)
        if not self._opens(row, digest):
            raise refused()
        assert row is not None
        return _principal(row)

    def _opens(self, row: KeyRow | None, digest: bytes) -> bool:
        """Says whether the secret of the digest opens the key; takes the same time where there is none."""
        now = self._now()
        is_present = hmac.compare_digest(digest, row.secret_hmac if row else self._absent)
        is_former = hmac.compare_digest(digest, (row and row.former_hmac) or self._absent)
        if row is None or not row.opens(now):
            return False
        return is_present or (is_former and now < (row.former_until_unix_s or 0))

    async def principal(self, key_id: str, tenant: str) -> Principal:
        """Who a job works for: the key that ordered it, revoked or not, and the tenant. No admin, no text is profiled.

        Where the key is no stored one (a signed token ordered the job) the tenant's policy holds alone. Raises
        PERMISSION_DENIED for a disabled tenant.
        """
        owner = await self.tenant(tenant)
        if owner is not None and owner.disabled_unix_s is not None:
            raise PlatformError(Code.PERMISSION_DENIED, "the tenant is disabled", reason="tenant_disabled")
        row = await self._keys.get(key_id)
        policy = row.policy if row is not None and row.tenant == tenant else UNRESTRICTED
        return Principal(key_id, tenant, policy=policy, tenant_policy=owner.policy if owner else UNRESTRICTED)

    async def owner(self, tenant: str, key_id: str) -> Principal:
        """Who a job works for, as principal() says, while the key is good; raises UNAUTHENTICATED once it is not.

        For jobs that go on costing money.
        """
        row = await self._keys.get(key_id)
        if row is not None and (row.tenant != tenant or not row.opens(self._now())):
            raise refused()
        principal = await self.principal(key_id, tenant)
        return replace(principal, requests_per_minute=row.requests_per_minute if row is not None else None)

    async def tenant(self, tenant: str) -> TenantRow | None:
        """Returns the tenant as it was a moment ago."""
        return await self._tenants.get(tenant)

    def forget(self, key_ids: Collection[str], tenants: Collection[str] = ()) -> None:
        """Drops keys, and tenants with all of their keys, from the cache."""
        self._keys.forget(lambda key_id, row: key_id in key_ids or (row is not None and row.tenant in tenants))
        self._tenants.forget(lambda tenant, _: tenant in tenants)


def split_key(key: str) -> tuple[str, str] | None:
    """Returns a key's id and secret; None for what is no key."""
    parts = _KEY.fullmatch(key)
    return (parts[1], parts[2]) if parts else None


def secret_hmac(pepper: bytes, secret: str) -> bytes:
    """What is kept of a secret."""
    # Not hmac.digest: it gives the interpreter away, and gets it back when another thread is done with it.
    return hmac.new(pepper, secret.encode(), "sha256").digest()


def refused() -> PlatformError:
    """The one answer to every credential that lets nobody in."""
    return PlatformError(Code.UNAUTHENTICATED, "the API key is missing or not valid", reason="invalid_api_key")


def _principal(row: KeyRow) -> Principal:
    return Principal(
        row.key_id,
        row.tenant,
        row.is_admin,
        row.requests_per_minute,
        row.allows_text,
        row.policy,
        row.tenant_policy,
    )
