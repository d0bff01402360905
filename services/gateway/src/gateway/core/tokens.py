"""Signed tokens (JWT) in place of keys: who sends a request that an identity provider vouches for.

A token names a tenant that must be there; what the tenant may do holds for it, narrowed by what the token says. It is
never an admin's. Nobody can revoke a token: it ends when it expires, or when its tenant is disabled. Knows nothing of
signatures.
"""

import hashlib
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from gateway.core.keys import KeyRing, refused
from gateway.core.policy import Policy
from gateway.core.ports import Principal


@dataclass(frozen=True, slots=True)
class Identity:
    """What a token says. None restricts nothing."""

    issuer: str
    subject: str
    tenant: str
    expires_unix_s: float
    scopes: frozenset[str] | None = None
    models: frozenset[str] | None = None

    @property
    def key_id(self) -> str:
        """What stands for a key's id in the ledger and the limits: one for each subject, however many tokens it has."""
        return "oidc-" + hashlib.sha256(f"{self.issuer}\n{self.subject}".encode()).hexdigest()[:16]


class Verifier(Protocol):
    """Checks signatures and claims."""

    @property
    def epoch(self) -> int:
        """Changes when what was verified before may not be so any more."""
        ...

    def verify(self, token: str) -> Identity:
        """Returns what the token says; raises UNAUTHENTICATED, and UNAVAILABLE while the issuer's keys are not known.

        Takes a tenth of a millisecond or so.
        """
        ...


class Tokens:
    """Checks tokens, remembering for a moment those that were good. Implements ports.Keys."""

    def __init__(
        self,
        verifier: Verifier,
        ring: KeyRing,
        *,
        ttl_s: float = 60.0,
        max_cached: int = 10_000,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._verifier = verifier
        self._ring = ring
        self._ttl_s = ttl_s
        self._max_cached = max_cached
        self._now = now
        self._good: OrderedDict[bytes, tuple[float, int, Identity]] = OrderedDict()  # by the token's hash

    async def authenticate(self, key: str) -> Principal:
        """Returns who sends the token; raises UNAUTHENTICATED alike whatever is wrong, and UNAVAILABLE as verify."""
        identity = self._verified(key)
        owner = await self._ring.tenant(identity.tenant)
        if owner is None or owner.disabled_unix_s is not None:
            raise refused()
        return Principal(
            identity.key_id,
            identity.tenant,
            allows_text=owner.allows_text,
            policy=Policy(scopes=identity.scopes, models=identity.models),
            tenant_policy=owner.policy,
        )

    def _verified(self, token: str) -> Identity:
        digest, now, epoch = hashlib.sha256(token.encode()).digest(), self._now(), self._verifier.epoch
        kept = self._good.get(digest)
        if kept is not None and kept[0] > now and kept[1] == epoch:
            return kept[2]
        identity = self._verifier.verify(token)
        self._good[digest] = (min(identity.expires_unix_s, now + self._ttl_s), epoch, identity)
        while len(self._good) > self._max_cached:
            self._good.popitem(last=False)
        return identity


class Credentials:
    """Takes keys and tokens. Implements ports.Keys."""

    def __init__(self, ring: KeyRing, tokens: Tokens) -> None:
        self._ring = ring
        self._tokens = tokens

    async def authenticate(self, key: str) -> Principal:
        """Returns who sends the credential; raises as the two do."""
        return await (self._ring if key.startswith("sk-") else self._tokens).authenticate(key)
