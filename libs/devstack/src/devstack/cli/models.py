"""Commands of the model store: models add, list, show, remove."""

import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from devstack.cli.failures import CommandFailed
from devstack.cli.output import examples, print_json, print_table
from devstack.cli.progress import progress_bar

if TYPE_CHECKING:
    from modelstore import Manifest
    from modelstore.adding import Added
    from modelstore.catalogue import Entry

_Json = Annotated[bool, typer.Option("--json", help="Print data for programs.")]
_Id = Annotated[str, typer.Argument(metavar="ID", help="The model's id; `models list` shows them.")]
_Form = Literal["int4", "int8", "bf16"]


def register(app: typer.Typer) -> None:
    """Adds the commands."""
    models = typer.Typer(
        no_args_is_help=True, help="Add models to the store; list, show and remove them.", rich_markup_mode=None
    )
    models.command(
        "add",
        epilog=examples(
            "./pressroom models add smollm2-135m-instruct --quantise int8",
            "./pressroom models add ~/models/my-llama --id my-llama",
            "./pressroom models add model.gguf --sha256 model.gguf=b179c9...",
            "./pressroom models add HuggingFaceTB/SmolLM2-360M-Instruct@main",
        ),
    )(add_model)
    models.command("list", epilog=examples("./pressroom models list", "./pressroom models list --json"))(list_models)
    models.command("show", epilog=examples("./pressroom models show smollm2-135m-instruct"))(show_model)
    models.command("remove", epilog=examples("./pressroom models remove my-llama"))(remove_model)
    app.add_typer(
        models, name="models", epilog=examples("./pressroom models list", "./pressroom models add ~/models/my-llama")
    )


def add_model(
    source: Annotated[str, typer.Argument(help="A name of the table, a folder, a GGUF file, or a hub's org/name.")],
    quantise: Annotated[_Form, typer.Option("--quantise", help="How the weights are packed beside bf16.")] = "int4",
    model_id: Annotated[str | None, typer.Option("--id", help="Its id. Default: the source's name.")] = None,
    sha256: Annotated[
        list[str] | None, typer.Option("--sha256", help="FILE=SUM, or a file of sha256sum; may be repeated.")
    ] = None,
    revision: Annotated[str, typer.Option("--revision", help="Of a hub id: branch, tag or commit.")] = "",
    with_measure: Annotated[bool, typer.Option("--measure/--no-measure", help="Measure before and after.")] = True,
    as_json: _Json = False,
) -> None:
    """Fetch, check, convert and quantise a model; say what that costs. Killed, it goes on when run again."""
    from devstack import settings
    from modelstore.adding import Order, add
    from modelstore.origins import read_pins

    hub = settings.load_hub()
    order = Order(
        source=source,
        model_id=model_id,
        forms=() if quantise == "bf16" else (quantise,),
        revision=revision,
        pins=read_pins(sha256 or []),
        endpoint=hub.endpoint,
        token=hub.token,
    )
    try:
        with progress_bar() as progress:
            added = add(_store(), order, progress)
        measured = _measured(added, quantise) if with_measure else None
    except KeyboardInterrupt:
        print("stopped; run it again: what was fetched is kept", file=sys.stderr)
        raise typer.Exit(130) from None
    if as_json:
        shown = {"id": added.manifest.id, "version": added.manifest.version, "is_new": added.is_new}
        print_json(shown | {"notes": added.notes, "measured": measured})
        return
    state = "is in the store" if added.is_new else "was in the store already, as it is"
    print(f"{added.manifest.id} {state} (version {added.manifest.version})")
    for note in added.notes:
        print(f"  {note}")
    if measured:
        _print_measured(measured)


def list_models(as_json: _Json = False) -> None:
    """List what the store holds, and what is served now: graphs and adapters among it."""
    from modelstore.catalogue import entries

    served = _served()
    rows = [_row(entry, served) for entry in entries(_store())]
    known = {row["id"] for row in rows}
    rows += [
        {"id": model_id, "kind": "graph", "version": None, "size_bytes": None, "formats": [], "served": True}
        for model_id in sorted((served or {}).keys() - known)
    ]
    if as_json:
        print_json(rows)
        return
    yes_no = {True: "yes", False: "no", None: None}
    print_table(
        ("id", "kind", "version", "size", "formats", "served"),
        [
            (
                row["id"],
                row["kind"],
                row["version"],
                None if row["size_bytes"] is None else f"{row['size_bytes'] / 1e6:.0f} MB",
                ", ".join(row["formats"]) or None,
                yes_no[row["served"]],
            )
            for row in rows
        ],
    )


def show_model(
    model_id: _Id,
    verify: Annotated[bool, typer.Option("--verify/--no-verify", help="Compare every file with its sum.")] = True,
    as_json: _Json = False,
) -> None:
    """Show a model's manifest, and whether its files are still what it says. 1 where they are not."""
    from chassis.errors import PlatformError
    from modelstore.catalogue import adapters_of, find

    entry = find(_store(), model_id)
    if entry.manifest is None:
        raise CommandFailed(f"{model_id} is damaged: {entry.problem}")
    problem = ""
    if verify:
        try:
            entry.manifest.verify()
        except PlatformError as error:
            problem = error.message
    if as_json:
        verdict = (not problem) if verify else None
        print_json(_document(entry.manifest) | {"verified": verdict, "problem": problem or None})
    else:
        _print_manifest(entry.manifest, adapters_of(_store(), model_id))
        print("sums      " + (problem or "hold" if verify else "not checked"))
    if problem:
        raise typer.Exit(1)


