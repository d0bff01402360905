"""Commands of administrators, over the HTTP API: keys and tenants."""

import time
from typing import Annotated, Any

import typer

from devstack.cli.content import admin, items
from devstack.cli.output import day, examples, print_json, print_table
from devstack.cli.policies import (
    Budget,
    BudgetPeriod,
    Caches,
    Concurrency,
    Expires,
    Models,
    Priority,
    Scopes,
    TokensPerMinute,
    policy_body,
    seconds_of,
    show,
    unix_s_of,
)

_Json = Annotated[bool, typer.Option("--json", help="Print data for programs.")]
_KeyId = Annotated[str, typer.Argument(metavar="ID", help="The key's id; `keys list` shows them.")]
_Tenant = Annotated[str, typer.Argument(metavar="TENANT", help="Its name.")]
_Rpm = Annotated[int | None, typer.Option("--rpm", min=1, help="Requests a minute. Default: no limit.")]
_Name = Annotated[str | None, typer.Option("--name", help="What it is called.")]


def register(app: typer.Typer) -> None:
    """Adds the commands."""
    keys = typer.Typer(
        no_args_is_help=True, help="Create, list, change, rotate and revoke access keys.", rich_markup_mode=None
    )
    keys.command(
        "create",
        epilog=examples(
            "./pressroom keys create --rpm 60 --tenant acme",
            "./pressroom keys create --models 'rag,smollm2-135m-instruct:*' --scopes inference --expires 30d",
            "./pressroom keys create --tokens-per-minute 10000 --budget 12.50 --budget-period month",
        ),
    )(create_key)
    keys.command("list", epilog=examples("./pressroom keys list --json"))(list_keys)
    keys.command("show", epilog=examples("./pressroom keys show 1f0c9a2b3d4e5f60"))(show_key)
    keys.command(
        "change", epilog=examples("./pressroom keys change 1f0c9a2b3d4e5f60 --rpm 10 --models all --budget none")
    )(change_key)
    keys.command("rotate", epilog=examples("./pressroom keys rotate 1f0c9a2b3d4e5f60 --overlap 1h"))(rotate_key)
    keys.command("revoke", epilog=examples("./pressroom keys revoke 1f0c9a2b3d4e5f60"))(revoke_key)
    app.add_typer(
        keys, name="keys", epilog=examples("./pressroom keys create --rpm 60 --json", "./pressroom keys list")
    )
    tenants = typer.Typer(no_args_is_help=True, help="List, set, disable and enable tenants.", rich_markup_mode=None)
    tenants.command("list", epilog=examples("./pressroom tenants list --json"))(list_tenants)
    tenants.command("show", epilog=examples("./pressroom tenants show acme"))(show_tenant)
    tenants.command(
        "set",
        epilog=examples("./pressroom tenants set acme --budget 100 --budget-period month --tokens-per-minute 50000"),
    )(set_tenant)
    tenants.command("disable", epilog=examples("./pressroom tenants disable acme"))(disable_tenant)
    tenants.command("enable", epilog=examples("./pressroom tenants enable acme"))(enable_tenant)
    app.add_typer(tenants, name="tenants", epilog=examples("./pressroom tenants list", "./pressroom tenants set acme"))


def create_key(
    rpm: _Rpm = None,
    tenant: Annotated[str, typer.Option("--tenant", help="Whose key it is.")] = "default",
    is_admin: Annotated[bool, typer.Option("--admin", help="It may use the routes under /admin.")] = False,
    name: _Name = None,
    expires: Expires = None,
    scopes: Scopes = None,
    models: Models = None,
    tokens_per_minute: TokensPerMinute = None,
    concurrency: Concurrency = None,
    budget: Budget = None,
    budget_period: BudgetPeriod = "total",
    priority: Priority = None,
    caches: Caches = None,
    as_json: _Json = False,
) -> None:
    """Create a key. It is shown once and never again."""
    body = {"tenant": tenant} | _key_body(rpm, name, expires)
    if is_admin:
        body["is_admin"] = True
    if policy := policy_body(scopes, models, tokens_per_minute, concurrency, budget, budget_period, priority, caches):
        body["policy"] = policy
    created = admin().post("/admin/keys", body)
    if as_json:
        print_json({"id": created["id"], "key": created["key"]})
    else:
        print(created["key"])


def list_keys(as_json: _Json = False) -> None:
    """List keys, without their secrets."""
    rows = items(admin().get("/admin/keys"))
    if as_json:
        print_json(rows)
        return
    print_table(
        ("id", "name", "tenant", "rpm", "admin", "expires", "state"),
        [
            (
                row["id"],
                row["name"] or None,
                row["tenant"],
                row["rpm"],
                "yes" if row["is_admin"] else "no",
                day(row["expires_at"]),
                _state(row),
            )
            for row in rows
        ],
    )


