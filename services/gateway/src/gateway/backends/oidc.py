"""Tokens of an OpenID Connect provider: its public keys (JWKS), from a file or a URL, and what they have signed.

Implements core.tokens.Verifier. The keys are read in a task of their own, never while a request waits; when they cannot
be read, those that are known go on for a day.
"""

import asyncio
import json
import logging
import re
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import jwt

from chassis.errors import Code, PlatformError
from gateway.core.keys import refused
from gateway.core.tokens import Identity

_log = logging.getLogger(__name__)

# Asymmetric ones only: with a symmetric one, who can check a token can make one.
ALGORITHMS = frozenset({"RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA"})
_LEEWAY_S = 10.0  # of the clocks
_MAX_JWKS_BYTES = 256 * 1024
_MAX_KEYS = 64
_FETCH_TIMEOUT_S = 5.0
_REFRESH_S = 300.0
_MIN_GAP_S = 10.0  # between two reads, however many unknown key ids come in
_MAX_AGE_S = 86_400.0
_TENANT = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}")

PublicKeys = Mapping[str, jwt.PyJWK]


@dataclass(frozen=True, slots=True)
class Trust:
    """Whose tokens are taken, and which claims say what. A claim that is named must be there."""

    issuer: str
    audience: str
    tenant_claim: str
    scopes_claim: str | None = None
    models_claim: str | None = None


class PublicKeySet:
    """The issuer's keys as they were last read."""

    def __init__(self, read: Callable[[], Awaitable[bytes]], *, clock: Callable[[], float] = time.monotonic) -> None:
        self._read = read
        self._clock = clock
        self._keys: PublicKeys = {}
        self._raw = b""
        self._read_at: float | None = None
        self._wanted = asyncio.Event()
        self.epoch = 0

    def current(self) -> PublicKeys:
        """Returns the keys by their ids; raises UNAVAILABLE while there are none that are a day old at most."""
        if self._read_at is None or self._clock() - self._read_at > _MAX_AGE_S:
            raise PlatformError(
                Code.UNAVAILABLE,
                "the keys that tokens are checked with are not known",
                reason="oidc_keys_unavailable",
                retry_after_s=_MIN_GAP_S,
            )
        return self._keys

    def look_again(self) -> None:
        """Asks for a read soon: a token names a key that is not known."""
        self._wanted.set()

    async def run(self) -> None:
        """Reads the keys again and again, until cancelled."""
        while True:
            self._wanted.clear()
            if not await self.refresh():
                self._wanted.set()
            await asyncio.sleep(_MIN_GAP_S)
            try:
                async with asyncio.timeout(_REFRESH_S - _MIN_GAP_S):
                    await self._wanted.wait()
            except TimeoutError:
                pass

    async def refresh(self) -> bool:
        """Reads the keys once; says whether that went well. What cannot be read leaves the keys as they are."""
        try:
            raw = await self._read()
            keys = public_keys(raw)
        except (PlatformError, ValueError, OSError) as error:
            _log.error("the keys of the token issuer could not be read", extra={"error": repr(error)[:300]})
            return False
        self._read_at = self._clock()
        if raw != self._raw:
            self._keys, self._raw = keys, raw
            self.epoch += 1
            _log.info("the keys of the token issuer were read", extra={"num_keys": len(keys)})
        return True


