"""Commands that talk to the running system over its HTTP API: ask, ingest, jobs."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from devstack.cli.failures import CommandFailed
from devstack.cli.output import examples, print_json, print_table

if TYPE_CHECKING:
    from devstack.api import Api

_Json = Annotated[bool, typer.Option("--json", help="Print data for programs.")]
_CONTENT_TYPES = {
    ".md": "text/markdown",
    ".markdown": "text/markdown",
    ".txt": "text/plain",
    ".html": "text/html",
    ".htm": "text/html",
    ".pdf": "application/pdf",
    ".jsonl": "application/jsonl",
}


def register(app: typer.Typer) -> None:
    """Adds the commands."""
    app.command(
        epilog=examples(
            "./pressroom ask 'Which service keeps the access keys?'",
            "./pressroom ask --model smollm2-135m-instruct 'What is the capital of France?'",
        )
    )(ask)
    app.command(epilog=examples("./pressroom ingest README.md", "./pressroom ingest docs/ --collection manuals"))(
        ingest
    )
    jobs = typer.Typer(no_args_is_help=True, help="Show and cancel long jobs.", rich_markup_mode=None)
    jobs.command("list", epilog=examples("./pressroom jobs list"))(list_jobs)
    jobs.command("show", epilog=examples("./pressroom jobs show job_123 --json"))(show_job)
    jobs.command("cancel", epilog=examples("./pressroom jobs cancel job_123"))(cancel_job)
    app.add_typer(jobs, name="jobs", epilog=examples("./pressroom jobs list", "./pressroom jobs show job_123"))


def ask(
    question: Annotated[str, typer.Argument(help="What to ask.")],
    model: Annotated[str, typer.Option("--model", "-m", help="rag answers from the documents.")] = "rag",
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1, help="Longest answer.")] = 256,
    as_json: _Json = False,
) -> None:
    """Ask a question; the answer streams, its sources follow."""
    body = {"model": model, "messages": [{"role": "user", "content": question}], "max_tokens": max_tokens}
    text, last = "", {}
    for chunk in _api().chat(body):
        for choice in chunk.get("choices", []):
            piece = choice.get("delta", {}).get("content") or ""
            text += piece
            if not as_json:
                print(piece, end="", flush=True)
        if "sources" in chunk or "grounded" in chunk:
            last = {key: chunk[key] for key in ("grounded", "sources") if key in chunk}
    if as_json:
        print_json({"model": model, "text": text} | last)
        return
    print()
    for source in last.get("sources") or []:
        name = source.get("title") or source.get("external_id") or source.get("document_id")
        print(f"  [{source.get('score', 0):.3f}] {name} ({source.get('external_id') or source.get('document_id')})")
    if last.get("grounded") is False:
        print("  (nothing relevant was found in the documents)")


def ingest(
    paths: Annotated[list[Path], typer.Argument(help="Files (txt, md, html, pdf, jsonl), or folders of such.")],
    collection: Annotated[str | None, typer.Option("--collection", help="Where they go.")] = None,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Wait until they can be found.")] = True,
    as_json: _Json = False,
) -> None:
    """Ingest documents."""
    import time

    api, accepted = _api(), []
    files = [file for path in paths for file in _files_of(path)]
    if not files:
        raise CommandFailed(f"nothing to ingest; the known kinds are {', '.join(_CONTENT_TYPES)}")
    for file in files:
        fields = {"external_id": file.as_posix(), "title": file.name}
        if collection:
            fields["collection"] = collection
        kind = _CONTENT_TYPES.get(file.suffix.lower(), "application/octet-stream")
        answer = api.upload("/documents", file.name, file.read_bytes(), kind, fields)
        accepted.append({"path": str(file)} | answer)
    while wait and (running := [a for a in accepted if a.get("status") not in ("succeeded", "failed", "cancelled")]):
        for entry in running:
            job = api.get(f"/jobs/{entry['job_id']}")
            entry |= {"status": job["status"], "error": job.get("error")}
        time.sleep(0.2)
    if as_json:
        print_json(accepted)
    else:
        rows = [(a["path"], a.get("status", "accepted"), a["document_id"], a.get("error") or "") for a in accepted]
        print_table(("file", "state", "document", ""), rows)
    if any(a.get("status") in ("failed", "cancelled") for a in accepted):
        raise typer.Exit(1)


def _files_of(path: Path) -> list[Path]:
    if path.is_dir():
        return sorted(file for file in path.rglob("*") if file.is_file() and file.suffix.lower() in _CONTENT_TYPES)
    if not path.is_file():
        raise CommandFailed(f"there is no file {path}")
    return [path]


def list_jobs(as_json: _Json = False) -> None:
    """List jobs, newest first."""
    rows = items(_api().get("/jobs"))
    if as_json:
        print_json(rows)
        return
    print_table(("id", "type", "status", "progress"), [[r["id"], r["type"], r["status"], _progress(r)] for r in rows])


def show_job(job_id: Annotated[str, typer.Argument(metavar="ID")], as_json: _Json = False) -> None:
    """Show one job."""
    job = _api().get(f"/jobs/{job_id}")
    if as_json:
        print_json(job)
        return
    for key, value in job.items():
        print(f"{key:<10} {_progress(job) if key == 'progress' else value}")


def cancel_job(job_id: Annotated[str, typer.Argument(metavar="ID")]) -> None:
    """Ask a job to stop."""
    job = _api().post(f"/jobs/{job_id}/cancel", {})
    print(f"{job_id}: {job.get('status', 'asked to stop')}")


def _progress(job: dict[str, Any]) -> str:
    progress = job.get("progress") or {}
    return f"{progress.get('done', 0)}/{progress.get('total', 0)}"


def items(answer: Any) -> list[dict[str, Any]]:
    """What a list answer lists."""
    items: list[dict[str, Any]] = answer["data"] if isinstance(answer, dict) else answer
    return items


def _api(key_name: str = "PRESSROOM_API_KEY") -> "Api":
    from devstack import settings
    from devstack.api import Api
    from devstack.home import Home, read_pairs

    env = read_pairs(Home(settings.load().home).env_file)
    if "PRESSROOM_BASE_URL" not in env or key_name not in env:
        raise CommandFailed("Pressroom has not been started here yet; start it: make up")
    return Api(env["PRESSROOM_BASE_URL"], env[key_name])


def admin() -> "Api":
    """The API of the running system, with the admin's key."""
    return _api("PRESSROOM_ADMIN_KEY")
