"""The stage that holds a request to its limits: those of its key, its tenant, its model and the whole platform.

All of them are judged at once, and a request that one refuses takes nothing of the others. Of tokens a request takes
the most that it may use, and gives back at its end what it did not. Requests per minute of a key are counted before,
for every route (see ports.RequestLimiter); what is counted here are requests to a model.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

from gateway.core.account import Account
from gateway.core.limit_answers import refusal, say_standings, too_large
from gateway.core.meters import Limiter, Meter, Scope, Verdict
from gateway.core.platform_limits import PlatformLimits
from gateway.core.policy import Counted, Limit
from gateway.core.services import Usage
from gateway.core.serving import Ask
from gateway.core.sizing import Sizes, cut

_WIDE = 256  # so many requests fit into a wide limit, even by their bounds


class Limiting:
    """Implements serving.Stage."""

    def __init__(
        self,
        limiter: Limiter,
        sizes: Sizes,
        platform: PlatformLimits,
        count_refusal: Callable[[Meter], None],
    ) -> None:
        self._limiter = limiter
        self._sizes = sizes
        self._platform = platform
        self._count_refusal = count_refusal

    @asynccontextmanager
    async def hold(self, ask: Ask) -> AsyncIterator[None]:
        """Holds what the request may use; raises RATE_LIMITED, or OUT_OF_RANGE for what no waiting makes fit."""
        meters = meters_of(ask, self._platform.limits)
        if not meters:
            yield
            return
        verdict = await self._reserve(ask, meters)
        try:
            say_standings(ask.account.answer_headers, verdict.standings)
            if not verdict.allowed:
                for standing in verdict.standings:
                    if not standing.fits:
                        self._count_refusal(standing.meter)
                raise refusal(verdict)
            if verdict.wait_s:
                await asyncio.sleep(min(verdict.wait_s, ask.deadline.remaining_s()))
            yield
        finally:
            self._settle(ask.account, verdict)

    def _settle(self, account: Account, verdict: Verdict) -> None:
        def tell(usage: Usage) -> None:
            self._limiter.settle(verdict, usage.prompt_tokens + usage.completion_tokens)

        if not account.is_exact:
            # Its place is free now; its tokens are held until the generator has told how many there were.
            self._limiter.settle(verdict.of(Counted.CONCURRENCY), 0)
            verdict = verdict.of(Counted.TOKENS)
        account.when_used(tell)

    async def _reserve(self, ask: Ask, meters: Sequence[Meter]) -> Verdict:
        capacity = min((one.limit.amount for one in meters if one.limit.counted is Counted.TOKENS), default=None)
        _refuse_what_never_fits(meters, 1, None)
        if capacity is None:
            return await self._limiter.reserve(meters, 0, 0)
        size = await self._sizes.bound(ask)
        if not size.is_exact:
            # The bound asks nobody. It holds far more than will be used, which only a wide limit can spare.
            if size.most * _WIDE <= capacity:
                verdict = await self._limiter.reserve(meters, size.most, size.most)
                if verdict.allowed or any(not one.fits and not _counts_tokens(one.meter) for one in verdict.standings):
                    return verdict
            size = await self._sizes.exact(ask)
        _refuse_what_never_fits(meters, size.least, _param(ask))
        verdict = await self._limiter.reserve(meters, size.least, size.most)
        if verdict.allowed:
            ask.requests = cut(ask.requests, size, verdict.tokens)
        return verdict


def meters_of(ask: Ask, platform: Sequence[Limit]) -> tuple[Meter, ...]:
    """The limits that a request has to keep to; of two that count the same the narrower."""
    principal = ask.principal
    if not (principal.policy.limits or principal.tenant_policy.limits or platform):
        return ()
    models = (ask.model, ask.model.partition(":")[0])  # a limit on a model holds for what was tuned from it
    tenant = f"{{{principal.tenant}}}"  # a hash tag: what belongs to one tenant lies in one slot of a cluster
    owned = [(Scope.KEY, f"{tenant}:key:{principal.key_id}", limit) for limit in principal.policy.limits]
    owned += [(Scope.TENANT, f"{tenant}:tenant", limit) for limit in principal.tenant_policy.limits]
    owned += [(Scope.MODEL if limit.model else Scope.GLOBAL, "{platform}", limit) for limit in platform]
    meters: dict[str, Meter] = {}
    for scope, owner, limit in owned:
        if limit.model is not None and limit.model not in models:
            continue
        name = ":".join(
            ("pressroom:limit", owner, limit.counted, limit.algorithm, f"{limit.window_s:g}", limit.model or "")
        )
        known = meters.get(name)
        if known is None or limit.amount < known.limit.amount:
            meters[name] = Meter(name, scope, limit)
    return tuple(meters.values())


def _refuse_what_never_fits(meters: Sequence[Meter], num_tokens: int, param: str | None) -> None:
    for meter in meters:
        if meter.cost(num_tokens) > meter.limit.amount:
            raise too_large(meter, num_tokens, param)


def _counts_tokens(meter: Meter) -> bool:
    return meter.limit.counted is Counted.TOKENS


def _param(ask: Ask) -> str:
    if not ask.requests:
        return "input"
    return "prompt" if ask.requests[0].stopping.max_tokens is None else "max_tokens"
