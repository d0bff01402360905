"""Requests that were asked before: answered from the exact cache, or from the run of one that is being answered.

Never across tenants: the tenant is part of what is compared. A repeat takes no tokens from limits and budgets; that it
came is counted where every request is. Knows neither HTTP nor where entries are kept. Answers to similar requests are
none of its business: a semantic cache is a node of a graph.
"""

import asyncio
import hashlib
import json
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, fields, is_dataclass
from typing import TYPE_CHECKING, Protocol

from chassis.errors import Code, PlatformError
from gateway.core.account import HEADER_MODEL, Repeat, Wish
from gateway.core.flights import Flight, Private
from gateway.core.graph import Answering, Deadline, Graph, GraphEvent, GraphRequest, Grounding
from gateway.core.ports import Principal
from gateway.core.services import Abandoned, Done, Finished, Started, ToolCallDelta

if TYPE_CHECKING:
    from gateway.core.serving import Ask

HEADER = "x-pressroom-cache"
_FORMAT = 1  # of what is compared: a new number forgets every entry
UNTOLD = "*"  # the version of a model that is changed by others, unseen: only time makes its answers old
_MAX_WRITING = 32  # entries that are being written at a time; more are not kept
_ENOUGH_S = 60.0  # a run that may still take so long, or half as long as oneself has, is good enough to join
_CHANGES_NO_ANSWER = frozenset({"priority", "usage_id"})


@dataclass(frozen=True, slots=True)
class Entry:
    """An answer that was kept: its events, and the version of the model that gave it."""

    model_version: str
    events: tuple[GraphEvent, ...]


class Cache(Protocol):
    """Where answers are kept. It never raises, and answers within its own time-out when its store is away."""

    async def get(self, key: str) -> Entry | None:
        """What was kept under the key."""
        ...

    async def put(self, key: str, entry: Entry) -> None:
        """Keeps an entry for a while, unless it is too large."""
        ...


class NoCache:
    """Keeps nothing: concurrent repeats share a run all the same. Implements Cache."""

    async def get(self, key: str) -> Entry | None:
        """Nothing."""
        return None

    async def put(self, key: str, entry: Entry) -> None:
        """Forgets it."""


class Versions(Protocol):
    """Which version of a model answers now."""

    async def version(self, graph: Graph) -> str | None:
        """What Started would say now; None where it is not known, UNTOLD where nobody can. Raises no PlatformError."""
        ...


Fresh = Callable[[Callable[[bool], None]], AsyncGenerator[GraphEvent]]
"""Runs the model and keeps the account; calls its argument before a model is asked: False if it is asked for less."""


@dataclass(frozen=True, slots=True)
class _Led:
    """A run that can be joined, and for how long and in which class it goes."""

    flight: Flight
    deadline: Deadline
    priority: int

    def suits(self, ask: "Ask") -> bool:
        """Whether that is good enough for the request."""
        now_s = time.monotonic()
        left_s, own_s = self.deadline.at_s - now_s, ask.deadline.at_s - now_s
        return left_s >= min(_ENOUGH_S, own_s / 2) and self.priority >= ask.priority


