"""The exact cache in Valkey: packed entries with an expiry, bounded each and all together.

While Valkey is away or slow nothing is found within the time-out, and nothing is kept. Implements core.repeats.Cache.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence

from gateway.backends.entry_codec import decoded, encoded
from gateway.backends.valkey_client import Argument, Script, ValkeyClient, ValkeyError
from gateway.core.breaker import Breaker
from gateway.core.repeats import Entry

_log = logging.getLogger(__name__)

TIMEOUT_S = 0.075
_MAX_EVENTS = 4096
_MAX_ENTRY_BYTES = 64 * 1024  # packed
_MAX_UNPACKED_BYTES = 4 * 1024 * 1024
_THREAD_FROM_BYTES = 8 * 1024  # larger ones would hold up the event loop while they are read
# Together they take a quarter of the 64 MB that Valkey has: it evicts what expires first, and the counters of limits
# expire long before our entries do.
_MAX_TOTAL_BYTES = 16 * 1024 * 1024
_MAX_ENTRIES = 8192
_PREFIX = "pressroom:cache:"
_INDEX, _SIZES = f"{_PREFIX}index", f"{_PREFIX}sizes"

_GET = Script("return redis.call('GET', KEYS[1])")
# Entries expire in the order of their writing, which is the index's: what is expired or too much is at its front.
_PUT = Script("""
local entry, index, sizes = KEYS[1], KEYS[2], KEYS[3]
local value, ttl_ms, max_bytes, max_entries = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4])
local clock = redis.call('TIME')
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)
local total = tonumber(redis.call('HGET', sizes, 'total') or '0')
local function drop(key)
    local size = redis.call('HGET', sizes, key)
    if size then
        total = total - tonumber(size)
        redis.call('HDEL', sizes, key)
    end
    redis.call('ZREM', index, key)
    redis.call('UNLINK', key)
end
drop(entry)
for _, key in ipairs(redis.call('ZRANGE', index, '-inf', now - ttl_ms, 'BYSCORE', 'LIMIT', 0, 64)) do drop(key) end
while total + #value > max_bytes or redis.call('ZCARD', index) >= max_entries do
    local oldest = redis.call('ZRANGE', index, 0, 0)[1]
    if not oldest then break end
    drop(oldest)
end
if redis.call('ZCARD', index) == 0 then total = 0 end
redis.call('SET', entry, value, 'PX', ttl_ms)
redis.call('ZADD', index, now, entry)
redis.call('HSET', sizes, entry, #value, 'total', total + #value)
redis.call('PEXPIRE', index, ttl_ms + 60000)
redis.call('PEXPIRE', sizes, ttl_ms + 60000)
return total + #value
""")


class ValkeyCache:
    """Keeps entries for ttl_s. Made by connect()."""

    def __init__(
        self,
        client: ValkeyClient,
        *,
        ttl_s: float,
        timeout_s: float = TIMEOUT_S,
        max_total_bytes: int = _MAX_TOTAL_BYTES,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._client = client
        self._ttl_ms = int(ttl_s * 1000)
        self._timeout_s = timeout_s
        self._max_total_bytes = max_total_bytes
        self._breaker = Breaker(clock=clock)

    @classmethod
    def connect(cls, url: str, *, ttl_s: float, timeout_s: float = TIMEOUT_S) -> "ValkeyCache":
        """Connects on first use; the url is ValkeyClient's."""
        return cls(ValkeyClient(url), ttl_s=ttl_s, timeout_s=timeout_s)

    async def get(self, key: str) -> Entry | None:
        """What was kept under the key; None as well where Valkey is away or has something else there."""
        packed = await self._run(_GET, [_PREFIX + key], [])
        if not isinstance(packed, bytes):
            return None
        try:
            if len(packed) > _THREAD_FROM_BYTES:
                return await asyncio.to_thread(decoded, packed, max_bytes=_MAX_UNPACKED_BYTES)
            return decoded(packed, max_bytes=_MAX_UNPACKED_BYTES)
        except ValueError as error:
            _log.warning("an entry of the cache could not be read", extra={"error": str(error)[:200]})
            return None

    async def put(self, key: str, entry: Entry) -> None:
        """Keeps an entry, unless it is too large; drops the oldest ones where there are too many."""
        if len(entry.events) > _MAX_EVENTS:
            return
        packed = await asyncio.to_thread(encoded, entry)
        if len(packed) > _MAX_ENTRY_BYTES:
            return
        args: list[Argument] = [packed, self._ttl_ms, self._max_total_bytes, _MAX_ENTRIES]
        await self._run(_PUT, [_PREFIX + key, _INDEX, _SIZES], args)

    def close(self) -> None:
        """Closes the connection."""
        self._client.drop()

    async def _run(self, script: Script, keys: Sequence[str], args: Sequence[Argument]) -> object:
        """What a script answers; None where Valkey does not answer in time or was away just now."""
        if not self._breaker.permits():
            return None
        try:
            answer: object = await self._client.run(script, keys, args, timeout_s=self._timeout_s)
        except (ValkeyError, OSError, TimeoutError) as error:
            if not isinstance(error, ValkeyError):
                self._client.drop()  # what does not answer in time may be gone without a word
            if self._breaker.failed():
                _log.error("nothing is cached, valkey failed", extra={"error": repr(error)})
            return None
        if self._breaker.succeeded():
            _log.info("valkey caches again")
        return answer