def show_key(key_id: _KeyId, as_json: _Json = False) -> None:
    """Show one key: all but its secret."""
    show(admin().get(f"/admin/keys/{key_id}"), as_json)


def change_key(
    key_id: _KeyId,
    rpm: _Rpm = None,
    name: _Name = None,
    expires: Expires = None,
    scopes: Scopes = None,
    models: Models = None,
    tokens_per_minute: TokensPerMinute = None,
    concurrency: Concurrency = None,
    budget: Budget = None,
    budget_period: BudgetPeriod = "total",
    priority: Priority = None,
    caches: Caches = None,
    as_json: _Json = False,
) -> None:
    """Change what is named, and leave the rest. Limits are replaced together."""
    body = _key_body(rpm, name, expires)
    if policy := policy_body(scopes, models, tokens_per_minute, concurrency, budget, budget_period, priority, caches):
        body["policy"] = policy
    show(admin().patch(f"/admin/keys/{key_id}", body), as_json)


def rotate_key(
    key_id: _KeyId,
    overlap: Annotated[str, typer.Option("--overlap", help="How long the old secret still works: 0s, 1h, 7d.")] = "24h",
    as_json: _Json = False,
) -> None:
    """Give a key a new secret. It is shown once; the old one works on for a while."""
    rotated = admin().post(f"/admin/keys/{key_id}/rotate", {"overlap_s": seconds_of(overlap, "--overlap")})
    if as_json:
        print_json(rotated)
    else:
        print(rotated["key"])


def revoke_key(key_id: _KeyId) -> None:
    """Revoke a key for good."""
    admin().delete(f"/admin/keys/{key_id}")
    print(f"{key_id} is revoked")


def list_tenants(as_json: _Json = False) -> None:
    """List tenants."""
    rows = items(admin().get("/admin/tenants"))
    if as_json:
        print_json(rows)
        return
    yes_no = {True: "yes", False: "no"}
    print_table(
        ("tenant", "disabled", "text profiled"),
        [(row["tenant"], yes_no[row["disabled"]], yes_no[row["allows_text"]]) for row in rows],
    )


def show_tenant(tenant: _Tenant, as_json: _Json = False) -> None:
    """Show one tenant."""
    show(admin().get(f"/admin/tenants/{tenant}"), as_json)


def set_tenant(
    tenant: _Tenant,
    allows_text: Annotated[
        bool | None, typer.Option("--allow-text/--no-text", help="Its prompts and completions may be profiled.")
    ] = None,
    scopes: Scopes = None,
    models: Models = None,
    tokens_per_minute: TokensPerMinute = None,
    concurrency: Concurrency = None,
    budget: Budget = None,
    budget_period: BudgetPeriod = "total",
    priority: Priority = None,
    weight: Annotated[
        float | None, typer.Option("--weight", help="Its share of a busy model beside other tenants'; 1 is one part.")
    ] = None,
    caches: Caches = None,
    as_json: _Json = False,
) -> None:
    """Make a tenant, or change what is named of one. Limits are replaced together."""
    from devstack.api import ApiError

    body: dict[str, Any] = {} if allows_text is None else {"allows_text": allows_text}
    policy = policy_body(scopes, models, tokens_per_minute, concurrency, budget, budget_period, priority, caches)
    policy |= {} if weight is None else {"weight": weight}
    if policy:
        body["policy"] = policy
    api = admin()
    try:
        row = api.patch(f"/admin/tenants/{tenant}", body)
    except ApiError as error:
        if error.status != 404:
            raise
        row = api.put(f"/admin/tenants/{tenant}", body)
    show(row, as_json)


def disable_tenant(tenant: _Tenant) -> None:
    """Refuse all of a tenant's keys and tokens."""
    admin().patch(f"/admin/tenants/{tenant}", {"disabled": True})
    print(f"{tenant} is disabled")


def enable_tenant(tenant: _Tenant) -> None:
    """Take a tenant's keys and tokens again."""
    admin().patch(f"/admin/tenants/{tenant}", {"disabled": False})
    print(f"{tenant} is enabled")


def _key_body(rpm: int | None, name: str | None, expires: str | None) -> dict[str, Any]:
    said = {"rpm": rpm, "name": name, "expires_at": unix_s_of(expires) if expires else None}
    return {key: value for key, value in said.items() if value is not None}


def _state(row: dict[str, Any]) -> str:
    if row["revoked_at"] is not None:
        return "revoked"
    return "expired" if row["expires_at"] is not None and row["expires_at"] <= time.time() else "valid"
