"""Ids of what a request creates: random, and the same again where a request that was cut short is sent again.

So that a process that dies between a creation and its answer does not create twice: the second try, which carries the
same Idempotency-Key, makes the same ids and finds what is there.
"""

import hashlib
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Creation:
    """What a request may create, once: claim is random and its own."""

    claim: str
    may_exist: bool  # a former try may have come as far as to create it


_current: ContextVar[Creation | None] = ContextVar("creation", default=None)


@contextmanager
def use(creation: Creation) -> Iterator[None]:
    """Makes it the current request's."""
    token = _current.set(creation)
    try:
        yield
    finally:
        _current.reset(token)


def new_id(what: str) -> str:
    """32 hex digits for the thing of that name; one request makes at most one of a name."""
    creation = _current.get()
    if creation is None:
        return uuid.uuid4().hex
    return hashlib.sha256(f"{creation.claim}\0{what}".encode()).hexdigest()[:32]


def may_exist() -> bool:
    """Whether to look first if the current request's thing is there already."""
    creation = _current.get()
    return creation is not None and creation.may_exist
