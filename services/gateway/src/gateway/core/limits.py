"""Limits counted in this process's memory: what decides while the shared store is away."""

import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from gateway.core.counts import (
    HELD_RETRY_MS,
    Concurrency,
    Count,
    FixedWindow,
    LeakyBucket,
    Rule,
    SlidingLog,
    TokenBucket,
)
from gateway.core.meters import Meter, Scope, Standing, Verdict
from gateway.core.policy import Algorithm, Counted, Limit
from gateway.core.ports import LimitState, Principal

_COUNTS: dict[str, Callable[[], Count]] = {
    Algorithm.FIXED_WINDOW: FixedWindow,
    Algorithm.SLIDING_LOG: SlidingLog,
    Algorithm.TOKEN_BUCKET: TokenBucket,
    Algorithm.LEAKY_BUCKET: LeakyBucket,
    Counted.CONCURRENCY: Concurrency,
}
UNLIMITED = LimitState(allowed=True, limit=None, remaining=0, reset_s=0.0)


def requests_per_minute(principal: Principal) -> Meter | None:
    """The meter of a key's requests over HTTP, whatever they ask for; None where the key has no such limit."""
    if principal.requests_per_minute is None:
        return None
    limit = Limit(Counted.REQUESTS, principal.requests_per_minute)
    return Meter(f"pressroom:rpm:{{{principal.tenant}}}:{principal.key_id}", Scope.KEY, limit)


def limit_state(verdict: Verdict) -> LimitState:
    """The judgement of requests_per_minute alone."""
    (standing,) = verdict.standings
    return LimitState(verdict.allowed, standing.meter.limit.amount, standing.remaining, standing.reset_s)


@dataclass(slots=True)
class _Counter:
    count: Count
    held: int = 0

    def retry_ms(self, rule: Rule, now_ms: int, cost: int) -> int:
        """After how long what has no room now may have it."""
        if cost <= self.count.room(rule, 0):
            return HELD_RETRY_MS  # only what is held is in the way
        return max(1, self.count.retry_ms(rule, now_ms, self.held, cost))


class LocalLimiter:
    """Counts at most max_meters limits; the one that was used least recently is forgotten.

    It lets `share` of every amount through: with G gateways that cannot hear each other, a share of 1/G keeps the whole
    within the limit. Implements ports.RequestLimiter and meters.Limiter.
    """

    def __init__(
        self, *, share: float = 1.0, max_meters: int = 10_000, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._share = share
        self._max_meters = max_meters
        self._clock = clock
        self._counters: OrderedDict[str, _Counter] = OrderedDict()

    async def hit(self, principal: Principal) -> LimitState:
        """Counts one request; a refused one is not counted."""
        meter = requests_per_minute(principal)
        return UNLIMITED if meter is None else limit_state(self.judge((meter,), 0, 0))

    async def reserve(self, meters: Sequence[Meter], least: int, most: int) -> Verdict:
        """Judges one request."""
        return self.judge(meters, least, most)

    def judge(self, meters: Sequence[Meter], least: int, most: int) -> Verdict:
        """The same without waiting."""
        now_ms = self._now_ms()
        rules = [self._rule(meter) for meter in meters]
        counters = [self._counter(meter, rule, now_ms) for meter, rule in zip(meters, rules, strict=True)]
        rooms = [one.count.room(rule, one.held) for one, rule in zip(counters, rules, strict=True)]
        free = [room for meter, room in zip(meters, rooms, strict=True) if meter.limit.counted is Counted.TOKENS]
        tokens = max(least, min([most, *free]))
        retries_ms = [
            one.retry_ms(rule, now_ms, meter.cost(tokens)) if meter.cost(tokens) > room else 0
            for meter, rule, one, room in zip(meters, rules, counters, rooms, strict=True)
        ]
        allowed, wait_ms = not any(retries_ms), 0
        if allowed:
            for meter, rule, one in zip(meters, rules, counters, strict=True):
                if isinstance(one.count, LeakyBucket):
                    wait_ms = max(wait_ms, one.count.wait_ms(rule, one.held))
                self._take(one, meter, rule, tokens, now_ms)
        standings = tuple(
            Standing(
                meter,
                fits=not retry_ms,
                remaining=max(0, one.count.remaining(rule, one.held)),
                reset_s=one.count.reset_ms(rule, now_ms) / 1000,
                retry_s=retry_ms / 1000,
            )
            for meter, rule, one, retry_ms in zip(meters, rules, counters, retries_ms, strict=True)
        )
        return Verdict("", allowed, tokens, wait_ms / 1000, standings, is_shared=False)

    def follow(self, verdict: Verdict) -> None:
        """Counts what was judged elsewhere, so that falling back does not start from nothing."""
        if not verdict.allowed:
            return
        now_ms = self._now_ms()
        for standing in verdict.standings:
            rule = self._rule(standing.meter)
            self._take(self._counter(standing.meter, rule, now_ms), standing.meter, rule, verdict.tokens, now_ms)

    def settle(self, verdict: Verdict, num_tokens: int) -> None:
        """The request has ended, wherever it was judged."""
        now_ms = self._now_ms()
        for meter in verdict.held:
            rule = self._rule(meter)
            counter = self._counter(meter, rule, now_ms)
            counter.held = max(0, counter.held - meter.cost(verdict.tokens))  # it may have been forgotten meanwhile
            counter.count.add(rule, now_ms, meter.cost(num_tokens))

    def _take(self, counter: _Counter, meter: Meter, rule: Rule, tokens: int, now_ms: int) -> None:
        if meter.is_held:
            counter.held += meter.cost(tokens)
            counter.count.add(rule, now_ms, 0)  # a window opens with its first request, not at that one's end
        else:
            counter.count.add(rule, now_ms, 1)

    def _counter(self, meter: Meter, rule: Rule, now_ms: int) -> _Counter:
        counter = self._counters.get(meter.name)
        if counter is None:
            counter = self._counters[meter.name] = _Counter(_COUNTS[meter.algorithm]())
            if len(self._counters) > self._max_meters:
                self._counters.popitem(last=False)
        self._counters.move_to_end(meter.name)
        counter.count.advance(rule, now_ms)
        return counter

    def _rule(self, meter: Meter) -> Rule:
        return Rule(max(1, int(meter.limit.amount * self._share)), meter.window_ms)

    def _now_ms(self) -> int:
        return round(self._clock() * 1000)
