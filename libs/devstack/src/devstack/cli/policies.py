"""What the commands of keys and tenants have in common: the options of a policy, and how one is read and shown."""

import re
import time
from datetime import UTC, datetime
from typing import Annotated, Any

import typer

from devstack.cli.failures import CommandFailed
from devstack.cli.output import moment, print_json

_UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86_400}

Expires = Annotated[
    str | None, typer.Option("--expires", help="When it ends: 12h, 30d, or a day such as 2027-01-31 (UTC).")
]
Scopes = Annotated[
    str | None, typer.Option("--scopes", help="Groups of routes, by commas: inference,embeddings. 'all': every one.")
]
Models = Annotated[
    str | None, typer.Option("--models", help="Models, by commas; * stands for anything. 'all': every one.")
]
TokensPerMinute = Annotated[int | None, typer.Option("--tokens-per-minute", min=1, help="Tokens a minute, in and out.")]
Concurrency = Annotated[int | None, typer.Option("--concurrency", min=1, help="Requests at the same time.")]
Budget = Annotated[str | None, typer.Option("--budget", help="Money, such as 12.50. 'none': no bound.")]
BudgetPeriod = Annotated[str, typer.Option("--budget-period", help="day, month or total.")]
Priority = Annotated[int | None, typer.Option("--priority", help="Class of admission: higher goes first.")]
Caches = Annotated[
    bool | None, typer.Option("--caches/--no-caches", help="Repeated requests may be answered from the cache.")
]


def policy_body(
    scopes: str | None,
    models: str | None,
    tokens_per_minute: int | None,
    concurrency: int | None,
    budget: str | None,
    budget_period: str,
    priority: int | None,
    caches: bool | None,
) -> dict[str, Any]:
    """The policy's fields that were named, as the API takes them."""
    policy: dict[str, Any] = {}
    for field, value in (("scopes", scopes), ("models", models)):
        if value is not None:
            policy[field] = None if value == "all" else [one.strip() for one in value.split(",") if one.strip()]
    limits = (("tokens", tokens_per_minute), ("concurrency", concurrency))
    if any(amount is not None for _, amount in limits):
        policy["limits"] = [{"counted": counted, "amount": amount} for counted, amount in limits if amount is not None]
    if budget is not None:
        policy["budget"] = None if budget == "none" else {"amount": budget, "period": budget_period}
    policy |= {} if priority is None else {"priority": priority}
    policy |= {} if caches is None else {"caches": caches}
    return policy


def unix_s_of(text: str, option: str = "--expires") -> int:
    """Reads a length of time from now, or a day, as a Unix time."""
    if re.fullmatch(r"\d{4}-\d\d-\d\d", text):
        try:
            return int(datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp())
        except ValueError:
            raise CommandFailed(f"{option}: there is no day {text}") from None
    return int(time.time()) + seconds_of(text, option)


def seconds_of(text: str, option: str) -> int:
    """Reads a length of time."""
    length = re.fullmatch(r"(\d{1,9})([smhd])", text)
    if length is None:
        raise CommandFailed(f"{option}: {text!r} is no length of time; write 90s, 15m, 12h or 30d")
    return int(length[1]) * _UNITS_S[length[2]]


def show(row: dict[str, Any], as_json: bool) -> None:
    """Prints a key or a tenant."""
    if as_json:
        print_json(row)
        return
    for key, value in (row | row["policy"]).items():
        if key == "policy":
            continue
        if key.endswith(("_at", "_until")):
            value = value and moment(value)
        shown = ", ".join(map(str, value)) if isinstance(value, list) else value
        print(f"{key:<20} {'-' if shown in (None, '', {}) else shown}")
