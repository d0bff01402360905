"""The audit log: who changed what, as a chain of hashes that shows where somebody changed it afterwards.

Every row's hash covers the row and the hash before it. Whoever can write the file can compute a new chain, so a chain
proves something only against an anchor (the number and hash of a row) that was kept elsewhere. Knows nothing of where
the rows are kept.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from chassis.errors import Code, PlatformError

GENESIS = "0" * 64  # stands before the first row
CONFIGURATION = "configuration"  # the actor of what the settings say at the start
_ANCHOR = re.compile(r"(\d{1,18}):([0-9a-f]{64})")


@dataclass(frozen=True, slots=True)
class Change:
    """One change, to be written in the transaction that makes it. No secrets among the details."""

    actor: str  # id of the key that ordered it
    action: str  # "key.created", "tenant.changed"
    subject: str  # what was changed: the id of a key, a tenant
    details: Mapping[str, object]


@dataclass(frozen=True, slots=True)
class AuditRow:
    """A change as it is stored."""

    sequence: int
    at_unix_ms: int
    actor: str
    action: str
    subject: str
    details_json: str
    previous_hash: str
    hash: str

    @property
    def anchor(self) -> "Anchor":
        """What to keep elsewhere to prove that everything up to this row is as it was."""
        return Anchor(self.sequence, self.hash)


def link(change: Change, at_unix_ms: int, before: "Anchor") -> AuditRow:
    """Makes the row that follows."""
    details = json.dumps(change.details, sort_keys=True, ensure_ascii=False)
    sequence = before.sequence + 1
    told = (sequence, at_unix_ms, change.actor, change.action, change.subject, details, before.hash)
    return AuditRow(*told, hash=_digest(*told))


def _digest(*told: int | str) -> str:
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Anchor:
    """A row's number and hash."""

    sequence: int
    hash: str

    def __str__(self) -> str:
        return f"{self.sequence}:{self.hash}"


START = Anchor(0, GENESIS)


def read_anchor(text: str) -> Anchor:
    """Reads what str() of an anchor gives; raises INVALID_ARGUMENT."""
    parts = _ANCHOR.fullmatch(text)
    if parts is None:
        raise PlatformError(Code.INVALID_ARGUMENT, "an anchor is <number>:<64 hexadecimal digits>", param="anchor")
    return Anchor(int(parts[1]), parts[2])


class Chain:
    """Checks rows in their order. broken_at is the number of the first that is not as it was written."""

    def __init__(self, anchor: Anchor = START) -> None:
        self.head = START
        self.broken_at: int | None = None
        self.problem = ""
        self._anchor = anchor

    def take(self, row: AuditRow) -> None:
        """Checks the next row; what follows a break is not judged."""
        if self.broken_at is not None:
            return
        told = (row.sequence, row.at_unix_ms, row.actor, row.action, row.subject, row.details_json, row.previous_hash)
        if row.sequence != self.head.sequence + 1:
            self._break(self.head.sequence + 1, "the row is missing")
        elif row.previous_hash != self.head.hash:
            self._break(row.sequence, "the row does not follow the one before it")
        elif row.hash != _digest(*told):
            self._break(row.sequence, "the row was changed")
        elif row.sequence == self._anchor.sequence and row.hash != self._anchor.hash:
            self._break(row.sequence, "the row is not the anchor's: the chain was written anew")
        else:
            self.head = row.anchor

    def end(self) -> None:
        """There are no more rows."""
        if self.broken_at is None and self.head.sequence < self._anchor.sequence:
            self._break(self.head.sequence + 1, "the row is missing: the anchor knows more rows than there are")

    def _break(self, sequence: int, problem: str) -> None:
        self.broken_at, self.problem = sequence, problem


@dataclass(frozen=True, slots=True)
class AuditFilter:
    """Which rows are wanted; None means all."""

    actor: str | None = None
    action: str | None = None
    subject: str | None = None


class AuditLog(Protocol):
    """Reads the log."""

    async def newest(self, wanted: AuditFilter, *, limit: int, before: int | None) -> list[AuditRow]:
        """Returns rows, newest first; with `before` those with smaller numbers."""
        ...

    async def verify(self, anchor: Anchor) -> Chain:
        """Walks the whole chain."""
        ...
