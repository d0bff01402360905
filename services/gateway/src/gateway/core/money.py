"""Prices, what a request may cost at most, and what is said where a budget does not allow it.

Money is in integer millionths ("micros") of the currency that prices are in; it is never a float.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Protocol

from chassis.errors import Code, PlatformError
from gateway.core.policy import Budget
from gateway.core.ports import Principal
from gateway.core.services import Usage

_PER_TOKENS = 1_000_000
MS_PER_DAY = 86_400_000
CONFIGURATION = "configuration"  # who sets the prices that graphs declare


@dataclass(frozen=True, slots=True)
class Price:
    """Micros for a million tokens."""

    input_micros: int = 0
    cached_input_micros: int = 0
    output_micros: int = 0

    def cost_micros(self, usage: Usage) -> int:
        """What was used costs; rounded up, so that nothing with a price is free."""
        cached = min(usage.cached_tokens, usage.prompt_tokens)
        total = (
            (usage.prompt_tokens - cached) * self.input_micros
            + cached * self.cached_input_micros
            + usage.completion_tokens * self.output_micros
        )
        return -(-total // _PER_TOKENS)

    def most_micros(self, bound: "Bound") -> int:
        """The most that a request within the bound can cost, however much of its prompt is cached."""
        prompt_micros = max(self.input_micros, self.cached_input_micros)
        total = bound.prompt_tokens * prompt_micros + bound.other_tokens * max(prompt_micros, self.output_micros)
        return -(-total // _PER_TOKENS)


@dataclass(frozen=True, slots=True)
class PriceEntry:
    """A model's price from a moment on, until the next one."""

    model: str
    effective_unix_ms: int
    price: Price


class PriceList(Protocol):
    """The prices of all models."""

    async def put(self, entry: PriceEntry, actor: str, now_unix_ms: int) -> None:
        """Writes a price that begins now or later; raises FAILED_PRECONDITION for an earlier one.

        actor: a key's id, or CONFIGURATION.
        """
        ...

    async def all(self) -> Sequence[PriceEntry]:
        """Every price, by model and time."""
        ...


async def put_declared(prices: PriceList, declared: Mapping[str, Price], now_unix_ms: int) -> None:
    """Puts the prices that graphs declare in force, where another one is or none."""
    in_force = {one.model: one.price for one in await prices.all() if one.effective_unix_ms <= now_unix_ms}
    for model, price in declared.items():
        if in_force.get(model) != price:
            await prices.put(PriceEntry(model, now_unix_ms, price), CONFIGURATION, now_unix_ms)


@dataclass(frozen=True, slots=True)
class Bound:
    """The most tokens that a request can use."""

    prompt_tokens: int = 0
    other_tokens: int = 0  # of all its completions, and of what a graph puts into the prompt


@dataclass(frozen=True, slots=True)
class Purse:
    """A budget and whose it is: a key's or a tenant's."""

    owner: str  # "key:<id>" or "tenant:<name>"
    budget: Budget


def key_owner(key_id: str) -> str:
    """Names a key's spending."""
    return f"key:{key_id}"


def tenant_owner(tenant: str) -> str:
    """Names a tenant's spending."""
    return f"tenant:{tenant}"


def purses_of(principal: Principal) -> tuple[Purse, ...]:
    """The budgets that a request must fit into."""
    owned = (
        (key_owner(principal.key_id), principal.policy.budget),
        (tenant_owner(principal.tenant), principal.tenant_policy.budget),
    )
    return tuple(Purse(owner, budget) for owner, budget in owned if budget is not None)


def day_of(unix_ms: int) -> int:
    """Days since 1970, in UTC."""
    return unix_ms // MS_PER_DAY


def first_day(period: str, day: int) -> int:
    """The day on which the budget's period that holds this day began."""
    match period:
        case "day":
            return day
        case "month":
            return day - (_date(day).day - 1)
    return 0


def quota_exceeded(purse: Purse, left_micros: int, wanted_micros: int, day: int) -> PlatformError:
    """The answer to a request that the budget does not hold."""
    kind = purse.owner.partition(":")[0]
    period = "" if purse.budget.period == "total" else f" of the {purse.budget.period}"
    return PlatformError(
        Code.RATE_LIMITED,
        f"the {kind}'s budget{period} does not hold this request: it may cost up to {wanted_micros} micros, and "
        f"{max(0, left_micros)} of {purse.budget.amount_micros} are neither spent nor reserved; a smaller max_tokens "
        "reserves less",
        retryable=False,
        reason="insufficient_quota",
        retry_after_s=_until_next(purse.budget.period, day),
    )


def _until_next(period: str, day: int) -> float:
    """Seconds until the next period; a day where there is none: somebody must raise the budget first."""
    today = _date(day)
    if period == "month":
        following = (today.replace(day=1) + timedelta(days=32)).replace(day=1)
    else:
        following = today + timedelta(days=1)
    return max(1.0, (following - datetime.now(UTC)).total_seconds())


def _date(day: int) -> datetime:
    return datetime(1970, 1, 1, tzinfo=UTC) + timedelta(days=day)