class Repeats:
    """Knows this process's runs that can be joined, and the cache. For one event loop."""

    def __init__(self, versions: Versions, cache: Cache | None = None) -> None:
        self._versions = versions
        self._cache: Cache = cache or NoCache()
        self._led: dict[str, _Led] = {}
        self._writing: set[asyncio.Task[None]] = set()

    def run(self, ask: "Ask", graph: Graph, fresh: Fresh) -> AsyncGenerator[GraphEvent]:
        """Streams the answer; the caller closes it in the task that iterates it."""
        wish = ask.account.cache_wish
        if graph.identity is None or not _may_share(ask.requests, wish):
            return fresh(lambda is_as_wanted: None)
        key = key_of(graph.identity, ask.requests)
        if wish is Wish.REFRESH:
            return self._lead(ask, fresh, key, keeps=True, is_joinable=False)
        return self._shared(ask, graph, fresh, key, keeps=wish is Wish.ON or opted_in(ask.principal))

    @property
    def running(self) -> Sequence[Flight]:
        """The runs that can be joined."""
        return tuple(led.flight for led in self._led.values())

    async def close(self) -> None:
        """Waits for the entries that are being written."""
        if self._writing:
            await asyncio.wait(self._writing)

    async def _shared(
        self, ask: "Ask", graph: Graph, fresh: Fresh, key: str, *, keeps: bool
    ) -> AsyncGenerator[GraphEvent]:
        while True:
            flight = await self._flight(ask, graph, key)
            if flight is None and keeps:
                entry = await self._cache.get(key)
                if entry is not None and await self._versions.version(graph) in (entry.model_version, UNTOLD):
                    _mark(ask, graph, Repeat.HIT)
                    for event in entry.events:
                        yield ask.account.take_repeated(event)
                    return
                flight = await self._flight(ask, graph, key)  # of a request that came while we looked
            if flight is None:
                async with aclosing(self._lead(ask, fresh, key, keeps=keeps, is_joinable=True)) as events:
                    async for event in events:
                        yield event
                return
            _mark(ask, graph, Repeat.SHARED)
            num_told = 0
            try:
                async with aclosing(flight.read(ask.deadline)) as events:
                    async for event in events:
                        num_told += 1
                        yield ask.account.take_repeated(event)
                return
            except Private:
                pass
            except PlatformError as error:
                if num_told or ask.deadline.is_over or not _is_of_leader(flight, error):
                    raise
            ask.account.repeat = Repeat.NO
            del ask.account.answer_headers[HEADER]

    async def _flight(self, ask: "Ask", graph: Graph, key: str) -> Flight | None:
        """The run to join, unless it does not suit or another version of the model answers by now."""
        led = self._led.get(key)
        if led is not None and led.suits(ask) and (began := _version(led.flight.events)):
            version = await self._versions.version(graph)
            if version not in (began, None, UNTOLD):
                self._close(key, led.flight)
        led = self._led.get(key)
        return led.flight if led is not None and led.suits(ask) else None

    async def _lead(
        self, ask: "Ask", fresh: Fresh, key: str, *, keeps: bool, is_joinable: bool
    ) -> AsyncGenerator[GraphEvent]:
        if keeps:
            ask.account.answer_headers[HEADER] = "miss"

        async def source(flight: Flight) -> AsyncGenerator[GraphEvent]:
            is_whole = True

            def is_asked(is_as_wanted: bool) -> None:
                nonlocal is_whole
                flight.is_admitted = True
                is_whole = is_as_wanted
                if not is_as_wanted:
                    flight.make_private()

            async with aclosing(fresh(is_asked)) as events:
                async for event in events:
                    yield event
            if keeps and is_whole:
                self._keep(key, flight.events)

        flight = Flight(source, lambda closed: self._close(key, closed))
        if is_joinable:
            self._led[key] = _Led(flight, ask.deadline, ask.priority)
        try:
            async with aclosing(flight.read(ask.deadline)) as events:
                async for event in events:
                    yield event
        finally:
            # The account is the leader's, so it is open until the run has ended: where the leader goes and others
            # stay, its request lasts as long as theirs.
            await flight.ended()

    def _close(self, key: str, flight: Flight) -> None:
        led = self._led.get(key)
        if led is not None and led.flight is flight:
            del self._led[key]

    def _keep(self, key: str, events: Sequence[GraphEvent]) -> None:
        version = _version(events)
        if not events or not _is_whole(events, version) or len(self._writing) >= _MAX_WRITING:
            return
        task = asyncio.create_task(self._cache.put(key, Entry(version, tuple(events))))
        self._writing.add(task)
        task.add_done_callback(self._writing.discard)


def opted_in(principal: Principal) -> bool:
    """Says whether the key or its tenant wants its repeats answered from the cache."""
    return principal.policy.caches or principal.tenant_policy.caches


def key_of(identity: str, requests: Sequence[GraphRequest]) -> str:
    """What equal requests have in common: a hash over everything that can change the answer, the tenant included.

    It compares all fields of a request but the named few, so that one that is added later is compared, too.
    """
    compared = json.dumps([_FORMAT, identity, requests], default=_plain, sort_keys=True, separators=(",", ":"))
    return f"{requests[0].tenant}:{hashlib.sha256(compared.encode()).hexdigest()}"


def _plain(value: object) -> object:
    if not is_dataclass(value) or isinstance(value, type):
        raise TypeError(f"{type(value).__name__} cannot be compared")
    names = (one.name for one in fields(value) if one.name not in _CHANGES_NO_ANSWER)
    return {"": type(value).__name__} | {name: getattr(value, name) for name in names}


def _may_share(requests: Sequence[GraphRequest], wish: Wish) -> bool:
    match wish:
        case Wish.OFF:
            return False
        case Wish.UNSAID:
            return all(one.sampling.temperature == 0 or one.sampling.seed is not None for one in requests)
    return True


def _is_of_leader(flight: Flight, error: PlatformError) -> bool:
    """It failed for what concerns its leader alone: its limits and budget, its place in the queue, its deadline."""
    return not flight.is_admitted or error.code is Code.DEADLINE_EXCEEDED


def _mark(ask: "Ask", graph: Graph, repeat: Repeat) -> None:
    ask.account.repeat = repeat
    ask.account.answer_headers |= {HEADER: repeat.value, HEADER_MODEL: graph.name}


def _version(events: Sequence[GraphEvent]) -> str:
    return next((event.model_version for event in events if isinstance(event, Started)), "")


def _is_whole(events: Sequence[GraphEvent], version: str) -> bool:
    """It ended well, said nothing about documents, and one version of the model that was asked said all of it."""
    last = events[-1]
    return (
        isinstance(last, Done)
        and not last.usage.is_estimate
        and not any(
            isinstance(event, Grounding | Answering | Abandoned | ToolCallDelta)
            or (isinstance(event, Finished) and event.reason not in ("stop", "length"))
            or (isinstance(event, Started) and event.model_version != version)
            for event in events
        )
    )
