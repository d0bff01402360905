"""Commands that run the system and look into it: up, down, status, top, logs, trace, doctor."""

import contextlib
import sys
from typing import Annotated

import typer

from devstack.cli.failures import CommandFailed
from devstack.cli.output import examples, print_json

_Json = Annotated[bool, typer.Option("--json", help="Print data for programs.")]
_Service = Annotated[str | None, typer.Argument(help="One service, such as retriever or nats. Default: all.")]


def register(app: typer.Typer) -> None:
    """Adds the commands."""
    app.command(epilog=examples("./pressroom up", "./pressroom up retriever", "PRESSROOM_PORT=0 ./pressroom up"))(up)
    app.command(epilog=examples("./pressroom down", "./pressroom down nats"))(down)
    app.command(epilog=examples("./pressroom status", "./pressroom status --json"))(status)
    app.command(epilog=examples("./pressroom top", "./pressroom top --once", "./pressroom top --json --interval 5"))(
        top
    )
    app.command(
        epilog=examples("./pressroom logs -n 50", "./pressroom logs generator -f", "./pressroom logs --request req_123")
    )(logs)
    app.command(epilog=examples("./pressroom trace 4bf92f3577b34da6a3ce929d0e0e4736", "./pressroom trace req_123"))(
        trace
    )
    app.command(epilog=examples("./pressroom doctor", "./pressroom doctor --json"))(doctor)


def up(service: _Service = None) -> None:
    """Start everything, or one service that was stopped. Harmless when it runs already."""
    from devstack import settings
    from devstack.up import up as up_all
    from devstack.up import up_one

    _check_name(service)
    told = settings.load()
    try:
        lines = [up_one(told, service)] if service else up_all(told)
    except KeyboardInterrupt:
        print("stopped" if service else "stopped; nothing is left running", file=sys.stderr)
        raise typer.Exit(130) from None
    print("\n".join(lines))


def down(service: _Service = None) -> None:
    """Stop everything that `up` started and nothing else, or one service until `up SERVICE`."""
    from devstack import settings
    from devstack.home import Home
    from devstack.up import down as down_all

    _check_name(service)
    for line in down_all(Home(settings.load().home), service):
        print(line)


def status(as_json: _Json = False) -> None:
    """Show every service: state, process, ports, memory, cores in use (over a moment), queue."""
    from devstack import settings
    from devstack import status as status_
    from devstack.home import Home

    found = status_.read(Home(settings.load().home))
    if as_json:
        print_json(found)
    else:
        print("\n".join(status_.render(found)))


def top(
    once: Annotated[bool, typer.Option("--once", help="Show one interval and end.")] = False,
    interval_s: Annotated[
        float, typer.Option("--interval", min=0.2, max=60.0, help="Seconds that the figures are taken over.")
    ] = 2.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print data for programs, a line for each interval.")] = False,
) -> None:
    """Watch the engine and all services live: tokens/s, batch, memory, step time, latencies. Ctrl-C ends it."""
    from devstack import settings
    from devstack import top as top_
    from devstack.home import Home
    from devstack.top_screen import Screen

    home = Home(settings.load().home)
    with contextlib.suppress(KeyboardInterrupt), Screen(as_json) as screen:
        before = top_.look(home)
        while True:
            view, before = top_.watch(home, before, interval_s)
            screen.show(view)
            if once:
                break


def logs(
    service: _Service = None,
    request: Annotated[str | None, typer.Option("--request", help="Only lines of one request or trace id.")] = None,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Go on with what is written from now on.")] = False,
    num_lines: Annotated[int, typer.Option("-n", "--lines", min=0, help="How many lines; with --request: all.")] = 100,
    as_json: Annotated[bool, typer.Option("--json", help="Print the lines as they are stored.")] = False,
) -> None:
    """Show logs of all services, merged by time, or of one."""
    from collections import deque

    from devstack import logfiles, settings
    from devstack.home import Home

    folder = Home(settings.load().home).logs
    paths = [folder / f"{service}.log"] if service else sorted(folder.glob("*.log"))
    if service and not paths[0].exists():
        known = ", ".join(sorted(path.stem for path in folder.glob("*.log"))) or "none yet"
        raise CommandFailed(f"there is no log of {service!r}; there are: {known}")

    def show(entries: list[logfiles.Entry]) -> None:
        for entry in entries:
            if request is None or entry.concerns(request):
                print(entry.raw if as_json else f"{entry.service:<10} {entry.text}", flush=follow)

    newest: list[logfiles.Entry] = []
    for path in paths:
        entries = (entry for entry in logfiles.read(path) if request is None or entry.concerns(request))
        newest += deque(entries, maxlen=None if request else num_lines)
    newest.sort(key=lambda entry: entry.unix_s)
    show(newest if request else newest[-num_lines:] if num_lines else [])
    if request and not newest and not follow:
        raise CommandFailed(f"no line carries {request!r}")
    if follow:
        for written in logfiles.follow(paths):
            show(written)


def trace(
    trace_or_request_id: Annotated[str, typer.Argument(metavar="ID", help="A trace id or a request id.")],
    as_json: _Json = False,
) -> None:
    """Draw one request's spans as a tree with times."""
    from dataclasses import asdict

    from devstack import settings, traces
    from devstack.home import Home

    folder = Home(settings.load().home).traces
    trace_id, spans = traces.find(folder, trace_or_request_id.strip().lower())
    if not spans:
        raise CommandFailed(f"no span of {trace_or_request_id!r} is kept under {folder}")
    if as_json:
        rows = [{k: v for k, v in asdict(span).items() if k != "children"} for span in spans]
        print_json({"trace_id": trace_id, "spans": rows})
    else:
        print("\n".join(traces.render(trace_id, spans)))


def doctor(as_json: _Json = False) -> None:
    """Check ports, memory, disk, versions, model checksums and what is left over; say how to mend. 1 on problems."""
    from dataclasses import asdict

    from devstack import doctor as doctor_
    from devstack import settings

    findings = doctor_.examine(settings.load())
    if as_json:
        print_json([asdict(finding) for finding in findings])
    else:
        for finding in findings:
            print(f"{'ok  ' if finding.ok else 'BAD '} {finding.check:<13} {finding.detail}")
            if finding.mend:
                print(f"     {'':<13} mend: {finding.mend}")
    if not all(finding.ok for finding in findings):
        raise typer.Exit(1)


def _check_name(service: str | None) -> None:
    from devstack.topology import NAMES

    if service is not None and service not in NAMES:
        raise CommandFailed(f"there is no service {service!r}; there are: {', '.join(NAMES)}")
