"""Who the current work is for: request id, tenant and deadline, carried along by the task's context."""

import contextlib
import random
import time
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RequestContext:
    """What every hop of a request knows. `deadline_s` is on time.monotonic()'s clock; None means no deadline."""

    request_id: str = ""
    tenant: str = ""
    deadline_s: float | None = None

    def remaining_s(self, most_s: float) -> float:
        """Returns the seconds left until the deadline, at most `most_s` and never negative."""
        if self.deadline_s is None:
            return most_s
        return max(0.0, min(most_s, self.deadline_s - time.monotonic()))


_EMPTY = RequestContext()
_current: ContextVar[RequestContext] = ContextVar("pressroom_request", default=_EMPTY)


def current() -> RequestContext:
    """Returns the context of the running task; empty outside a request."""
    return _current.get()


def enter(context: RequestContext) -> None:
    """Sets the context for the rest of the running task: for a task that serves one request and then ends."""
    _current.set(context)


@contextlib.contextmanager
def use(context: RequestContext) -> Iterator[None]:
    """Sets the context for a block."""
    token = _current.set(context)
    try:
        yield
    finally:
        _current.reset(token)


def new_request_id() -> str:
    """Makes an id for a request that came without one."""
    # Unique is enough here: uuid4 asks the system for what nobody can guess, which takes longer than all the rest.
    return f"req_{random.getrandbits(128):032x}"