def remove_model(
    model_id: _Id,
    force: Annotated[bool, typer.Option("--force", help="Even if it is served, or adapters stand on it.")] = False,
) -> None:
    """Remove a model from the store."""
    from devstack import topology
    from modelstore.catalogue import remove

    if not force and (reason := _use_of(model_id)):
        raise CommandFailed(f"{model_id} {reason}; stop it first (make down), or --force")
    remove(_store(), model_id, force=force)
    again = "; the next make up makes it again" if model_id in topology.MODELS else ""
    print(f"{model_id} is removed{again}")


def _use_of(model_id: str) -> str:
    """Says how the running system uses a model; empty where it does not."""
    from devstack import lifecycle, settings, topology
    from devstack.home import Home

    if not lifecycle.is_running(Home(settings.load().home)):
        return ""
    served = _served()
    if served is None:
        return "may be in use: the system runs and does not say what it serves"
    return "is served now" if model_id in served or model_id in topology.MODELS else ""


def _served() -> dict[str, str] | None:
    """Returns who owns each id that can be asked now; None where nothing runs, or it does not say."""
    from devstack import lifecycle, settings, topology
    from devstack.api import Api, ApiError
    from devstack.home import Home, read_pairs

    home = Home(settings.load().home)
    env = read_pairs(home.env_file)
    if "PRESSROOM_BASE_URL" not in env or not lifecycle.is_running(home):
        return None
    try:
        answer = Api(env["PRESSROOM_BASE_URL"], env["PRESSROOM_API_KEY"]).get("/models")
    except ApiError:
        return None
    # The encoder serves other services, and no request names it.
    return dict.fromkeys(topology.MODELS, "pressroom") | {row["id"]: row.get("owned_by") for row in answer["data"]}


def _row(entry: "Entry", served: dict[str, str] | None) -> dict[str, Any]:
    from modelstore.formats import formats_of

    manifest = entry.manifest
    return {
        "id": entry.id,
        "kind": manifest.kind if manifest else "damaged",
        "version": manifest.version if manifest else None,
        "size_bytes": entry.size_bytes,
        "formats": formats_of(manifest) if manifest else [],
        "served": None if served is None else entry.id in served,
    }


def _document(manifest: "Manifest") -> dict[str, Any]:
    return {
        "id": manifest.id,
        "kind": manifest.kind,
        "version": manifest.version,
        "created_unix_s": manifest.created_unix_s,
        "source": dict(manifest.source),
        "config": dict(manifest.config),
        "files": [{"path": f.path, "sha256": f.sha256, "size_bytes": f.size_bytes} for f in manifest.files],
    }


def _print_manifest(manifest: "Manifest", adapters: list[str]) -> None:
    made = datetime.fromtimestamp(manifest.created_unix_s, UTC)
    print(f"{manifest.id} ({manifest.kind})")
    print(f"version   {manifest.version}, of {made:%Y-%m-%d}")
    for title, fields in (("source", manifest.source), ("config", manifest.config)):
        for key, value in fields.items():
            if key != "files":
                print(f"{title:<9} {key}: {value}")
    for file in manifest.files:
        print(f"file      {file.path:<26} {file.size_bytes:>13,} bytes  {file.sha256}")
    for adapter in adapters:
        print(f"adapter   {adapter}")


def _measured(added: "Added", quantise: str) -> dict[str, Any] | None:
    """Measures bf16 in the torch engine and the packed form in the native one; None for what has no text."""
    if added.manifest.kind != "llm":
        return None
    from devstack.measures import MeasureFailed, measure
    from modelstore.formats import size_bytes_of

    measured: dict[str, Any] = {}
    forms = (("before", "torch", "bf16"), ("after", "native", quantise))
    for title, engine, form in forms[: 1 if quantise == "bf16" else 2]:
        print(f"measuring {form} in the {engine} engine", file=sys.stderr)
        try:
            found = measure(added.manifest.root, engine, form)
        except MeasureFailed as error:
            return measured | {"failed": str(error)}
        measured[title] = found | {"size_bytes": size_bytes_of(added.manifest, form)}
    return measured


def _print_measured(measured: dict[str, Any]) -> None:
    from devstack.measures import rows

    before, after = measured.get("before"), measured.get("after")
    if before:
        head = ("", f"before ({before['weights']}, {before['engine']})")
        if after:
            print_table((*head, f"after ({after['weights']}, {after['engine']})", ""), rows(before, after))
        else:
            print_table(head, [row[:2] for row in rows(before, before)])
        print(f"perplexity over {before['tokens']} tokens of {before['text']}; speeds as this machine has them now")
    if why := measured.get("failed"):
        print(f"not measured: {why}")


def _store() -> Path:
    from devstack import settings
    from devstack.home import Home

    return Home(settings.load().home).models
