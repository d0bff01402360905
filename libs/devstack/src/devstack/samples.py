"""The sample collection of a fresh system: ingests samples/*.md once, and again what has changed."""

import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path

from devstack.api import Api, ApiError
from devstack.home import read_json, write_private
from devstack.settings import CHECKOUT

_JOBS_TIMEOUT_S = 240.0
_POLL_S = 0.25
_MAX_ATTEMPTS = 5


def ingest_samples(api: Api, memory: Path, progress: Callable[[str], None], folder: Path = CHECKOUT / "samples") -> str:
    """Ingests what the system does not hold as it is; returns a summary. Raises ApiError.

    memory: a file of ours with what was ingested. A document that the system no longer knows is ingested again.
    """
    remembered = read_json(memory)
    files = sorted(folder.glob("*.md"))
    jobs: dict[str, Path] = {}
    for number, file in enumerate(files, 1):
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        known = remembered.get(file.name, {})
        if known.get("sha256") == digest and _holds(api, known.get("document_id", "")):
            continue
        progress(f"sending {number} of {len(files)}")
        accepted = _send(api, file)
        jobs[accepted["job_id"]] = file
        remembered[file.name] = {"sha256": digest, "document_id": accepted["document_id"]}
    _wait(api, jobs, progress)
    write_private(memory, json.dumps(remembered))
    return f"{len(files)} documents, {len(jobs)} of them new" if jobs else f"{len(files)} documents, all there"


def title_of(text: str, fallback: str) -> str:
    """Returns a Markdown text's first heading."""
    headings = (line.lstrip("# ").strip() for line in text.splitlines() if line.startswith("#"))
    return next(headings, "") or fallback


def _holds(api: Api, document_id: str) -> bool:
    if not document_id:
        return False
    try:
        return int(api.get(f"/documents/{document_id}").get("num_chunks") or 0) > 0
    except ApiError as error:
        if error.status == 404:
            return False
        raise


def _send(api: Api, file: Path) -> dict[str, str]:
    text = file.read_text()
    document = {
        "text": text,
        "title": title_of(text, file.stem),
        "content_type": "text/markdown",
        "external_id": f"samples/{file.name}",
    }
    for attempt in range(1, _MAX_ATTEMPTS + 1):
        try:
            accepted: dict[str, str] = api.post("/documents", document)
            return accepted
        except ApiError as error:
            if error.status not in (429, 503) or attempt == _MAX_ATTEMPTS:
                raise
            time.sleep(attempt)
    raise AssertionError("unreachable")


def _wait(api: Api, jobs: dict[str, Path], progress: Callable[[str], None]) -> None:
    deadline = time.monotonic() + _JOBS_TIMEOUT_S
    open_jobs = dict(jobs)
    while open_jobs:
        for job_id, file in list(open_jobs.items()):
            job = api.get(f"/jobs/{job_id}")
            if job["status"] in ("failed", "cancelled"):
                raise ApiError(f"{file.name}: the job {job['status']}: {job.get('error') or 'no reason given'}")
            if job["status"] == "succeeded":
                del open_jobs[job_id]
        progress(f"indexed {len(jobs) - len(open_jobs)} of {len(jobs)}")
        if open_jobs and time.monotonic() > deadline:
            raise ApiError(f"{len(open_jobs)} of {len(jobs)} documents were not indexed in {_JOBS_TIMEOUT_S:.0f} s")
        time.sleep(_POLL_S if open_jobs else 0)
