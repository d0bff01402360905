"""What a client is told of its limits: headers beside every answer, and the refusal.

x-ratelimit-* are OpenAI's and speak of the tightest limit on requests and on tokens. ratelimit-policy and ratelimit are
those of the IETF's draft (draft-ietf-httpapi-ratelimit-headers) and name them all.
"""

import math
from collections.abc import Iterable, MutableMapping

from chassis.errors import Code, PlatformError
from gateway.core.meters import Meter, Scope, Standing, Verdict
from gateway.core.policy import Counted
from gateway.core.ports import LimitState

NO_LIMIT = 2**53 - 1  # JavaScript's largest safe integer


def say_request_limit(headers: MutableMapping[str, str], state: LimitState) -> None:
    """Says what a key may send in a minute; where there is no limit, the largest number that every client can read."""
    _say(headers, Counted.REQUESTS, NO_LIMIT, NO_LIMIT, 0.0)
    _say(headers, Counted.TOKENS, NO_LIMIT, NO_LIMIT, 0.0)
    if state.limit is not None:
        _say(headers, Counted.REQUESTS, state.limit, state.remaining, state.reset_s)
        _append(headers, "ratelimit-policy", f'"key-minute";q={state.limit};w=60')
        _append(headers, "ratelimit", f'"key-minute";r={state.remaining};t={math.ceil(state.reset_s)}')


def say_standings(headers: MutableMapping[str, str], standings: Iterable[Standing]) -> None:
    """Adds limits to what the headers say; a tighter one replaces a wider one."""
    for standing in standings:
        limit = standing.meter.limit
        if limit.counted is not Counted.CONCURRENCY:
            told = int(headers.get(f"x-ratelimit-remaining-{limit.counted}", NO_LIMIT))
            if standing.remaining <= told:
                _say(headers, limit.counted, limit.amount, standing.remaining, standing.reset_s)
        name = _policy_name(standing.meter)
        window = "" if limit.counted is Counted.CONCURRENCY else f";w={math.ceil(limit.window_s)}"
        _append(headers, "ratelimit-policy", f"{name};q={limit.amount}{window}")
        _append(headers, "ratelimit", f"{name};r={standing.remaining};t={math.ceil(standing.reset_s)}")


def refusal(verdict: Verdict) -> PlatformError:
    """The error for a request that was refused; it names the limit that is in the way for longest."""
    standing = max((one for one in verdict.standings if not one.fits), key=lambda one: one.retry_s)
    return PlatformError(
        Code.RATE_LIMITED,
        f"{_what(standing.meter)}{_left(standing, verdict.tokens)}; try again in {math.ceil(standing.retry_s)} s",
        reason="rate_limit_exceeded",
        retry_after_s=standing.retry_s,
        param=_param(standing.meter),
    )


def too_large(meter: Meter, num_tokens: int, param: str | None) -> PlatformError:
    """The error for a request that the limit will never have room for."""
    needs = f", and this request needs {num_tokens}" if meter.limit.counted is Counted.TOKENS else ""
    return PlatformError(
        Code.OUT_OF_RANGE,
        f"{_what(meter)}{needs}: it can never pass",
        reason="request_too_large_for_limit",
        param=param,
    )


def _what(meter: Meter) -> str:
    limit = meter.limit
    who = {
        Scope.KEY: "this key",
        Scope.TENANT: "this key's tenant",
        Scope.MODEL: "all tenants together",
        Scope.GLOBAL: "all tenants together",
    }[meter.scope]
    where = f" with the model {limit.model!r}" if limit.model else ""
    if limit.counted is Counted.CONCURRENCY:
        return f"{who} may have {limit.amount} requests running at a time{where}"
    per = f"per {limit.window_s:g} s ({limit.algorithm.replace('_', ' ')})"
    return (
        f"{who} may {'use' if limit.counted is Counted.TOKENS else 'send'} {limit.amount} {limit.counted} {per}{where}"
    )


def _left(standing: Standing, num_tokens: int) -> str:
    match standing.meter.limit.counted:
        case Counted.TOKENS:
            return f"; {standing.remaining} are left, and this request may need {num_tokens}"
        case Counted.REQUESTS:
            return f"; {standing.remaining} are left"
        case Counted.CONCURRENCY:
            return ", and they are"


def _param(meter: Meter) -> str | None:
    return "max_tokens" if meter.limit.counted is Counted.TOKENS else None


def _say(headers: MutableMapping[str, str], what: Counted, limit: int, remaining: int, reset_s: float) -> None:
    headers[f"x-ratelimit-limit-{what}"] = str(limit)
    headers[f"x-ratelimit-remaining-{what}"] = str(remaining)
    headers[f"x-ratelimit-reset-{what}"] = _duration(reset_s)


def _append(headers: MutableMapping[str, str], name: str, value: str) -> None:
    headers[name] = f"{headers[name]}, {value}" if name in headers else value


def _policy_name(meter: Meter) -> str:
    limit = meter.limit
    window = "" if limit.counted is Counted.CONCURRENCY else f"-{limit.window_s:g}s"
    return f'"{meter.scope}-{limit.counted}{window}"'


def _duration(seconds: float) -> str:
    """Writes a duration as OpenAI does: 250ms, 6s, 1m0s."""
    if seconds < 1:
        return f"{max(0, math.ceil(seconds * 1000))}ms"
    whole = math.ceil(seconds)
    return f"{whole}s" if whole < 60 else f"{whole // 60}m{whole % 60}s"
