"""Jobs in SQLite. Implements core.jobs.JobStore; what a report does to a job is decided in core.jobs."""

import json
import sqlite3
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from gateway.backends import sqlite_outbox
from gateway.backends.sqlite import Database
from gateway.core import jobs
from gateway.core.jobs import Applied, Job, JobStatus, Report

COLUMNS = """
    job_id, tenant, type, created_unix_ms, status, done, total, error, result_json, cancel_requested, document_id,
    file_id, reported_unix_ms, reported_sequence, key_id, started_unix_ms, finished_unix_ms
"""
_UNFINISHED = f"('{JobStatus.QUEUED}', '{JobStatus.RUNNING}')"


class SqliteJobs:
    """Reads and writes the table jobs."""

    def __init__(self, database: Database, *, now: Callable[[], float] = time.time) -> None:
        self._database = database
        self._now = now

    async def get(self, tenant: str, job_id: str) -> Job | None:
        """Returns the tenant's job."""
        job = await self._database.read(lambda connection: _find(connection, job_id))
        return job if job is not None and job.tenant == tenant else None

    async def newest(self, tenant: str, *, limit: int, after: str | None) -> Sequence[Job]:
        """Returns the tenant's jobs, newest first, those behind `after`."""

        def query(connection: sqlite3.Connection) -> list[Job]:
            rows = connection.execute(
                f"""
                SELECT {COLUMNS} FROM jobs WHERE tenant = :tenant
                    AND (:after IS NULL OR seq < (SELECT seq FROM jobs WHERE job_id = :after AND tenant = :tenant))
                ORDER BY seq DESC LIMIT :limit
                """,
                {"tenant": tenant, "after": after, "limit": limit},
            )
            return [job_of(row) for row in rows]

        return await self._database.read(query)

    async def apply(self, report: Report) -> Applied:
        """Applies a report; an unknown job is ignored."""
        return await self._database.write(lambda connection: apply(connection, report, self._now_ms()))

    async def cancel(self, tenant: str, job_id: str) -> Job | None:
        """Asks to stop the tenant's job and returns it; what was not yet published of it never is."""

        return await self._database.write(lambda connection: cancel(connection, tenant, job_id, self._now_ms()))

    def _now_ms(self) -> int:
        return int(self._now() * 1000)


def newest(
    connection: sqlite3.Connection, select: str, tenant: str, *, limit: int, after: str | None
) -> sqlite3.Cursor:
    """What `select` reads of the tenant's jobs, newest first, those behind the job `after`."""
    return connection.execute(
        select
        + """
        WHERE tenant = :tenant
            AND (:after IS NULL OR seq < (SELECT seq FROM jobs WHERE job_id = :after AND tenant = :tenant))
        ORDER BY seq DESC LIMIT :limit
        """,
        {"tenant": tenant, "after": after, "limit": limit},
    )


def insert(connection: sqlite3.Connection, job: Job, message_id: str) -> None:
    """Adds a job; to be called inside a unit of work, together with its message."""
    connection.execute(
        f"""
        INSERT INTO jobs ({COLUMNS}, message_id) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
        """,
        (
            job.job_id,
            job.tenant,
            job.type,
            job.created_unix_ms,
            job.status,
            job.done,
            job.total,
            job.error,
            _dumped(job),
            job.cancel_requested,
            job.document_id,
            job.file_id,
            job.reported_unix_ms,
            job.reported_sequence,
            job.key_id,
            job.started_unix_ms,
            job.finished_unix_ms,
            message_id,
        ),
    )


def unneeded_files(connection: sqlite3.Connection, file_ids: Iterable[str | None]) -> list[str]:
    """Deletes the rows of those files that no document and no unfinished job needs; returns their ids."""
    freed = []
    for file_id in file_ids:
        deleted = connection.execute(
            f"""
            DELETE FROM files WHERE file_id = :file_id
                AND NOT EXISTS (SELECT 1 FROM documents WHERE file_id = :file_id)
                AND NOT EXISTS (SELECT 1 FROM jobs WHERE file_id = :file_id AND status IN {_UNFINISHED})
            """,
            {"file_id": file_id},
        )
        if file_id is not None and deleted.rowcount == 1:
            freed.append(file_id)
    return freed


def has_unfinished(connection: sqlite3.Connection, file_id: str) -> bool:
    """Says whether a job that has not ended reads the file."""
    row = connection.execute(f"SELECT 1 FROM jobs WHERE file_id = ? AND status IN {_UNFINISHED} LIMIT 1", (file_id,))
    return row.fetchone() is not None


