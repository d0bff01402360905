"""Commands of the ledger, over the HTTP API: usage, prices."""

from decimal import Decimal, InvalidOperation
from typing import Annotated, Any

import typer

from devstack.cli.content import admin, items
from devstack.cli.failures import CommandFailed
from devstack.cli.output import examples, moment, print_json, print_table
from devstack.cli.policies import unix_s_of

_Json = Annotated[bool, typer.Option("--json", help="Print data for programs.")]
_PRICES = ("input", "cached_input", "output")


def register(app: typer.Typer) -> None:
    """Adds the commands."""
    app.command(
        epilog=examples(
            "./pressroom usage",
            "./pressroom usage --by day,model --from 2026-11-01",
            "./pressroom usage --by key --tenant acme --json",
        )
    )(usage)
    prices = typer.Typer(no_args_is_help=True, help="List and set what tokens cost.", rich_markup_mode=None)
    prices.command("list", epilog=examples("./pressroom prices list --json"))(list_prices)
    prices.command(
        "set",
        epilog=examples(
            "./pressroom prices set smollm2-135m-instruct --input 0.15 --output 0.60",
            "./pressroom prices set rag --input 0.30 --cached-input 0.03 --output 1.20 --begins 2027-01-01",
        ),
    )(set_price)
    app.add_typer(prices, name="prices", epilog=examples("./pressroom prices list"))


def usage(
    by: Annotated[str, typer.Option("--by", help="Sums by tenant, key, model, day: one or more, by commas.")] = "",
    tenant: Annotated[str | None, typer.Option("--tenant", help="Of this tenant only.")] = None,
    key: Annotated[str | None, typer.Option("--key", help="Of this key's id only.")] = None,
    model: Annotated[str | None, typer.Option("--model", help="Of this model only.")] = None,
    first: Annotated[str | None, typer.Option("--from", help="First day, such as 2026-11-01 (UTC).")] = None,
    last: Annotated[str | None, typer.Option("--to", help="Last day.")] = None,
    as_json: _Json = False,
) -> None:
    """Show what was used and what it cost. Default: by tenant, key and model, since the beginning."""
    wanted = {"group_by": by, "tenant": tenant, "key": key, "model": model, "from": first, "to": last}
    rows = items(admin().get("/admin/usage", {name: value for name, value in wanted.items() if value}))
    if as_json:
        print_json(rows)
        return
    if not rows:
        print("nothing was used")
        return
    names = [name for name in rows[0] if name != "cost_micros"]
    heads = [name.removeprefix("num_").removesuffix("_id").replace("_", " ") for name in names]
    print_table([*heads, "cost"], [[*(row[name] for name in names), _money(row["cost_micros"])] for row in rows])


def list_prices(as_json: _Json = False) -> None:
    """List prices, those to come included."""
    rows = items(admin().get("/admin/prices"))
    if as_json:
        print_json(rows)
        return
    print_table(
        ("model", "from", "input/1M", "cached/1M", "output/1M"),
        [
            [row["model"], moment(row["effective_from"]), *(_money(row[f"{price}_micros"]) for price in _PRICES)]
            for row in rows
        ],
    )


def set_price(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model's id; what is tuned from it costs the same.")],
    input_rate: Annotated[str, typer.Option("--input", help="Money for a million tokens of prompts, such as 0.15.")],
    output_rate: Annotated[str, typer.Option("--output", help="The same for completions.")],
    cached_rate: Annotated[
        str | None, typer.Option("--cached-input", help="For prompts found in the cache. Default: as --input.")
    ] = None,
    begins: Annotated[
        str | None, typer.Option("--begins", help="A day (UTC), or 12h, 30d from now. Default: now.")
    ] = None,
    as_json: _Json = False,
) -> None:
    """Set a model's price from a moment on. What was used before keeps its cost."""
    body: dict[str, Any] = {
        "model": model,
        "input_micros": _micros(input_rate, "--input"),
        "output_micros": _micros(output_rate, "--output"),
    }
    if cached_rate is not None:
        body["cached_input_micros"] = _micros(cached_rate, "--cached-input")
    if begins is not None:
        body["effective_from"] = unix_s_of(begins, "--begins")
    row = admin().put("/admin/prices", body)
    if as_json:
        print_json(row)
    else:
        print(f"{row['model']} from {moment(row['effective_from'])}")


def _micros(text: str, option: str) -> int:
    try:
        micros = Decimal(text) * 1_000_000
    except InvalidOperation:
        raise CommandFailed(f"{option}: {text!r} is no amount of money; write 0.15") from None
    if not micros.is_finite() or micros < 0 or micros != int(micros):
        raise CommandFailed(f"{option}: {text!r} must be 0 or more, with six decimal places at most")
    return int(micros)


def _money(micros: int) -> str:
    return f"{Decimal(micros) / 1_000_000:.6f}"
