"""The bus: facts and jobs that are stored, control messages that are not.

Delivery is at least once: a publisher waits for the server's ack and names each message for dedupe, a consumer acks
after its handler returned and is idempotent. What no handler can take goes to `pressroom.dead.<subject>`. The bus on a
real server is in nats_bus.
"""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

DEAD_PREFIX = "pressroom.dead."
MESSAGE_ID = "Nats-Msg-Id"
REQUEST_ID = "Pressroom-Request-Id"


class Stream(Protocol):
    """What is asked of a stream: "limits" keeps messages for `max_age_s`, "workqueue" until they are acked."""

    @property
    def name(self) -> str: ...
    @property
    def subjects(self) -> tuple[str, ...]: ...
    @property
    def retention(self) -> Literal["limits", "workqueue"]: ...
    @property
    def max_age_s(self) -> float: ...
    @property
    def max_bytes(self) -> int: ...


@dataclass(frozen=True, slots=True)
class StreamSpec:
    """A stream as plain data, for whoever has no table of their own."""

    name: str
    subjects: tuple[str, ...]
    retention: Literal["limits", "workqueue"]
    max_age_s: float
    max_bytes: int


@dataclass(frozen=True, slots=True)
class Received:
    """One delivered message; `num_delivered` counts from 1."""

    subject: str
    payload: bytes
    message_id: str
    num_delivered: int
    headers: Mapping[str, str]


Handler = Callable[[Received], Awaitable[None]]


class Bus(Protocol):
    """What services need of the bus."""

    @property
    def connected(self) -> bool:
        """A server is connected right now."""
        ...

    @property
    def backlog(self) -> int:
        """Messages that the consumers of this process have still to handle, those in hand included; seconds old."""
        ...

    async def publish(
        self, subject: str, payload: bytes, *, message_id: str, traceparent: str | None = None, timeout_s: float = 5.0
    ) -> None:
        """Stores a message; returns when the server has it. Raises PlatformError(UNAVAILABLE)."""
        ...

    async def consume(
        self,
        subject: str,
        *,
        durable: str,
        handler: Handler,
        max_deliver: int = 5,
        ack_wait_s: float = 30.0,
        concurrency: int = 1,
        backoff_s: Sequence[float] = (1.0, 5.0, 15.0),
        deliver_new_only: bool = False,
    ) -> None:
        """Hands messages to a handler until cancelled; outlives every absence of the server.

        The handler returns: ack. It raises PlatformError(retryable=False): dead letter. It raises anything else: again
        after the back-off, and a dead letter after `max_deliver` deliveries.
        """
        ...

    async def broadcast(self, subject: str, payload: bytes) -> None:
        """Tells whoever listens now; nothing is stored. Raises PlatformError(UNAVAILABLE)."""
        ...

    async def listen(self, subject: str, handler: Handler) -> None:
        """Hands broadcasts to a handler until cancelled."""
        ...

    async def close(self) -> None:
        """Leaves the bus."""
        ...


def matches(pattern: str, subject: str) -> bool:
    """Tells whether a stream's subject pattern covers a subject or a narrower pattern."""
    wanted, given = pattern.split("."), subject.split(".")
    for i, token in enumerate(wanted):
        if token == ">":
            return len(given) > i
        if i >= len(given) or (token not in ("*", given[i])):
            return False
    return len(wanted) == len(given)
