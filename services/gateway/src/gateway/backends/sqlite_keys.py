"""Access keys and tenants in SQLite. Implements core.keys.KeyStore."""

import sqlite3

from gateway.backends.sqlite import Database
from gateway.core.keys import KeyRow
from gateway.core.policy import policy_from_json

_SELECT = """
    SELECT key_id, tenant, secret_hmac, is_admin, requests_per_minute, created_unix_s, revoked_unix_s, allows_text,
        keys.policy_json, tenants.policy_json
    FROM keys JOIN tenants USING (tenant)
"""


class SqliteKeys:
    """Reads and writes the tables keys and tenants."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def find(self, key_id: str) -> KeyRow | None:
        """Returns the key, revoked or not."""

        def query(connection: sqlite3.Connection) -> KeyRow | None:
            row = connection.execute(_SELECT + "WHERE key_id = ?", (key_id,)).fetchone()
            return _row(row) if row else None

        return await self._database.read(query)

    async def put(self, row: KeyRow, *, tenant_allows_text: bool | None) -> None:
        """Writes the key and its tenant. A key that was revoked stays so unless its secret has changed."""

        def unit(connection: sqlite3.Connection) -> None:
            connection.execute(
                """
                INSERT INTO tenants (tenant, allows_text) VALUES (?, ?)
                ON CONFLICT (tenant) DO UPDATE SET allows_text = coalesce(?, allows_text)
                """,
                (row.tenant, bool(tenant_allows_text), tenant_allows_text),
            )
            connection.execute(
                """
                INSERT INTO keys (
                    key_id, tenant, secret_hmac, is_admin, requests_per_minute, created_unix_s, policy_json
                )
                VALUES (?, ?, ?, ?, ?, ?, ?)
                ON CONFLICT (key_id) DO UPDATE SET
                    revoked_unix_s = CASE WHEN secret_hmac = excluded.secret_hmac THEN revoked_unix_s END,
                    tenant = excluded.tenant,
                    secret_hmac = excluded.secret_hmac,
                    is_admin = excluded.is_admin,
                    requests_per_minute = excluded.requests_per_minute,
                    policy_json = excluded.policy_json
                """,
                (
                    row.key_id,
                    row.tenant,
                    row.secret_hmac,
                    row.is_admin,
                    row.requests_per_minute,
                    row.created_unix_s,
                    row.policy.to_json(),
                ),
            )

        await self._database.write(unit)

    async def all(self) -> list[KeyRow]:
        """Returns every key, oldest first."""

        def query(connection: sqlite3.Connection) -> list[KeyRow]:
            return [_row(row) for row in connection.execute(_SELECT + "ORDER BY created_unix_s, key_id")]

        return await self._database.read(query)

    async def revoke(self, key_id: str, at_unix_s: int) -> bool:
        """Marks the key as revoked; False where there is none."""

        def unit(connection: sqlite3.Connection) -> bool:
            changed = connection.execute(
                "UPDATE keys SET revoked_unix_s = coalesce(revoked_unix_s, ?) WHERE key_id = ?", (at_unix_s, key_id)
            )
            return changed.rowcount == 1

        return await self._database.write(unit)


def _row(row: tuple[object, ...]) -> KeyRow:
    key_id, tenant, secret_hmac, is_admin, rpm, created_unix_s, revoked_unix_s, allows_text, policy, of_tenant = row
    assert isinstance(secret_hmac, bytes) and isinstance(created_unix_s, int)
    assert isinstance(rpm, int | None) and isinstance(revoked_unix_s, int | None)
    return KeyRow(
        key_id=str(key_id),
        tenant=str(tenant),
        secret_hmac=secret_hmac,
        is_admin=bool(is_admin),
        requests_per_minute=rpm,
        created_unix_s=created_unix_s,
        revoked_unix_s=revoked_unix_s,
        allows_text=bool(allows_text),
        policy=policy_from_json(str(policy)),
        tenant_policy=policy_from_json(str(of_tenant)),
    )
