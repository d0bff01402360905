"""Commands of the audit log, over the HTTP API: audit list, verify."""

from typing import Annotated

import typer

from devstack.cli.content import admin, items
from devstack.cli.output import examples, moment, print_json, print_table

_Json = Annotated[bool, typer.Option("--json", help="Print data for programs.")]


def register(app: typer.Typer) -> None:
    """Adds the commands."""
    audit = typer.Typer(
        no_args_is_help=True, help="Show and verify what administrators changed.", rich_markup_mode=None
    )
    audit.command("list", epilog=examples("./pressroom audit list --subject acme -n 20"))(list_audit)
    audit.command("verify", epilog=examples("./pressroom audit verify --anchor 120:9f86d08188..."))(verify_audit)
    app.add_typer(audit, name="audit", epilog=examples("./pressroom audit list", "./pressroom audit verify"))


def list_audit(
    actor: Annotated[str | None, typer.Option("--actor", help="Only changes that this key ordered.")] = None,
    action: Annotated[str | None, typer.Option("--action", help="Only this action, such as key.created.")] = None,
    subject: Annotated[str | None, typer.Option("--subject", help="Only changes of this key or tenant.")] = None,
    num_rows: Annotated[int, typer.Option("-n", "--rows", min=1, max=1000, help="How many.")] = 50,
    as_json: _Json = False,
) -> None:
    """List changes, newest first."""
    wanted = {"actor": actor, "action": action, "subject": subject, "limit": num_rows}
    rows = items(admin().get("/admin/audit", {name: value for name, value in wanted.items() if value is not None}))
    if as_json:
        print_json(rows)
        return
    print_table(
        ("number", "at", "actor", "action", "subject"),
        [
            (row["sequence"], moment(row["at_unix_ms"] / 1000), row["actor"], row["action"], row["subject"])
            for row in rows
        ],
    )


def verify_audit(
    anchor: Annotated[
        str | None, typer.Option("--anchor", help="What an earlier verify said: finds what was cut off since.")
    ] = None,
    as_json: _Json = False,
) -> None:
    """Walk the audit log's chain of hashes; 1 where it is broken. Keep the anchor that it prints elsewhere."""
    found = admin().get("/admin/audit/verify", {"anchor": anchor} if anchor else None)
    if as_json:
        print_json(found)
    elif found["ok"]:
        print(f"the log is whole\nanchor {found['anchor']}")
    else:
        print(f"BROKEN at row {found['broken_at']}: {found['problem']}\nwhole up to {found['anchor']}")
    if not found["ok"]:
        raise typer.Exit(1)
