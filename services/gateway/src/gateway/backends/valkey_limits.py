"""The shared limiter: all limits of a request are judged by one script in Valkey, with the server's clock.

While Valkey is away or slow a limiter in memory decides within the time-out; it has counted along all the time. What a
request held is given back in the background, where it was taken. Implements ports.RequestLimiter and meters.Limiter.
"""

import asyncio
import contextlib
import itertools
import logging
import secrets
import time
from collections import defaultdict, deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass

from gateway.backends import valkey_scripts
from gateway.backends.gateway_metrics import LOCAL_DECISIONS, UNSETTLED, count_refusal
from gateway.backends.valkey_client import Script, ScriptCall, ValkeyClient, ValkeyError
from gateway.core.breaker import Breaker
from gateway.core.limits import UNLIMITED, LocalLimiter, limit_state, requests_per_minute
from gateway.core.meters import Meter, Standing, Verdict
from gateway.core.ports import LimitState, Principal

_log = logging.getLogger(__name__)

_TIMEOUT_S = 0.075
_RESERVE = Script(valkey_scripts.RESERVE)
_SETTLE = Script(valkey_scripts.SETTLE)
_RENEW = Script(valkey_scripts.RENEW)
_LEASE_S = 30.0  # after so long what a gateway held that was killed is free again
_MAX_UNSETTLED = 100_000  # while Valkey is away; what is more is left to its lease
_SETTLED_AT_ONCE = 64
_RENEWED_AT_ONCE = 1_000
_BACKGROUND_TIMEOUT_S = 1.0
_CLOSE_TIMEOUT_S = 2.0


@dataclass(frozen=True, slots=True)
class _Settlement:
    id: str
    meters: tuple[Meter, ...]
    num_tokens: int
    until_s: float


