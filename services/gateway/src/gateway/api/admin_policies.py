"""Policies of keys and tenants as administrators write and read them."""

from collections.abc import Mapping
from dataclasses import replace
from decimal import Decimal, InvalidOperation
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, WithJsonSchema, field_validator

from gateway.api.json_body import Body
from gateway.api.openapi_schemas import COUNT, FLAG, NUMBER, TEXT, array, nullable, record
from gateway.api.scopes import SCOPES
from gateway.core.policy import Algorithm, Budget, Counted, Limit, Policy

_MICROS = 1_000_000
_ONE_MICRO = Decimal("0.000001")
_MAX_MONEY = Decimal(10**9)
_MAX_AMOUNT = 10**12
_MAX_WINDOW_S = 31 * 86_400.0
_MAX_ABS_PRIORITY = 100

# A model's name, in which * stands for anything.
Pattern = Annotated[str, Field(pattern=r"^[A-Za-z0-9._:/*-]{1,256}$")]
Tenant = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,62}$")]

# Of the numbers the document tells the whole ones: which others have six places it cannot say.
_AMOUNT = {
    "anyOf": [
        {"type": "string", "pattern": r"^(0|[1-9][0-9]{0,8})(\.[0-9]{1,6})?$"},
        {"type": "integer", "minimum": 0, "maximum": int(_MAX_MONEY)},
    ]
}
_Scope = Annotated[str, WithJsonSchema({"type": "string", "enum": list(SCOPES)})]


class LimitBody(Body):
    """So much of something in so many seconds."""

    model_config = ConfigDict(extra="forbid")

    counted: Literal["requests", "tokens", "concurrency"]
    amount: Annotated[int, Field(ge=1, le=_MAX_AMOUNT)]
    window_s: Annotated[float, Field(gt=0, le=_MAX_WINDOW_S)] | None = None
    algorithm: Literal["fixed_window", "sliding_log", "token_bucket", "leaky_bucket"] | None = None
    model: Annotated[str, Field(min_length=1, max_length=256)] | None = None

    def limit(self) -> Limit:
        """The limit; what is not said is the default."""
        limit = Limit(Counted(self.counted), self.amount, model=self.model)
        if self.window_s is not None:
            limit = replace(limit, window_s=self.window_s)
        return replace(limit, algorithm=Algorithm(self.algorithm)) if self.algorithm else limit


class BudgetBody(Body):
    """So much money in a period. The amount is a number, or a decimal in a string, of at most six places."""

    model_config = ConfigDict(extra="forbid")

    amount: Annotated[Annotated[str, Field(max_length=32)] | int | float, WithJsonSchema(_AMOUNT)]
    period: Literal["day", "month", "total"] | None = None

    @field_validator("amount")
    @classmethod
    def is_money(cls, amount: str | int | float) -> str | int | float:
        """Refuses what millionths cannot hold."""
        _micros(amount)
        return amount

    def budget(self) -> Budget:
        """The budget, in millionths."""
        return Budget(_micros(self.amount), self.period or "total")


class PolicyBody(Body):
    """A policy; null is what restricts nothing."""

    model_config = ConfigDict(extra="forbid")

    scopes: Annotated[list[_Scope], Field(max_length=len(SCOPES))] | None = None
    models: Annotated[list[Pattern], Field(max_length=256)] | None = None
    limits: Annotated[list[LimitBody], Field(max_length=32)] | None = None
    budget: BudgetBody | None = None
    priority: Annotated[int, Field(ge=-_MAX_ABS_PRIORITY, le=_MAX_ABS_PRIORITY)] | None = None
    weight: Annotated[float, Field(gt=0, le=1000)] | None = None
    caches: bool | None = None

    @field_validator("scopes")
    @classmethod
    def are_known(cls, scopes: list[str] | None) -> list[str] | None:
        """Refuses what is no scope."""
        for scope in scopes or ():
            if scope not in SCOPES:
                raise ValueError(f"{scope[:64]!r} is no scope; there are: {', '.join(SCOPES)}")
        return scopes

    def apply(self, before: Policy) -> Policy:
        """Changes what the body says, null included, and leaves the rest."""
        said: dict[str, Any] = {}
        for name in self.model_fields_set:
            said[name] = _READ[name](getattr(self, name))
        return replace(before, **said)


LIMIT = record(
    {"counted": TEXT, "amount": COUNT, "window_s": NUMBER, "algorithm": TEXT, "model": nullable(TEXT)},
)
POLICY = record(
    {
        "scopes": nullable(array(TEXT)),
        "models": nullable(array(TEXT)),
        "limits": array(LIMIT),
        "budget": nullable(record({"amount": NUMBER, "period": TEXT})),
        "priority": {"type": "integer"},
        "weight": NUMBER,
        "caches": FLAG,
    }
)


def policy_of(body: PolicyBody | None) -> Policy:
    """The policy that a body describes in full."""
    return body.apply(Policy()) if body else Policy()


def policy_shape(policy: Policy) -> Mapping[str, Any]:
    """A policy as it is read."""
    return {
        "scopes": None if policy.scopes is None else sorted(policy.scopes),
        "models": None if policy.models is None else sorted(policy.models),
        "limits": [
            {
                "counted": limit.counted.value,
                "amount": limit.amount,
                "window_s": limit.window_s,
                "algorithm": limit.algorithm.value,
                "model": limit.model,
            }
            for limit in policy.limits
        ],
        "budget": policy.budget and {"amount": policy.budget.amount_micros / _MICROS, "period": policy.budget.period},
        "priority": policy.priority,
        "weight": policy.weight,
        "caches": policy.caches,
    }


_READ: Mapping[str, Any] = {
    "scopes": lambda scopes: None if scopes is None else frozenset(scopes),
    "models": lambda models: None if models is None else frozenset(models),
    "limits": lambda limits: tuple(one.limit() for one in limits or ()),
    "budget": lambda budget: budget and budget.budget(),
    "priority": lambda priority: priority or 0,
    "weight": lambda weight: weight or 1.0,
    "caches": bool,
}


def _micros(amount: str | int | float) -> int:
    try:
        money = Decimal(str(amount))  # of a float the shortest digits that mean it: 0.1 is 0.1
    except InvalidOperation:
        raise ValueError("must be an amount of money") from None
    if not money.is_finite() or not 0 <= money <= _MAX_MONEY or money != money.quantize(_ONE_MICRO):
        raise ValueError(f"must be from 0 to {_MAX_MONEY} with at most six places")
    return int(money / _ONE_MICRO)
