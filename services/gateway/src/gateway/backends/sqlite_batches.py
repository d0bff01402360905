"""Batches in SQLite. Implements core.batches.BatchStore and BatchWork."""

import json
import sqlite3
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

from gateway.backends import sqlite_finetuning, sqlite_jobs, sqlite_uploads
from gateway.backends.sqlite import Database
from gateway.backends.sqlite_outbox import SqliteOutbox
from gateway.core import batches
from gateway.core.batch_lines import Fault, Result
from gateway.core.batches import Batch, Ending
from gateway.core.jobs import Job, JobStatus, Report
from gateway.core.outbox import Message

_OWN_COLUMNS = (
    "endpoint",
    "input_upload_id",
    "expires_unix_ms",
    "metadata_json",
    "in_progress_unix_ms",
    "finalizing_unix_ms",
    "cancelling_unix_ms",
    "is_expired",
    "num_completed",
    "num_failed",
    "output_upload_id",
    "error_upload_id",
    "faults_json",
)
_SELECT = f"SELECT {sqlite_jobs.COLUMNS}, {', '.join(_OWN_COLUMNS)} FROM jobs JOIN batches USING (job_id) "


class SqliteBatches:
    """Reads and writes the tables batches and batch_results."""

    def __init__(self, database: Database, outbox: SqliteOutbox, *, now: Callable[[], float] = time.time) -> None:
        self._database = database
        self._outbox = outbox
        self._now = now

    async def submit(self, batch: Batch, message: Message) -> None:
        """Writes batch, job and message in one transaction; raises as the protocol says."""

        def unit(connection: sqlite3.Connection) -> None:
            sqlite_finetuning.order(
                connection, batch.job, message, "input_file_id", "batch", batches.MAX_UNFINISHED_JOBS
            )
            connection.execute(
                "INSERT INTO batches (job_id, endpoint, input_upload_id, expires_unix_ms, metadata_json) "
                "VALUES (?, ?, ?, ?, ?)",
                (
                    batch.job.job_id,
                    batch.endpoint,
                    batch.input_upload_id,
                    batch.expires_unix_ms,
                    json.dumps(dict(batch.metadata)),
                ),
            )

        await self._database.write(unit)
        self._outbox.notify()

    async def get(self, tenant: str, job_id: str) -> Batch | None:
        """Returns the tenant's batch."""
        return await self._database.read(lambda connection: _find(connection, tenant, job_id))

    async def newest(self, tenant: str, *, limit: int, after: str | None) -> Sequence[Batch]:
        """Returns the tenant's batches, newest first, those behind `after`."""

        def query(connection: sqlite3.Connection) -> list[Batch]:
            rows = sqlite_jobs.newest(connection, _SELECT, tenant, limit=limit, after=after)
            return [_batch(row) for row in rows]

        return await self._database.read(query)

    async def cancel(self, tenant: str, job_id: str) -> Batch | None:
        """Asks to stop the tenant's batch and returns it as it is then."""

        def unit(connection: sqlite3.Connection) -> Batch | None:
            if _find(connection, tenant, job_id) is None:
                return None
            job = sqlite_jobs.cancel(connection, tenant, job_id, self._now_ms())
            assert job is not None
            if job.cancel_requested:
                _stamp(connection, job_id, "cancelling_unix_ms", self._now_ms())
            return _find(connection, tenant, job_id)

        return await self._database.write(unit)

    async def start(self, tenant: str, job_id: str) -> Batch | None:
        """Says that the work begins, perhaps again, and returns the batch; one that has ended stays as it is."""

        def unit(connection: sqlite3.Connection) -> Batch | None:
            batch = _find(connection, tenant, job_id)
            if batch is not None:
                self._report(connection, batch.job, JobStatus.RUNNING)
            return _find(connection, tenant, job_id)

        return await self._database.write(unit)

    async def validated(self, job_id: str, num_lines: int) -> None:
        """Says that the lines are being asked."""

        def unit(connection: sqlite3.Connection) -> None:
            _stamp(connection, job_id, "in_progress_unix_ms", self._now_ms())
            batch = _of(connection, job_id)
            self._report(connection, replace(batch.job, total=num_lines), JobStatus.RUNNING)

        await self._database.write(unit)

    async def done(self, job_id: str) -> set[int]:
        """The lines that have a result."""
        return await self._database.read(
            lambda connection: {
                line for (line,) in connection.execute("SELECT line FROM batch_results WHERE job_id = ?", (job_id,))
            }
        )

    async def keep(self, job_id: str, results: Sequence[Result]) -> bool:
        """Keeps the first result of each line, for ever; False where the batch is to stop."""

        def unit(connection: sqlite3.Connection) -> bool:
            counts = {True: 0, False: 0}
            for result in results:
                counts[result.is_answered] += connection.execute(
                    "INSERT INTO batch_results VALUES (?, ?, ?, ?) ON CONFLICT DO NOTHING",
                    (job_id, result.line, result.is_answered, result.content),
                ).rowcount
            connection.execute(
                "UPDATE batches SET num_completed = num_completed + ?, num_failed = num_failed + ? WHERE job_id = ?",
                (counts[True], counts[False], job_id),
            )
            job = _of(connection, job_id).job
            if not job.status.is_final:
                self._report(connection, job, JobStatus.RUNNING)
            return not (job.cancel_requested or job.status.is_final)

        return await self._database.write(unit)

    async def results(self, job_id: str, *, is_answered: bool, after: int, limit: int) -> Sequence[Result]:
        """Results of either kind in the order of the lines, behind a line."""

        def query(connection: sqlite3.Connection) -> list[Result]:
            rows = connection.execute(
                """
                SELECT line, content FROM batch_results WHERE job_id = ? AND line > ? AND is_answered = ?
                ORDER BY line LIMIT ?
                """,
                (job_id, after, is_answered, limit),
            )
            return [Result(line, is_answered, content) for line, content in rows]

        return await self._database.read(query)

    async def finalizing(self, job_id: str) -> None:
        """Says that the files of results are being written."""
        await self._database.write(lambda connection: _stamp(connection, job_id, "finalizing_unix_ms", self._now_ms()))

    async def end(self, job_id: str, ending: Ending) -> None:
        """Ends the batch, adds its files and drops the results that are in them, in one transaction."""

        def unit(connection: sqlite3.Connection) -> None:
            job = _of(connection, job_id).job
            if job.status.is_final:  # the files belong to nobody and are swept
                return
            for upload in (ending.output, ending.errors):
                if upload is not None:
                    sqlite_uploads.insert(connection, upload)
            connection.execute(
                "UPDATE batches SET is_expired = ?, output_upload_id = ?, error_upload_id = ?, faults_json = ? "
                "WHERE job_id = ?",
                (
                    ending.is_expired,
                    ending.output.upload_id if ending.output else None,
                    ending.errors.upload_id if ending.errors else None,
                    json.dumps([asdict(fault) for fault in ending.faults]),
                    job_id,
                ),
            )
            self._report(connection, job, ending.status, ending.error)
            connection.execute("DELETE FROM batch_results WHERE job_id = ?", (job_id,))

        await self._database.write(unit)

    def _report(self, connection: sqlite3.Connection, job: Job, status: JobStatus, error: str | None = None) -> None:
        """Moves the job on, as a report over the bus would: worker and database are in one process."""
        done = _of(connection, job.job_id)
        report = Report(
            job.job_id,
            status,
            at_unix_ms=self._now_ms(),
            sequence=job.reported_sequence + 1,
            done=done.num_completed + done.num_failed,
            total=job.total,
            error=error,
        )
        sqlite_jobs.apply(connection, report, self._now_ms())

    def _now_ms(self) -> int:
        return int(self._now() * 1000)


def _find(connection: sqlite3.Connection, tenant: str, job_id: str) -> Batch | None:
    row = connection.execute(_SELECT + "WHERE job_id = ? AND tenant = ?", (job_id, tenant)).fetchone()
    return _batch(row) if row else None


def _of(connection: sqlite3.Connection, job_id: str) -> Batch:
    return _batch(connection.execute(_SELECT + "WHERE job_id = ?", (job_id,)).fetchone())


def _stamp(connection: sqlite3.Connection, job_id: str, column: str, now_ms: int) -> None:
    """Writes when something first happened."""
    connection.execute(f"UPDATE batches SET {column} = coalesce({column}, ?) WHERE job_id = ?", (now_ms, job_id))


def _batch(row: tuple[Any, ...]) -> Batch:
    own = dict(zip(_OWN_COLUMNS, row[-len(_OWN_COLUMNS) :], strict=True))
    return Batch(
        job=sqlite_jobs.job_of(row[: -len(_OWN_COLUMNS)]),
        metadata=json.loads(own.pop("metadata_json")),
        faults=tuple(Fault(**fault) for fault in json.loads(own.pop("faults_json"))),
        is_expired=bool(own.pop("is_expired")),
        **own,
    )
