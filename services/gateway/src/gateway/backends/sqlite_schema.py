"""The tables of gateway.db, as ordered migrations: one that was released is never changed, only followed.

Times are Unix milliseconds (`_unix_ms`) or seconds (`_unix_s`). The ledger's rows have no foreign keys: they outlive
what they speak of.
"""

MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (
        """
        CREATE TABLE tenants (
            tenant TEXT PRIMARY KEY,
            allows_text INTEGER NOT NULL DEFAULT 0
        ) STRICT
        """,
        """
        CREATE TABLE keys (
            key_id TEXT PRIMARY KEY,
            tenant TEXT NOT NULL REFERENCES tenants (tenant),
            secret_hmac BLOB NOT NULL,
            is_admin INTEGER NOT NULL,
            requests_per_minute INTEGER,
            created_unix_s INTEGER NOT NULL,
            revoked_unix_s INTEGER
        ) STRICT
        """,
        """
        CREATE TABLE usage (
            id INTEGER PRIMARY KEY,
            request_id TEXT NOT NULL,
            trace_id TEXT NOT NULL,
            tenant TEXT NOT NULL,
            key_id TEXT NOT NULL,
            model TEXT NOT NULL,
            route TEXT NOT NULL,
            prompt_tokens INTEGER NOT NULL,
            completion_tokens INTEGER NOT NULL,
            cached_tokens INTEGER NOT NULL,
            finish_reason TEXT NOT NULL,
            http_status INTEGER NOT NULL,
            stream INTEGER NOT NULL,
            started_unix_ms INTEGER NOT NULL,
            duration_s REAL NOT NULL,
            ttft_s REAL NOT NULL,
            error_code TEXT NOT NULL
        ) STRICT
        """,
        # Kept beside the rows in the same transaction: the report must not read a million of them.
        """
        CREATE TABLE usage_totals (
            tenant TEXT NOT NULL,
            key_id TEXT NOT NULL,
            model TEXT NOT NULL,
            num_requests INTEGER NOT NULL,
            num_errors INTEGER NOT NULL,
            prompt_tokens INTEGER NOT NULL,
            completion_tokens INTEGER NOT NULL,
            cached_tokens INTEGER NOT NULL,
            PRIMARY KEY (tenant, key_id, model)
        ) STRICT, WITHOUT ROWID
        """,
        # AUTOINCREMENT: an id is never given twice, so the order of ids is the order of writing even after pruning.
        """
        CREATE TABLE outbox (
            id INTEGER PRIMARY KEY AUTOINCREMENT,
            subject TEXT NOT NULL,
            message_id TEXT NOT NULL UNIQUE,
            payload BLOB NOT NULL,
            traceparent TEXT NOT NULL,
            request_id TEXT NOT NULL,
            created_unix_ms INTEGER NOT NULL,
            published_unix_ms INTEGER,
            refused TEXT
        ) STRICT
        """,
        "CREATE INDEX outbox_waiting ON outbox (id) WHERE published_unix_ms IS NULL AND refused IS NULL",
        "CREATE INDEX outbox_published ON outbox (published_unix_ms) WHERE published_unix_ms IS NOT NULL",
        """
        CREATE TABLE files (
            file_id TEXT PRIMARY KEY,
            tenant TEXT NOT NULL,
            sha256 TEXT NOT NULL,
            size_bytes INTEGER NOT NULL,
            content_type TEXT NOT NULL,
            filename TEXT NOT NULL,
            created_unix_ms INTEGER NOT NULL
        ) STRICT
        """,
        """
        CREATE TABLE jobs (
            seq INTEGER PRIMARY KEY AUTOINCREMENT,
            job_id TEXT NOT NULL UNIQUE,
            tenant TEXT NOT NULL,
            type TEXT NOT NULL,
            status TEXT NOT NULL,
            done INTEGER NOT NULL,
            total INTEGER NOT NULL,
            error TEXT,
            result_json TEXT,
            cancel_requested INTEGER NOT NULL,
            document_id TEXT,
            file_id TEXT,
            message_id TEXT,
            reported_unix_ms INTEGER NOT NULL,
            reported_sequence INTEGER NOT NULL,
            created_unix_ms INTEGER NOT NULL
        ) STRICT
        """,
        "CREATE INDEX jobs_of_tenant ON jobs (tenant, seq)",
        "CREATE INDEX jobs_of_document ON jobs (document_id, seq) WHERE document_id IS NOT NULL",
        "CREATE INDEX jobs_of_file ON jobs (file_id) WHERE file_id IS NOT NULL",
        """
        CREATE TABLE documents (
            seq INTEGER PRIMARY KEY AUTOINCREMENT,
            document_id TEXT NOT NULL UNIQUE,
            tenant TEXT NOT NULL,
            external_id TEXT NOT NULL,
            title TEXT NOT NULL,
            collection TEXT NOT NULL,
            content_type TEXT NOT NULL,
            filename TEXT NOT NULL,
            metadata_json TEXT NOT NULL,
            size_bytes INTEGER NOT NULL,
            job_id TEXT NOT NULL REFERENCES jobs (job_id),
            file_id TEXT NOT NULL REFERENCES files (file_id),
            created_unix_ms INTEGER NOT NULL
        ) STRICT
        """,
        "CREATE INDEX documents_of_tenant ON documents (tenant, seq)",
        "CREATE INDEX documents_of_file ON documents (file_id)",
    ),
    (
        "ALTER TABLE jobs ADD COLUMN key_id TEXT NOT NULL DEFAULT ''",
        "ALTER TABLE jobs ADD COLUMN started_unix_ms INTEGER",
        "ALTER TABLE jobs ADD COLUMN finished_unix_ms INTEGER",
        # Files that stay until their tenant deletes them; those in `files` go with their document and job. upload_id is
        # what clients and workers name (and jobs.file_id holds), file_id the name on disk.
        """
        CREATE TABLE uploads (
            seq INTEGER PRIMARY KEY AUTOINCREMENT,
            upload_id TEXT NOT NULL UNIQUE,
            file_id TEXT NOT NULL UNIQUE,
            tenant TEXT NOT NULL,
            purpose TEXT NOT NULL,
            filename TEXT NOT NULL,
            content_type TEXT NOT NULL,
            sha256 TEXT NOT NULL,
            size_bytes INTEGER NOT NULL,
            created_unix_ms INTEGER NOT NULL
        ) STRICT
        """,
        "CREATE INDEX uploads_of_tenant ON uploads (tenant, seq)",
        # An id belongs to the tenant that first claimed it, for ever: a name that once answered one tenant's requests
        # must never answer with another's model.
        """
        CREATE TABLE tuned_models (
            model_id TEXT PRIMARY KEY,
            tenant TEXT NOT NULL,
            base TEXT NOT NULL,
            claimed_unix_ms INTEGER NOT NULL
        ) STRICT, WITHOUT ROWID
        """,
        "CREATE INDEX tuned_models_of_tenant ON tuned_models (tenant)",
        """
        CREATE TABLE finetunes (
            job_id TEXT PRIMARY KEY REFERENCES jobs (job_id),
            model_id TEXT NOT NULL REFERENCES tuned_models (model_id),
            training_upload_id TEXT NOT NULL,
            suffix TEXT NOT NULL,
            seed INTEGER NOT NULL,
            hyperparameters_json TEXT NOT NULL,
            metadata_json TEXT NOT NULL
        ) STRICT, WITHOUT ROWID
        """,
        "CREATE INDEX finetunes_of_model ON finetunes (model_id)",
        "CREATE INDEX jobs_unfinished ON jobs (tenant, type) WHERE status IN ('queued', 'running')",
    ),
    (
        # What they may do and how much, as core.policy writes it.
        "ALTER TABLE keys ADD COLUMN policy_json TEXT NOT NULL DEFAULT '{}'",
        "ALTER TABLE tenants ADD COLUMN policy_json TEXT NOT NULL DEFAULT '{}'",
        # Repeats: answered from the cache, another's run or a stored answer; what they would have used else.
        "ALTER TABLE usage ADD COLUMN repeat TEXT NOT NULL DEFAULT ''",
        "ALTER TABLE usage ADD COLUMN repeated_prompt_tokens INTEGER NOT NULL DEFAULT 0",
        "ALTER TABLE usage ADD COLUMN repeated_completion_tokens INTEGER NOT NULL DEFAULT 0",
        # slot is a keyed hash of tenant, key id and Idempotency-Key; answer is sealed, see sqlite_idempotency.
        """
        CREATE TABLE idempotency (
            slot BLOB PRIMARY KEY,
            tenant TEXT NOT NULL,
            state TEXT NOT NULL,
            claim TEXT NOT NULL,
            fingerprint BLOB,
            answer BLOB,
            claimed_unix_ms INTEGER NOT NULL
        ) STRICT
        """,
        "CREATE INDEX idempotency_of_tenant ON idempotency (tenant)",
        "CREATE INDEX idempotency_by_age ON idempotency (claimed_unix_ms)",
        "CREATE INDEX idempotency_running ON idempotency (state) WHERE state = 'running'",
        # Batches.
        """
        CREATE TABLE batches (
            job_id TEXT PRIMARY KEY REFERENCES jobs (job_id),
            endpoint TEXT NOT NULL,
            input_upload_id TEXT NOT NULL,
            expires_unix_ms INTEGER NOT NULL,
            metadata_json TEXT NOT NULL,
            in_progress_unix_ms INTEGER,
            finalizing_unix_ms INTEGER,
            cancelling_unix_ms INTEGER,
            is_expired INTEGER NOT NULL DEFAULT 0,
            num_completed INTEGER NOT NULL DEFAULT 0,
            num_failed INTEGER NOT NULL DEFAULT 0,
            output_upload_id TEXT,
            error_upload_id TEXT,
            faults_json TEXT NOT NULL DEFAULT '[]'
        ) STRICT, WITHOUT ROWID
        """,
        # Results until they are in the batch's files; the key holds each line to one result.
        """
        CREATE TABLE batch_results (
            job_id TEXT NOT NULL,
            line INTEGER NOT NULL,
            is_answered INTEGER NOT NULL,
            content BLOB NOT NULL,
            PRIMARY KEY (job_id, line)
        ) STRICT
        """,
        # The ledger: what is under way and what it may cost, what everything cost, and what it will.
        """
        CREATE TABLE open_usage (
            usage_id TEXT PRIMARY KEY,
            opened_by TEXT NOT NULL,
            request_id TEXT NOT NULL,
            trace_id TEXT NOT NULL,
            traceparent TEXT NOT NULL,
            tenant TEXT NOT NULL,
            key_id TEXT NOT NULL,
            model TEXT NOT NULL,
            route TEXT NOT NULL,
            started_unix_ms INTEGER NOT NULL,
            key_reserved_micros INTEGER NOT NULL,
            tenant_reserved_micros INTEGER NOT NULL
        ) STRICT, WITHOUT ROWID
        """,
        "CREATE INDEX open_usage_of_key ON open_usage (key_id, key_reserved_micros) WHERE key_reserved_micros > 0",
        "CREATE INDEX open_usage_of_tenant ON open_usage (tenant, tenant_reserved_micros) "
        "WHERE tenant_reserved_micros > 0",
        "ALTER TABLE usage ADD COLUMN usage_id TEXT NOT NULL DEFAULT ''",
        "ALTER TABLE usage ADD COLUMN cost_micros INTEGER NOT NULL DEFAULT 0",
        "ALTER TABLE usage ADD COLUMN is_exact INTEGER NOT NULL DEFAULT 1",
        "CREATE UNIQUE INDEX usage_once ON usage (usage_id) WHERE usage_id <> ''",
        "CREATE INDEX usage_by_time ON usage (started_unix_ms)",
        "ALTER TABLE usage_totals ADD COLUMN cost_micros INTEGER NOT NULL DEFAULT 0",
        # Days since 1970 in UTC, by when the request came.
        """
        CREATE TABLE usage_days (
            day INTEGER NOT NULL,
            tenant TEXT NOT NULL,
            key_id TEXT NOT NULL,
            model TEXT NOT NULL,
            num_requests INTEGER NOT NULL,
            num_errors INTEGER NOT NULL,
            prompt_tokens INTEGER NOT NULL,
            completion_tokens INTEGER NOT NULL,
            cached_tokens INTEGER NOT NULL,
            cost_micros INTEGER NOT NULL,
            PRIMARY KEY (day, tenant, key_id, model)
        ) STRICT, WITHOUT ROWID
        """,
        "CREATE INDEX usage_days_of_tenant ON usage_days (tenant, day)",
        "CREATE INDEX usage_days_of_key ON usage_days (key_id, day)",
        """
        INSERT INTO usage_days
        SELECT started_unix_ms / 86400000, tenant, key_id, model, count(*), sum(error_code <> ''), sum(prompt_tokens),
            sum(completion_tokens), sum(cached_tokens), 0
        FROM usage GROUP BY 1, 2, 3, 4
        """,
        # What a key or a tenant (owner, see core.money) spent in a day: what budgets are judged by.
        """
        CREATE TABLE spent_days (
            owner TEXT NOT NULL,
            day INTEGER NOT NULL,
            cost_micros INTEGER NOT NULL,
            PRIMARY KEY (owner, day)
        ) STRICT, WITHOUT ROWID
        """,
        # Micros for a million tokens. A price that has begun is never changed.
        """
        CREATE TABLE prices (
            model TEXT NOT NULL,
            effective_unix_ms INTEGER NOT NULL,
            input_micros INTEGER NOT NULL,
            cached_input_micros INTEGER NOT NULL,
            output_micros INTEGER NOT NULL,
            PRIMARY KEY (model, effective_unix_ms)
        ) STRICT, WITHOUT ROWID
        """,
        # Keys and tenants: what a key is called, until when it holds, and its former secret while a rotation overlaps.
        "ALTER TABLE keys ADD COLUMN name TEXT NOT NULL DEFAULT ''",
        "ALTER TABLE keys ADD COLUMN metadata_json TEXT NOT NULL DEFAULT '{}'",
        "ALTER TABLE keys ADD COLUMN expires_unix_s INTEGER",
        "ALTER TABLE keys ADD COLUMN former_hmac BLOB",
        "ALTER TABLE keys ADD COLUMN former_until_unix_s INTEGER",
        "ALTER TABLE tenants ADD COLUMN disabled_unix_s INTEGER",
        # The audit log, see core.audit. It is only ever appended to; REPLACE fires no trigger of DELETE, so an INSERT
        # is held to the next number.
        """
        CREATE TABLE audit (
            sequence INTEGER PRIMARY KEY,
            at_unix_ms INTEGER NOT NULL,
            actor TEXT NOT NULL,
            action TEXT NOT NULL,
            subject TEXT NOT NULL,
            details_json TEXT NOT NULL,
            previous_hash TEXT NOT NULL,
            hash TEXT NOT NULL
        ) STRICT
        """,
        """
        CREATE TRIGGER audit_is_in_order BEFORE INSERT ON audit
        WHEN NEW.sequence IS NOT (SELECT coalesce(max(sequence), 0) + 1 FROM audit)
        BEGIN SELECT RAISE(ABORT, 'the audit log is append-only'); END
        """,
        """
        CREATE TRIGGER audit_is_not_changed BEFORE UPDATE ON audit
        BEGIN SELECT RAISE(ABORT, 'the audit log is append-only'); END
        """,
        """
        CREATE TRIGGER audit_is_not_cut BEFORE DELETE ON audit
        BEGIN SELECT RAISE(ABORT, 'the audit log is append-only'); END
        """,
        # The limits that hold for all tenants together.
        "CREATE TABLE platform_limits (id INTEGER PRIMARY KEY CHECK (id = 1), limits_json TEXT NOT NULL) STRICT",
    ),
)