def num_unfinished(connection: sqlite3.Connection, tenant: str, type_: str) -> int:
    """Counts the tenant's jobs of a type that have not ended."""
    (count,) = connection.execute(
        f"SELECT count(*) FROM jobs WHERE tenant = ? AND type = ? AND status IN {_UNFINISHED}", (tenant, type_)
    ).fetchone()
    return int(count)


def cancel(connection: sqlite3.Connection, tenant: str, job_id: str, now_ms: int) -> Job | None:
    """Asks to stop the tenant's job, and withdraws its message where it has ended by that."""
    job = _find(connection, job_id)
    if job is None or job.tenant != tenant:
        return None
    changed = jobs.stamped(job, jobs.cancelled(job), now_ms)
    if changed is not job:
        _update(connection, changed)
    if changed.status is JobStatus.CANCELLED:
        (message_id,) = connection.execute("SELECT message_id FROM jobs WHERE job_id = ?", (job_id,)).fetchone()
        sqlite_outbox.withdraw(connection, message_id or "")
    return changed


def apply(connection: sqlite3.Connection, report: Report, now_ms: int) -> Applied:
    """Applies a report; an unknown job is ignored."""
    job = _find(connection, report.job_id)
    if job is None:
        return Applied()
    changed = jobs.stamped(job, jobs.advanced(job, report), now_ms)
    if changed is not job:
        _update(connection, changed)
    # A worker that reports on a job that was asked to stop has not heard it: the call may have been lost.
    stop = [job.job_id] if job.cancel_requested and not report.status.is_final else []
    freed: list[str] = []
    if changed is not job and changed.status.is_final:
        superseded = _supersede(connection, changed, now_ms) if changed.status is JobStatus.SUCCEEDED else []
        stop += [old.job_id for old in superseded]
        freed = unneeded_files(connection, [changed.file_id, *(old.file_id for old in superseded)])
    return Applied(must_stop=stop, freed_files=freed)


def _supersede(connection: sqlite3.Connection, job: Job, now_ms: int) -> list[Job]:
    """Cancels the older unfinished jobs of the same document: a late attempt would put old content back."""
    rows = connection.execute(
        f"""
        SELECT {COLUMNS} FROM jobs WHERE document_id = :document_id AND status IN {_UNFINISHED}
            AND seq < (SELECT seq FROM jobs WHERE job_id = :job_id)
        """,
        {"document_id": job.document_id, "job_id": job.job_id},
    ).fetchall()
    superseded = [job_of(row) for row in rows]
    for old in superseded:
        connection.execute(
            "UPDATE jobs SET status = ?, error = ?, cancel_requested = 1, finished_unix_ms = ? WHERE job_id = ?",
            (JobStatus.CANCELLED, f"superseded by {job.job_id}", now_ms, old.job_id),
        )
    return superseded


def _find(connection: sqlite3.Connection, job_id: str) -> Job | None:
    row = connection.execute(f"SELECT {COLUMNS} FROM jobs WHERE job_id = ?", (job_id,)).fetchone()
    return job_of(row) if row else None


def _update(connection: sqlite3.Connection, job: Job) -> None:
    connection.execute(
        """
        UPDATE jobs SET status = ?, done = ?, total = ?, error = ?, result_json = ?, cancel_requested = ?,
            reported_unix_ms = ?, reported_sequence = ?, started_unix_ms = ?, finished_unix_ms = ? WHERE job_id = ?
        """,
        (
            job.status,
            job.done,
            job.total,
            job.error,
            _dumped(job),
            job.cancel_requested,
            job.reported_unix_ms,
            job.reported_sequence,
            job.started_unix_ms,
            job.finished_unix_ms,
            job.job_id,
        ),
    )


def _dumped(job: Job) -> str | None:
    return json.dumps(dict(job.result)) if job.result is not None else None


def job_of(row: tuple[Any, ...]) -> Job:
    (job_id, tenant, type_, created, status, done, total, error, result_json, cancel_requested, *rest) = row
    document_id, file_id, reported_unix_ms, reported_sequence, key_id, started_unix_ms, finished_unix_ms = rest
    return Job(
        job_id=job_id,
        tenant=tenant,
        type=type_,
        created_unix_ms=created,
        status=JobStatus(status),
        done=done,
        total=total,
        error=error,
        result=json.loads(result_json) if result_json is not None else None,
        cancel_requested=bool(cancel_requested),
        document_id=document_id,
        file_id=file_id,
        reported_unix_ms=reported_unix_ms,
        reported_sequence=reported_sequence,
        key_id=key_id,
        started_unix_ms=started_unix_ms,
        finished_unix_ms=finished_unix_ms,
    )
