"""The `pressroom` command. Everything heavy is imported by the command that needs it: --help answers at once."""

import sys

import typer

from devstack.cli import access, audit, content, ledger, models, system
from devstack.cli.failures import report
from devstack.cli.output import examples

app = typer.Typer(
    name="pressroom",
    help="Runs Pressroom on this machine and talks to it.",
    epilog=examples("make up", "./pressroom ask 'Which service keeps the access keys?'", "./pressroom status"),
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
system.register(app)
content.register(app)
access.register(app)
audit.register(app)
ledger.register(app)
models.register(app)


def main() -> None:
    """Runs the command; a failure is a line or two on stderr, never a traceback."""
    try:
        app(prog_name="pressroom")
    except Exception as error:
        sys.exit(report(error))