class OidcVerifier:
    """Checks tokens with the issuer's keys."""

    def __init__(self, trust: Trust, keys: PublicKeySet) -> None:
        self._trust = trust
        self._keys = keys

    @property
    def epoch(self) -> int:
        """Changes with the issuer's keys."""
        return self._keys.epoch

    async def run(self) -> None:
        """Keeps the keys up to date, until cancelled."""
        await self._keys.run()

    def verify(self, token: str) -> Identity:
        """Returns what the token says; raises UNAUTHENTICATED, and UNAVAILABLE while no keys are known."""
        known = self._keys.current()
        try:
            key = known.get(jwt.get_unverified_header(token)["kid"])
            if key is None:
                self._keys.look_again()
                raise ValueError("no such key")
            claims = jwt.decode(
                token,
                key,  # it is bound to one algorithm: what the token says of it is compared and not believed
                algorithms=[key.algorithm_name],
                audience=self._trust.audience,
                issuer=self._trust.issuer,
                leeway=_LEEWAY_S,
                options={"require": ["exp", "iss", "aud", "sub"], "enforce_minimum_key_length": True},
            )
            return self._identity(claims)
        except (jwt.PyJWTError, ValueError, TypeError, KeyError, RecursionError) as error:
            _log.info("token refused", extra={"why": type(error).__name__})
            raise refused() from None

    def _identity(self, claims: Mapping[str, Any]) -> Identity:
        trust = self._trust
        tenant, subject = claims[trust.tenant_claim], claims["sub"]
        if not isinstance(tenant, str) or not _TENANT.fullmatch(tenant) or not subject:
            raise ValueError("no tenant or no subject")
        return Identity(
            issuer=trust.issuer,
            subject=subject,
            tenant=tenant,
            expires_unix_s=float(claims["exp"]),
            scopes=_words(claims[trust.scopes_claim]) if trust.scopes_claim else None,
            models=_words(claims[trust.models_claim]) if trust.models_claim else None,
        )


def _words(claim: object) -> frozenset[str]:
    """Reads a list of strings, or OAuth's string of words."""
    words = claim.split() if isinstance(claim, str) else claim
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise ValueError("a claim is neither a string nor a list of strings")
    return frozenset(words)


def public_keys(raw: bytes) -> PublicKeys:
    """Reads a JWKS; keys that are not for signatures, or not asymmetric, or too short are left out.

    Raises ValueError where no key is left.
    """
    document = json.loads(raw)
    listed = document.get("keys") if isinstance(document, dict) else None
    keys: dict[str, jwt.PyJWK] = {}
    for one in listed[:_MAX_KEYS] if isinstance(listed, list) else ():
        if isinstance(one, dict) and (key := _public_key(one)) is not None:
            keys.setdefault(one["kid"], key)
    if not keys:
        raise ValueError("the document has no public key with a kid for signatures")
    return keys


def _public_key(one: Mapping[str, Any]) -> jwt.PyJWK | None:
    if not isinstance(one.get("kid"), str) or one.get("use", "sig") != "sig" or "d" in one:
        return None
    try:
        key = jwt.PyJWK(dict(one))
        is_short = key.Algorithm.check_key_length(key.key) is not None
    except (jwt.PyJWTError, ValueError, TypeError, KeyError):
        return None
    return key if key.algorithm_name in ALGORITHMS and not is_short else None


def reads_file(path: Path) -> Callable[[], Awaitable[bytes]]:
    """A file that somebody else keeps up to date, such as a mounted secret."""

    def read() -> bytes:
        with path.open("rb") as file:
            return _bounded(file.read(_MAX_JWKS_BYTES + 1))

    return lambda: asyncio.to_thread(read)


def reads_url(url: str) -> Callable[[], Awaitable[bytes]]:
    """The provider's own address of its keys."""

    async def read() -> bytes:
        timeout = aiohttp.ClientTimeout(total=_FETCH_TIMEOUT_S)
        try:
            # No redirects: the keys come from where the configuration says, or not at all.
            async with (
                aiohttp.ClientSession(timeout=timeout) as session,
                session.get(url, allow_redirects=False) as answer,
            ):
                if answer.status != 200:
                    raise PlatformError(Code.UNAVAILABLE, f"{url} answered with {answer.status}")
                raw = b""
                async for piece in answer.content.iter_chunked(64 * 1024):
                    raw = _bounded(raw + piece)
                return raw
        except (aiohttp.ClientError, TimeoutError) as error:
            raise PlatformError(Code.UNAVAILABLE, f"{url} could not be read: {error!r}") from None

    return read


def _bounded(raw: bytes) -> bytes:
    if len(raw) > _MAX_JWKS_BYTES:
        raise ValueError(f"the document is larger than {_MAX_JWKS_BYTES} bytes")
    return raw
