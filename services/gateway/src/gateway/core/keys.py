"""Access keys: their form, how they are checked, created and revoked.

A key is `sk-<id>-<secret>`. Only an HMAC of the secret is kept. Knows nothing of where keys are stored or how a
revocation reaches the other workers.
"""

import asyncio
import hashlib
import hmac
import re
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Protocol

from chassis.errors import Code, PlatformError
from gateway.core.policy import UNRESTRICTED, Policy
from gateway.core.ports import Principal

_KEY = re.compile(r"sk-([A-Za-z0-9_]{1,64})-([A-Za-z0-9_-]{16,128})")
_SECRET_BYTES = 32
_NUM_LOCKS = 64


@dataclass(frozen=True, slots=True)
class KeyRow:
    """One key as it is stored, with what its tenant allows."""

    key_id: str
    tenant: str
    secret_hmac: bytes = field(repr=False)
    is_admin: bool
    requests_per_minute: int | None
    created_unix_s: int
    revoked_unix_s: int | None = None
    allows_text: bool = False
    policy: Policy = UNRESTRICTED
    tenant_policy: Policy = UNRESTRICTED  # read along with the key, written by itself


class KeyStore(Protocol):
    """Where keys are kept. A write is durable when it returns."""

    async def find(self, key_id: str) -> KeyRow | None:
        """Returns the key, revoked or not."""
        ...

    async def put(self, row: KeyRow, *, tenant_allows_text: bool | None) -> None:
        """Writes the key and its tenant; None leaves what the tenant allows as it is (a new one allows nothing).

        A key that was revoked stays so unless its secret has changed.
        """
        ...

    async def all(self) -> list[KeyRow]:
        """Returns every key, oldest first."""
        ...

    async def revoke(self, key_id: str, at_unix_s: int) -> bool:
        """Marks the key as revoked; False where there is none."""
        ...


class RevocationAnnouncer(Protocol):
    """Tells the other workers."""

    async def keys_revoked(self, key_ids: list[str]) -> None:
        """Says that keys are no longer valid; never raises, since the workers' caches expire anyway."""
        ...


class KeyRing:
    """Checks keys through a small cache and manages them. Implements ports.Keys.

    A revoked key is refused at once here, at once in other workers that hear the announcement, and after ttl_s at the
    latest in those that do not.
    """

    def __init__(
        self,
        store: KeyStore,
        pepper: bytes,
        announcer: RevocationAnnouncer,
        *,
        ttl_s: float = 1.0,
        max_cached: int = 10_000,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._store = store
        self._pepper = pepper
        self._announcer = announcer
        self._ttl_s = ttl_s
        self._max_cached = max_cached
        self._clock = clock
        self._now = now
        self._cache: OrderedDict[str, tuple[float, KeyRow | None]] = OrderedDict()
        self._epoch = 0
        # Striped: many requests that miss the cache for one key together read the store once.
        self._locks = tuple(asyncio.Lock() for _ in range(_NUM_LOCKS))
        self._absent = secrets.token_bytes(hashlib.sha256().digest_size)

    async def authenticate(self, key: str) -> Principal:
        """Returns who owns the key; raises UNAUTHENTICATED alike for malformed, unknown, wrong and revoked."""
        parts = _KEY.fullmatch(key)
        if parts is None:
            raise _refused()
        key_id, secret = parts.groups()
        row = await self._find(key_id)
        # An unknown id takes the same path as a wrong secret, so that time does not tell them apart.
        is_right = hmac.compare_digest(self._digest(secret), row.secret_hmac if row else self._absent)
        if row is None or not is_right or row.revoked_unix_s is not None:
            raise _refused()
        return _principal(row)

    async def owner(self, tenant: str, key_id: str) -> Principal:
        """Returns what authenticate would for a tenant's key that is named by its id; raises UNAUTHENTICATED.

        For work that goes on after the request that ordered it.
        """
        row = await self._find(key_id)
        if row is None or row.tenant != tenant or row.revoked_unix_s is not None:
            raise _refused()
        return _principal(row)

    async def create(self, tenant: str, *, requests_per_minute: int | None, is_admin: bool = False) -> tuple[str, str]:
        """Makes a key and returns its id and the whole key, which nobody can read again."""
        key_id, secret = secrets.token_hex(8), secrets.token_urlsafe(_SECRET_BYTES)
        row = KeyRow(key_id, tenant, self._digest(secret), is_admin, requests_per_minute, int(self._now()))
        await self._store.put(row, tenant_allows_text=None)
        self.forget([key_id])
        return key_id, f"sk-{key_id}-{secret}"

    async def bootstrap(self, key: str, tenant: str, *, is_admin: bool, allows_text: bool) -> None:
        """Writes a key that the configuration gives; raises INVALID_ARGUMENT when it is malformed."""
        parts = _KEY.fullmatch(key)
        if parts is None:
            raise PlatformError(Code.INVALID_ARGUMENT, "a bootstrap key must be sk-<id>-<secret>, secret of 16 or more")
        key_id, secret = parts.groups()
        row = KeyRow(key_id, tenant, self._digest(secret), is_admin, None, int(self._now()))
        await self._store.put(row, tenant_allows_text=allows_text)
        self.forget([key_id])

    async def all(self) -> list[KeyRow]:
        """Returns every key, oldest first."""
        return await self._store.all()

    async def revoke(self, key_id: str) -> None:
        """Revokes a key for good; raises NOT_FOUND. Doing it twice is harmless."""
        if not await self._store.revoke(key_id, int(self._now())):
            raise PlatformError(Code.NOT_FOUND, "no such key", param="id")
        self.forget([key_id])
        await self._announcer.keys_revoked([key_id])

    def forget(self, key_ids: Iterable[str]) -> None:
        """Drops keys from the cache; what is being read at this moment is not cached either."""
        self._epoch += 1
        for key_id in key_ids:
            self._cache.pop(key_id, None)

    async def _find(self, key_id: str) -> KeyRow | None:
        if (cached := self._cached(key_id)) is not None:
            return cached[1]
        async with self._locks[hash(key_id) % _NUM_LOCKS]:
            if (cached := self._cached(key_id)) is not None:
                return cached[1]
            epoch, read_at = self._epoch, self._clock()
            row = await self._store.find(key_id)
            if epoch == self._epoch:
                self._cache[key_id] = (read_at + self._ttl_s, row)
                while len(self._cache) > self._max_cached:
                    self._cache.popitem(last=False)
            return row

    def _cached(self, key_id: str) -> tuple[float, KeyRow | None] | None:
        entry = self._cache.get(key_id)
        if entry is not None and entry[0] <= self._clock():
            del self._cache[key_id]
            return None
        return entry

    def _digest(self, secret: str) -> bytes:
        return hmac.digest(self._pepper, secret.encode(), "sha256")


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


def _refused() -> PlatformError:
    return PlatformError(Code.UNAUTHENTICATED, "the API key is missing or not valid", reason="invalid_api_key")
