"""Claims and answers of Idempotency-Keys in SQLite. Implements core.idempotency.IdempotencyStore.

One process writes the database: what a claim of a former one had begun, nobody works on any more. Answers are sealed
with what only the sender of the key knows together with our pepper, since some hold secrets (POST /admin/keys).
"""

import asyncio
import json
import logging
import secrets
import sqlite3
import time
import uuid
from collections.abc import Callable

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from chassis.errors import Code, PlatformError
from gateway.backends.sqlite import Database
from gateway.core.idempotency import (
    KEPT_S,
    MAX_ANSWER_BYTES,
    MAX_KEYS,
    Answer,
    Claim,
    Kept,
    Slot,
    is_in_progress,
    is_reused,
    too_many_keys,
)

_log = logging.getLogger(__name__)

_NONCE_BYTES = 12
_MAX_PRUNED = 2_000  # rows deleted in one transaction, so that pruning holds up no other writer
_PRUNE_EVERY_S = 300.0
_RUNNING, _OPEN, _DONE = "running", "open", "done"


class SqliteIdempotency:
    """Reads and writes the table idempotency. Made by open()."""

    def __init__(self, database: Database, *, max_keys: int = MAX_KEYS, now: Callable[[], float] = time.time) -> None:
        self._database = database
        self._max_keys = max_keys
        self._now = now

    async def open(self) -> None:
        """Lets go of what a former process was working on; to be called before anything is claimed."""
        await self._database.write(
            lambda connection: (
                connection.execute("UPDATE idempotency SET state = ? WHERE state = ?", (_OPEN, _RUNNING)).rowcount
            )
        )

    async def claim(self, slot: Slot, fingerprint: bytes | None) -> Claim | Kept:
        """Claims the slot, atomically, or returns what is kept there; raises as the protocol says."""

        def unit(connection: sqlite3.Connection) -> Claim | tuple[bytes, bytes]:
            now_ms = int(self._now() * 1000)
            row = connection.execute(
                "SELECT state, fingerprint, claim, answer FROM idempotency WHERE slot = ? AND claimed_unix_ms > ?",
                (slot.id, now_ms - int(KEPT_S * 1000)),
            ).fetchone()
            if row is None:
                return self._insert(connection, slot, fingerprint, now_ms)
            state, known, claim, sealed = row
            if None not in (known, fingerprint) and known != fingerprint:
                raise is_reused()
            if state == _RUNNING:
                raise is_in_progress()
            if state == _DONE:
                return known, sealed
            connection.execute(
                "UPDATE idempotency SET state = ?, fingerprint = coalesce(?, fingerprint) WHERE slot = ?",
                (_RUNNING, fingerprint, slot.id),
            )
            return Claim(slot, claim, is_second=True)

        found = await self._database.write(unit)
        return found if isinstance(found, Claim) else Kept(found[0], _unsealed(slot, found[1]))

    async def keep(self, claim: Claim, fingerprint: bytes, answer: Answer) -> None:
        """The work is done."""
        sealed = _sealed(claim.slot, answer)
        await self._database.write(
            lambda connection: (
                connection.execute(
                    "UPDATE idempotency SET state = ?, fingerprint = ?, answer = ? WHERE slot = ? AND claim = ?",
                    (_DONE, fingerprint, sealed, claim.slot.id, claim.id),
                ).rowcount
            )
        )

    async def release(self, claim: Claim, *, has_done_nothing: bool) -> None:
        """The work was not done."""
        statement = (
            "DELETE FROM idempotency WHERE slot = :slot AND claim = :claim"
            if has_done_nothing and not claim.is_second
            else "UPDATE idempotency SET state = :state WHERE slot = :slot AND claim = :claim"
        )
        arguments = {"slot": claim.slot.id, "claim": claim.id, "state": _OPEN}
        await self._database.write(lambda connection: connection.execute(statement, arguments).rowcount)

    async def prune_forever(self) -> None:
        """Prunes every few minutes."""
        while True:
            try:
                while await self.prune() == _MAX_PRUNED:
                    pass
            except PlatformError as error:
                _log.warning("idempotency keys were not pruned", extra={"error": repr(error)})
            await asyncio.sleep(_PRUNE_EVERY_S)

    async def prune(self) -> int:
        """Deletes what is older than a day; returns how many, at most a few thousand in one call."""
        return await self._database.write(
            lambda connection: (
                connection.execute(
                    """
                DELETE FROM idempotency WHERE rowid IN (
                    SELECT rowid FROM idempotency WHERE claimed_unix_ms <= ? AND state != ? LIMIT ?
                )
                """,
                    (int((self._now() - KEPT_S) * 1000), _RUNNING, _MAX_PRUNED),
                ).rowcount
            )
        )

    def _insert(self, connection: sqlite3.Connection, slot: Slot, fingerprint: bytes | None, now_ms: int) -> Claim:
        (num_keys,) = connection.execute("SELECT count(*) FROM idempotency WHERE tenant = ?", (slot.tenant,)).fetchone()
        if num_keys >= self._max_keys:
            raise too_many_keys()
        claim = Claim(slot, uuid.uuid4().hex, is_second=False)
        connection.execute(
            """
            INSERT OR REPLACE INTO idempotency (slot, tenant, state, claim, fingerprint, claimed_unix_ms)
            VALUES (?, ?, ?, ?, ?, ?)
            """,
            (slot.id, slot.tenant, _RUNNING, claim.id, fingerprint, now_ms),
        )
        return claim


def _sealed(slot: Slot, answer: Answer) -> bytes:
    body = answer.body if answer.body is not None and len(answer.body) <= MAX_ANSWER_BYTES else None
    head = json.dumps([answer.status, answer.content_type, body is not None]).encode()
    nonce = secrets.token_bytes(_NONCE_BYTES)
    return nonce + AESGCM(slot.secret).encrypt(nonce, head + b"\n" + (body or b""), slot.id)


def _unsealed(slot: Slot, sealed: bytes) -> Answer:
    try:
        plain = AESGCM(slot.secret).decrypt(sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:], slot.id)
    except InvalidTag:
        raise PlatformError(Code.DATA_LOSS, "the answer that was kept is damaged") from None
    head, _, body = plain.partition(b"\n")
    status, content_type, is_kept = json.loads(head)
    return Answer(status, content_type, body if is_kept else None)
