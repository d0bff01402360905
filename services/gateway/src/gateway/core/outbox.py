"""Messages that are written in a database transaction and published afterwards.

Knows nothing of the database or of the bus.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Message:
    """What is to be published. The message id stays the same however often it is published."""

    subject: str
    message_id: str
    payload: bytes = field(repr=False)
    traceparent: str = ""
    request_id: str = ""


@dataclass(frozen=True, slots=True)
class Pending:
    """A message in the outbox; ids grow in the order of writing."""

    id: int
    message: Message


class Outbox(Protocol):
    """What the relay needs of the outbox."""

    def notify(self) -> None:
        """Says that there is something to publish."""
        ...

    async def wait(self, timeout_s: float) -> None:
        """Returns when something was written since the last call, or after timeout_s."""
        ...

    async def unpublished(self, limit: int) -> Sequence[Pending]:
        """The oldest ones that were neither published nor set aside."""
        ...

    async def settle(self, published: Sequence[int], refused: Sequence[tuple[int, str]]) -> None:
        """Marks what the bus has, and sets aside, with the reason, what it will never take."""
        ...

    async def prune(self, older_than_s: float) -> int:
        """Deletes what was published longer ago; returns how many."""
        ...
