"""Access keys and tenants in SQLite. Implements core.keys.KeyStore and core.administration.AccessBook."""

import json
import sqlite3
from collections.abc import Callable
from functools import lru_cache

from gateway.backends import sqlite_audit
from gateway.backends.sqlite import Database
from gateway.core.administration import KeyRevision, TenantRevision
from gateway.core.audit import Change
from gateway.core.keys import KeyRow, TenantRow
from gateway.core.policy import policy_from_json

_SELECT_KEY = """
    SELECT key_id, tenant, secret_hmac, is_admin, requests_per_minute, created_unix_s, revoked_unix_s, allows_text,
        keys.policy_json, tenants.policy_json, disabled_unix_s, name, metadata_json, expires_unix_s, former_hmac,
        former_until_unix_s
    FROM keys JOIN tenants USING (tenant)
"""
_SELECT_TENANT = "SELECT tenant, allows_text, policy_json, disabled_unix_s FROM tenants "
_NOBODY = ("", "", b"", 0, None, 0, None, 0, "{}", "{}", None, "", "{}", None, None, None)
# Most keys have one of a few policies, and all are read again every second.
_policy = lru_cache(maxsize=4096)(policy_from_json)


class SqliteKeys:
    """Reads and writes the tables keys and tenants."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def find(self, key_id: str) -> KeyRow | None:
        """Returns the key, revoked or not."""
        return await self._database.read(lambda connection: _find_key(connection, key_id))

    async def tenant(self, tenant: str) -> TenantRow | None:
        """Returns the tenant, disabled or not."""
        return await self._database.read(lambda connection: _find_tenant(connection, tenant))

    async def keys(self) -> list[KeyRow]:
        """Returns every key, oldest first."""

        def query(connection: sqlite3.Connection) -> list[KeyRow]:
            return [_key(row) for row in connection.execute(_SELECT_KEY + "ORDER BY created_unix_s, key_id")]

        return await self._database.read(query)

    async def tenants(self) -> list[TenantRow]:
        """Returns every tenant, by name."""

        def query(connection: sqlite3.Connection) -> list[TenantRow]:
            return [_tenant(row) for row in connection.execute(_SELECT_TENANT + "ORDER BY tenant")]

        return await self._database.read(query)

    async def revise_key(self, key_id: str, revise: Callable[[KeyRow | None], KeyRevision]) -> KeyRow:
        """Gives the key, or None, to `revise` and writes what it returns, in one transaction with the audit log."""

        def unit(connection: sqlite3.Connection) -> KeyRow:
            row, change = revise(_find_key(connection, key_id))
            if change is not None:
                if _find_tenant(connection, row.tenant) is None:
                    _put_tenant(connection, TenantRow(row.tenant, row.allows_text))
                    made = {"allows_text": row.allows_text, "for_key": key_id}
                    sqlite_audit.append(connection, Change(change.actor, "tenant.created", row.tenant, made))
                _put_key(connection, row)
                sqlite_audit.append(connection, change)
            return row

        return await self._database.write(unit)

    async def revise_tenant(self, tenant: str, revise: Callable[[TenantRow | None], TenantRevision]) -> TenantRow:
        """The same for a tenant."""

        def unit(connection: sqlite3.Connection) -> TenantRow:
            row, change = revise(_find_tenant(connection, tenant))
            if change is not None:
                _put_tenant(connection, row)
                sqlite_audit.append(connection, change)
            return row

        return await self._database.write(unit)


def _find_key(connection: sqlite3.Connection, key_id: str) -> KeyRow | None:
    row = connection.execute(_SELECT_KEY + "WHERE key_id = ?", (key_id,)).fetchone()
    found = _key(row or _NOBODY)  # time is not to tell whether there is a key of that id
    return found if row else None


def _find_tenant(connection: sqlite3.Connection, tenant: str) -> TenantRow | None:
    row = connection.execute(_SELECT_TENANT + "WHERE tenant = ?", (tenant,)).fetchone()
    return _tenant(row) if row else None


def _put_key(connection: sqlite3.Connection, row: KeyRow) -> None:
    connection.execute(
        """
        INSERT INTO keys (
            key_id, tenant, secret_hmac, is_admin, requests_per_minute, created_unix_s, revoked_unix_s, policy_json,
            name, metadata_json, expires_unix_s, former_hmac, former_until_unix_s
        )
        VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
        ON CONFLICT (key_id) DO UPDATE SET
            tenant = excluded.tenant,
            secret_hmac = excluded.secret_hmac,
            is_admin = excluded.is_admin,
            requests_per_minute = excluded.requests_per_minute,
            revoked_unix_s = excluded.revoked_unix_s,
            policy_json = excluded.policy_json,
            name = excluded.name,
            metadata_json = excluded.metadata_json,
            expires_unix_s = excluded.expires_unix_s,
            former_hmac = excluded.former_hmac,
            former_until_unix_s = excluded.former_until_unix_s
        """,
        (
            row.key_id,
            row.tenant,
            row.secret_hmac,
            row.is_admin,
            row.requests_per_minute,
            row.created_unix_s,
            row.revoked_unix_s,
            row.policy.to_json(),
            row.name,
            json.dumps(row.metadata),
            row.expires_unix_s,
            row.former_hmac,
            row.former_until_unix_s,
        ),
    )


def _put_tenant(connection: sqlite3.Connection, row: TenantRow) -> None:
    connection.execute(
        """
        INSERT INTO tenants (tenant, allows_text, policy_json, disabled_unix_s) VALUES (?, ?, ?, ?)
        ON CONFLICT (tenant) DO UPDATE SET
            allows_text = excluded.allows_text,
            policy_json = excluded.policy_json,
            disabled_unix_s = excluded.disabled_unix_s
        """,
        (row.tenant, row.allows_text, row.policy.to_json(), row.disabled_unix_s),
    )


def _key(row: tuple[object, ...]) -> KeyRow:
    key_id, tenant, secret_hmac, is_admin, rpm, created_unix_s, revoked_unix_s, allows_text, policy, of_tenant = row[
        :10
    ]
    disabled_unix_s, name, metadata, expires_unix_s, former_hmac, former_until_unix_s = row[10:]
    assert isinstance(secret_hmac, bytes) and isinstance(created_unix_s, int)
    assert isinstance(rpm, int | None) and isinstance(revoked_unix_s, int | None)
    assert isinstance(expires_unix_s, int | None) and isinstance(former_until_unix_s, int | None)
    assert isinstance(former_hmac, bytes | None)
    return KeyRow(
        key_id=str(key_id),
        tenant=str(tenant),
        secret_hmac=secret_hmac,
        is_admin=bool(is_admin),
        requests_per_minute=rpm,
        created_unix_s=created_unix_s,
        revoked_unix_s=revoked_unix_s,
        allows_text=bool(allows_text),
        policy=_policy(str(policy)),
        tenant_policy=_policy(str(of_tenant)),
        is_tenant_disabled=disabled_unix_s is not None,
        name=str(name),
        metadata=json.loads(str(metadata)),
        expires_unix_s=expires_unix_s,
        former_hmac=former_hmac,
        former_until_unix_s=former_until_unix_s,
    )


def _tenant(row: tuple[object, ...]) -> TenantRow:
    tenant, allows_text, policy, disabled_unix_s = row
    assert isinstance(disabled_unix_s, int | None)
    return TenantRow(str(tenant), bool(allows_text), _policy(str(policy)), disabled_unix_s)