class ValkeyLimiter:
    """Counts in Valkey, at most timeout_s per request; falls back to `local`. Made by connect(); needs run()."""

    def __init__(
        self,
        client: ValkeyClient,
        *,
        local: LocalLimiter | None = None,
        timeout_s: float = _TIMEOUT_S,
        lease_s: float = _LEASE_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._client = client
        self._local = local or LocalLimiter()
        self._timeout_s = timeout_s
        self._lease_s = lease_s
        self._lease_ms = int(lease_s * 1000)
        self._breaker = Breaker(clock=clock)
        self._ids = (f"{prefix}{number}" for prefix in [secrets.token_hex(6)] for number in itertools.count())
        self._live: dict[str, tuple[Meter, ...]] = {}  # what is held in Valkey, by request
        self._unsettled: deque[_Settlement] = deque()
        self._wakes = asyncio.Event()

    @classmethod
    def connect(
        cls,
        url: str,
        *,
        local: LocalLimiter | None = None,
        timeout_s: float = _TIMEOUT_S,
        lease_s: float = _LEASE_S,
    ) -> "ValkeyLimiter":
        """Connects on first use; the url is ValkeyClient's."""
        return cls(ValkeyClient(url), local=local, timeout_s=timeout_s, lease_s=lease_s)

    async def hit(self, principal: Principal) -> LimitState:
        """Counts one request; never raises and never takes longer than its time-out when Valkey is away."""
        meter = requests_per_minute(principal)
        if meter is None:
            return UNLIMITED
        verdict = await self.reserve((meter,), 0, 0)
        if not verdict.allowed:
            count_refusal(meter)
        return limit_state(verdict)

    async def reserve(self, meters: Sequence[Meter], least: int, most: int) -> Verdict:
        """Judges one request; never raises and never takes longer than its time-out when Valkey is away."""
        verdict = await self._reserve_shared(meters, least, most)
        if verdict is None:
            LOCAL_DECISIONS.inc()
            verdict = self._local.judge(meters, least, most)
        else:
            self._local.follow(verdict)
        return verdict

    def settle(self, verdict: Verdict, num_tokens: int) -> None:
        """Gives back here at once, and in Valkey what was taken there as soon as it answers."""
        self._local.settle(verdict, num_tokens)
        if verdict.is_shared:
            self._live.pop(verdict.id, None)
            self._settle_later(verdict.id, verdict.held, num_tokens)

    @property
    def is_shared(self) -> bool:
        """Valkey is in use; False while this process counts alone."""
        return not self._breaker.is_open

    async def run(self) -> None:
        """Settles, and renews what running requests hold, until cancelled."""
        renew_at_s = 0.0
        while True:
            if renew_at_s <= time.monotonic():
                renew_at_s = time.monotonic() + self._lease_s / 3
                if self._live:
                    await self._try(self._renew_live)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(max(0.0, renew_at_s - time.monotonic())):
                    await self._wakes.wait()
            self._wakes.clear()
            self._forget_late()
            if self._unsettled and not await self._try(self._settle_some):
                await asyncio.sleep(self._timeout_s)
            if self._unsettled:
                self._wakes.set()

    async def close(self) -> None:
        """Settles what is left, if Valkey answers, and closes the connections."""
        deadline_s = time.monotonic() + _CLOSE_TIMEOUT_S
        while self._unsettled and time.monotonic() < deadline_s:
            if not await self._try(self._settle_some):
                break
        self._client.drop()

    async def _reserve_shared(self, meters: Sequence[Meter], least: int, most: int) -> Verdict | None:
        """None while Valkey is away."""
        if not self._breaker.permits():
            return None
        request_id = next(self._ids)
        held = tuple(meter for meter in meters if meter.is_held)
        try:
            answer = await self._client.run(
                _RESERVE,
                [meter.name for meter in meters],
                [request_id, self._lease_ms, least, most, *_args(meters)],
                timeout_s=self._timeout_s,
            )
        except (ValkeyError, OSError, TimeoutError) as error:
            self._note_failure(error)
            self._settle_later(request_id, held, 0)  # it may have been carried out all the same
            return None
        except asyncio.CancelledError:
            self._settle_later(request_id, held, 0)
            raise
        self._note_success()
        verdict = _verdict(request_id, meters, answer)
        if verdict.held:
            self._live[request_id] = held
        return verdict

    def _settle_later(self, request_id: str, held: tuple[Meter, ...], num_tokens: int) -> None:
        if not held:
            return
        self._unsettled.append(_Settlement(request_id, held, num_tokens, time.monotonic() + self._lease_s))
        if len(self._unsettled) > _MAX_UNSETTLED:
            self._unsettled.popleft()
            UNSETTLED.inc()
        self._wakes.set()

    def _forget_late(self) -> None:
        while self._unsettled and self._unsettled[0].until_s < time.monotonic():
            self._unsettled.popleft()  # its lease is over: Valkey has counted it in full
            UNSETTLED.inc()

    async def _settle_some(self) -> None:
        """Sends a batch in one round trip. What was sent stays until it is known to have arrived: twice is harmless."""
        batch = list(itertools.islice(self._unsettled, _SETTLED_AT_ONCE))
        calls = [
            ScriptCall(
                [meter.name for meter in one.meters], [one.id, self._lease_ms, one.num_tokens, *_args(one.meters)]
            )
            for one in batch
        ]
        await self._client.run_all(_SETTLE, calls, timeout_s=_BACKGROUND_TIMEOUT_S)
        for one in batch:
            if self._unsettled and self._unsettled[0] is one:
                self._unsettled.popleft()

    async def _renew_live(self) -> None:
        ids: dict[Meter, list[str]] = defaultdict(list)
        for request_id, meters in self._live.items():
            for meter in meters:
                ids[meter].append(request_id)
        for meter, all_ids in ids.items():
            for first in range(0, len(all_ids), _RENEWED_AT_ONCE):
                some = all_ids[first : first + _RENEWED_AT_ONCE]
                args: list[str | int] = [self._lease_ms, meter.window_ms, *some]
                await self._client.run(_RENEW, [meter.name], args, timeout_s=_BACKGROUND_TIMEOUT_S)

    async def _try(self, work: Callable[[], Awaitable[None]]) -> bool:
        """Does something in the background, where Valkey is there to do it."""
        if not self._breaker.permits():
            return False
        try:
            await work()
        except (ValkeyError, OSError, TimeoutError) as error:
            self._note_failure(error)
            return False
        self._note_success()
        return True

    def _note_failure(self, error: Exception) -> None:
        if not isinstance(error, ValkeyError):
            self._client.drop()  # what does not answer in time may be gone without a word
        if self._breaker.failed():
            _log.error("limits are counted locally, valkey failed", extra={"error": repr(error)})

    def _note_success(self) -> None:
        if self._breaker.succeeded():
            _log.info("limits are counted in valkey again")


def _args(meters: Iterable[Meter]) -> list[str | int]:
    return [
        one
        for meter in meters
        for one in (meter.algorithm, meter.limit.amount, meter.window_ms, meter.limit.counted.value)
    ]


def _verdict(request_id: str, meters: Sequence[Meter], answer: Sequence[int]) -> Verdict:
    allowed, tokens, wait_ms, *numbers = answer
    standings = tuple(
        Standing(meter, not retry_ms, remaining, reset_ms / 1000, retry_ms / 1000)
        for meter, remaining, reset_ms, retry_ms in zip(meters, numbers[::3], numbers[1::3], numbers[2::3], strict=True)
    )
    return Verdict(request_id, bool(allowed), tokens, wait_ms / 1000, standings, is_shared=True)
