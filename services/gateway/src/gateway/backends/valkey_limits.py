"""The shared request limiter: one window per key in Valkey, counted by a script with the server's clock.

While Valkey is away or slow a limiter in memory takes over within the time-out, from the counts last seen. Implements
ports.RequestLimiter; the rule is that of core.limits.
"""

import asyncio
import logging
import time
from collections.abc import Callable

import redis.asyncio as redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from gateway.backends.gateway_metrics import LOCAL_DECISIONS
from gateway.core.limits import UNLIMITED, WINDOW_S, Breaker, LocalLimiter
from gateway.core.ports import LimitState, Principal

_log = logging.getLogger(__name__)

_TIMEOUT_S = 0.075
_MAX_CONNECTIONS = 64

# Atomic: Valkey runs a script alone. A refused request is not counted. The expiry only cleans up; the window's end is
# judged by TIME, one clock for all gateways.
_HIT = """
local limit, window_ms = tonumber(ARGV[1]), tonumber(ARGV[2])
local clock = redis.call('TIME')
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)
local kept = redis.call('HMGET', KEYS[1], 'end', 'count')
local window_end, count = tonumber(kept[1]), tonumber(kept[2])
if not window_end or not count or window_end <= now or window_end > now + window_ms then
    window_end, count = now + window_ms, 0
end
local allowed = 0
if count < limit then
    allowed, count = 1, count + 1
    redis.call('HSET', KEYS[1], 'end', window_end, 'count', count)
    redis.call('PEXPIRE', KEYS[1], window_end - now + 1000)
end
return {allowed, count, window_end - now}
"""


class ValkeyLimiter:
    """Counts in Valkey, at most timeout_s per hit; falls back to `local`. Made by connect()."""

    def __init__(
        self,
        client: redis.Redis,
        *,
        local: LocalLimiter | None = None,
        window_s: float = WINDOW_S,
        timeout_s: float = _TIMEOUT_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._client = client
        self._script = client.register_script(_HIT)
        self._local = local or LocalLimiter(window_s=window_s)
        self._window_ms = int(window_s * 1000)
        self._timeout_s = timeout_s
        self._breaker = Breaker(clock=clock)

    @classmethod
    def connect(cls, url: str, *, window_s: float = WINDOW_S, timeout_s: float = _TIMEOUT_S) -> "ValkeyLimiter":
        """Makes a client for redis://:password@host:port/db. Connects on first use."""
        # redis-py's defaults wait 60 s on a frozen server and retry: every time-out is set and nothing is retried.
        pool = redis.BlockingConnectionPool.from_url(
            url,
            max_connections=_MAX_CONNECTIONS,
            timeout=timeout_s,
            socket_timeout=timeout_s,
            socket_connect_timeout=timeout_s,
            retry=Retry(NoBackoff(), 0),
            client_name="pressroom-gateway",
        )
        return cls(redis.Redis.from_pool(pool), window_s=window_s, timeout_s=timeout_s)

    async def hit(self, principal: Principal) -> LimitState:
        """Counts one request; never raises and never takes longer than its time-out when Valkey is away."""
        if principal.requests_per_minute is None:
            return UNLIMITED
        if self._breaker.permits():
            try:
                async with asyncio.timeout(self._timeout_s):
                    state = await self._count(principal.key_id, principal.requests_per_minute)
            except (RedisError, OSError, TimeoutError) as error:
                if self._breaker.failed():
                    _log.error("rate limits are counted locally, valkey failed", extra={"error": repr(error)})
            else:
                if self._breaker.succeeded():
                    _log.info("rate limits are counted in valkey again")
                self._local.observe(principal.key_id, state)
                return state
        LOCAL_DECISIONS.inc()
        return self._local.count(principal)

    @property
    def is_shared(self) -> bool:
        """Valkey is in use; False while this process counts alone."""
        return not self._breaker.is_open

    async def close(self) -> None:
        """Closes the connections."""
        await self._client.aclose()

    async def _count(self, key_id: str, limit: int) -> LimitState:
        allowed, count, left_ms = await self._script(keys=[f"pressroom:rpm:{key_id}"], args=[limit, self._window_ms])
        return LimitState(bool(allowed), limit, max(0, limit - count), left_ms / 1000)
