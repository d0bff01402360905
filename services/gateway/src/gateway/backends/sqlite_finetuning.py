"""Finetuning jobs, evaluation jobs and the owners of tuned models in SQLite.

Implements core.finetuning.FinetuneStore and TunedModels, and core.evaluations.EvaluationStore.
"""

import json
import sqlite3
from collections.abc import Sequence
from typing import Any

from gateway.backends import sqlite_jobs, sqlite_outbox, sqlite_uploads
from gateway.backends.sqlite import Database
from gateway.backends.sqlite_outbox import SqliteOutbox
from gateway.core import evaluations, finetuning
from gateway.core.evaluations import Evaluation
from gateway.core.finetuning import Finetune, Hyperparameters, TunedModel
from gateway.core.jobs import Job, JobStatus
from gateway.core.outbox import Message
from gateway.core.uploads import file_not_found

_SELECT = f"""
    SELECT {sqlite_jobs.COLUMNS}, f.model_id, m.base, f.training_upload_id, f.suffix, f.seed, f.hyperparameters_json,
        f.metadata_json
    FROM jobs JOIN finetunes f USING (job_id) JOIN (SELECT model_id, base FROM tuned_models) m USING (model_id)
"""
_NUM_OWN_COLUMNS = 7
_SELECT_MODELS = f"""
    SELECT model_id, base, EXISTS (
        SELECT 1 FROM finetunes JOIN jobs USING (job_id)
        WHERE finetunes.model_id = tuned_models.model_id AND status = '{JobStatus.SUCCEEDED}'
    ) FROM tuned_models
"""


class SqliteFinetunes:
    """Reads and writes the tables finetunes and tuned_models."""

    def __init__(self, database: Database, outbox: SqliteOutbox) -> None:
        self._database = database
        self._outbox = outbox

    async def submit(self, finetune: Finetune, message: Message) -> None:
        """Claims the model's id and writes job and message in one transaction; raises as the protocol says."""

        def unit(connection: sqlite3.Connection) -> None:
            order(connection, finetune.job, message, "training_file", "fine-tuning", finetuning.MAX_UNFINISHED_JOBS)
            _claim(connection, finetune)
            connection.execute(
                """
                INSERT INTO finetunes (job_id, model_id, training_upload_id, suffix, seed, hyperparameters_json,
                    metadata_json) VALUES (?, ?, ?, ?, ?, ?, ?)
                """,
                (
                    finetune.job.job_id,
                    finetune.model_id,
                    finetune.training_upload_id,
                    finetune.suffix,
                    finetune.seed,
                    json.dumps(finetune.hyperparameters.given()),
                    json.dumps(dict(finetune.metadata)),
                ),
            )

        await self._database.write(unit)
        self._outbox.notify()

    async def get(self, tenant: str, job_id: str) -> Finetune | None:
        """Returns the tenant's job."""

        def query(connection: sqlite3.Connection) -> Finetune | None:
            row = connection.execute(_SELECT + "WHERE job_id = ? AND tenant = ?", (job_id, tenant)).fetchone()
            return _finetune(row) if row else None

        return await self._database.read(query)

    async def newest(self, tenant: str, *, limit: int, after: str | None) -> Sequence[Finetune]:
        """Returns the tenant's jobs, newest first, those behind `after`."""

        def query(connection: sqlite3.Connection) -> list[Finetune]:
            rows = sqlite_jobs.newest(connection, _SELECT, tenant, limit=limit, after=after)
            return [_finetune(row) for row in rows]

        return await self._database.read(query)

    async def tuned(self, tenant: str, model_id: str) -> TunedModel | None:
        """Returns the tenant's model; None where nobody or another tenant owns the id."""

        def query(connection: sqlite3.Connection) -> TunedModel | None:
            row = connection.execute(
                _SELECT_MODELS + "WHERE model_id = ? AND tenant = ?", (model_id, tenant)
            ).fetchone()
            return TunedModel(row[0], row[1], bool(row[2])) if row else None

        return await self._database.read(query)

    async def tuned_of(self, tenant: str) -> Sequence[TunedModel]:
        """Returns all ids that the tenant owns."""

        def query(connection: sqlite3.Connection) -> list[TunedModel]:
            rows = connection.execute(_SELECT_MODELS + "WHERE tenant = ? ORDER BY model_id", (tenant,))
            return [TunedModel(model_id, base, bool(published)) for model_id, base, published in rows]

        return await self._database.read(query)


class SqliteEvaluations:
    """Writes evaluation jobs into the table jobs."""

    def __init__(self, database: Database, outbox: SqliteOutbox) -> None:
        self._database = database
        self._outbox = outbox

    async def submit(self, evaluation: Evaluation, message: Message) -> None:
        """Writes job and message in one transaction; raises as the protocol says."""
        await self._database.write(
            lambda connection: order(
                connection, evaluation.job, message, "task", "evaluation", evaluations.MAX_UNFINISHED_JOBS
            )
        )
        self._outbox.notify()

    async def job(self, tenant: str, job_id: str) -> Job | None:
        """Returns the tenant's job."""

        def query(connection: sqlite3.Connection) -> Job | None:
            row = connection.execute(
                f"SELECT {sqlite_jobs.COLUMNS} FROM jobs WHERE job_id = ? AND tenant = ?", (job_id, tenant)
            ).fetchone()
            return sqlite_jobs.job_of(row) if row else None

        return await self._database.read(query)


def order(connection: sqlite3.Connection, job: Job, message: Message, file_param: str, what: str, most: int) -> None:
    """Writes a job and its message, if the file is still there and the tenant has not too many jobs.

    To be called inside a unit of work.
    """
    if job.file_id is not None and sqlite_uploads.find(connection, job.tenant, job.file_id) is None:
        raise file_not_found(job.file_id, file_param)
    if sqlite_jobs.num_unfinished(connection, job.tenant, job.type) >= most:
        raise finetuning.too_many_jobs(what, most)
    sqlite_jobs.insert(connection, job, message.message_id)
    sqlite_outbox.add(connection, message)


def _claim(connection: sqlite3.Connection, finetune: Finetune) -> None:
    connection.execute(
        """
        INSERT INTO tuned_models (model_id, tenant, base, claimed_unix_ms) VALUES (?, ?, ?, ?)
        ON CONFLICT (model_id) DO NOTHING
        """,
        (finetune.model_id, finetune.job.tenant, finetune.base, finetune.job.created_unix_ms),
    )
    (owner,) = connection.execute("SELECT tenant FROM tuned_models WHERE model_id = ?", (finetune.model_id,)).fetchone()
    if owner != finetune.job.tenant:
        raise finetuning.suffix_is_taken(finetune.model_id)


def _finetune(row: tuple[Any, ...]) -> Finetune:
    model_id, base, training_upload_id, suffix, seed, hyperparameters_json, metadata_json = row[-_NUM_OWN_COLUMNS:]
    return Finetune(
        job=sqlite_jobs.job_of(row[:-_NUM_OWN_COLUMNS]),
        base=base,
        model_id=model_id,
        training_upload_id=training_upload_id,
        suffix=suffix,
        seed=seed,
        hyperparameters=Hyperparameters(**json.loads(hyperparameters_json)),
        metadata=json.loads(metadata_json),
    )
