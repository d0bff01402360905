"""Adapters from the model store into the engine and out again: who asks, in which order, and what counts as done.

More adapters may be known than fit: one that is asked for and not loaded is loaded then, while its requests wait.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Protocol

from chassis.errors import Code, PlatformError
from generator.core.adapters import FULL, AdapterFiles, AdapterSpec, not_loaded
from generator.core.engine import AdapterHost

log = logging.getLogger(__name__)

ANOTHER_BASE = "adapter_for_another_base"  # PlatformError.reason of an adapter that is not for the served model
MAX_WAITING = 256  # requests that wait for adapters; more are refused
RETRY_FAILED_S = 5.0  # an adapter that could not be loaded is not tried again before, however often it is asked for


@dataclass(frozen=True, slots=True)
class AdapterOrder:
    """An adapter to load; `path` is relative to the model store. 0: when it was made only its manifest says."""

    id: str
    path: str
    manifest_sha256: str
    created_unix_s: int = 0

    @property
    def spec(self) -> AdapterSpec:
        """What answers once it is loaded."""
        return AdapterSpec(self.id, self.id.partition(":")[0], self.manifest_sha256, self.created_unix_s)


class AdapterStore(Protocol):
    """Where adapters lie. Both methods block."""

    def read(self, order: AdapterOrder) -> AdapterFiles:
        """Verifies and reads an adapter. Raises PlatformError: NOT_FOUND where there is none, DATA_LOSS where it is
        damaged, FAILED_PRECONDITION with reason ANOTHER_BASE, INVALID_ARGUMENT for all else."""
        ...

    def find(self) -> list[AdapterOrder]:
        """Returns every adapter of the served base, newest first; what cannot be read is logged and left out."""
        ...


# Told how a load ended: "loaded", "present", "full" where others left no room, "busy" where the engine had no time for
# its probe, or "failed".
Observer = Callable[[str], None]


class AdapterLibrary:
    """Knows which adapters may be asked for. Used on the event loop.

    Loads one adapter at a time, so that two calls for one adapter are one load.
    """

    def __init__(
        self,
        host: AdapterHost,
        store: AdapterStore | None,
        observe: Observer = lambda _: None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._host = host
        self._store = store
        self._observe = observe
        self._clock = clock
        self._lock = asyncio.Lock()
        self._known: dict[str, AdapterOrder] = {}  # the one of each id that a request may have, loaded or not
        self._failures: dict[AdapterOrder, tuple[float, PlatformError]] = {}  # of the known, with their time
        self._num_waiting = 0

    def specs(self) -> tuple[AdapterSpec, ...]:
        """Returns what may be asked for, by id; what is loaded in the version that answers."""
        loaded = {spec.id: spec for spec in self._host.adapters()}
        found = {order.id: order.spec for order in self._known.values()} | loaded
        return tuple(found[adapter_id] for adapter_id in sorted(found))

    def get(self, adapter_id: str) -> AdapterSpec | None:
        """Returns what answers under an id, or will when it is asked for."""
        order = self._known.get(adapter_id)
        return self._loaded(adapter_id) or (order.spec if order else None)

    def is_known(self, order: AdapterOrder) -> bool:
        """Tells whether a request for its id would have this very adapter."""
        spec = self.get(order.id)
        return spec is not None and spec.manifest_sha256 == order.manifest_sha256

    async def ensure(self, adapter_id: str, deadline_unix_s: float | None = None) -> None:
        """Returns when an adapter is loaded: at once where it is, else it is loaded and what nobody uses makes room.

        Where all others are in use it waits for one of them. Raises PlatformError: NOT_FOUND for an unknown one,
        OVERLOADED where too many wait, DEADLINE_EXCEEDED, and what loading it raises.
        """
        if self._loaded(adapter_id) is not None:
            return
        with self._waiting():
            try:
                async with asyncio.timeout(None if deadline_unix_s is None else deadline_unix_s - self._clock()):
                    while self._loaded(adapter_id) is None:
                        await self._load_known(adapter_id)
            except TimeoutError as error:
                message = f"adapter {adapter_id!r} was not loaded before the request's deadline"
                raise PlatformError(Code.DEADLINE_EXCEEDED, message, retryable=False) from error

    async def load(self, order: AdapterOrder, *, only_newer: bool = False, may_evict: bool = True) -> AdapterSpec:
        """Returns what answers under the id when a probe was answered; at once where that is this very adapter.

        only_newer: leaves what is known if it was made later; for news that may come twice or late.
        An adapter that finds no room is known from then on, and loaded when it is asked for.
        Raises PlatformError as AdapterStore.read and AdapterHost.load_adapter do.
        """
        async with self._lock:
            return await self._load(order, only_newer, may_evict)

    async def unload(self, adapter_id: str) -> None:
        """Returns when nothing uses the adapter any more. Raises NOT_FOUND.

        The store keeps it: a restart, or news of it, makes it known again.
        """
        async with self._lock:  # a load that runs would bring it back
            order = self._known.pop(adapter_id, None)
            if order is not None:
                self._failures.pop(order, None)
        if order is None or self._loaded(adapter_id) is not None:
            await self._host.unload_adapter(adapter_id)
        log.info("adapter unloaded", extra={"adapter": adapter_id})

    async def load_all(self) -> None:
        """Loads the newest adapter of each id in the store, newest first, until no more may be loaded; the others are
        known and loaded when they are asked for.

        Whatever is wrong with one adapter is logged: base and other adapters must answer.
        """
        if self._store is None:
            return
        orders = await asyncio.to_thread(self._store.find)
        for number, order in enumerate(orders):
            if self._loaded(order.id) is not None:  # a newer one
                continue
            try:
                await self.load(order, may_evict=False)
            except PlatformError as error:
                if error.reason == FULL:
                    for other in orders[number:]:
                        self._known.setdefault(other.id, other)
                    num_waiting = len(self.specs()) - len(self._host.adapters())
                    log.info("adapters wait to be asked for", extra={"num_waiting": num_waiting})
                    return
                log.error("adapter not loaded at start", extra={"adapter": order.id, "error": repr(error)})
            except Exception:
                log.exception("adapter not loaded at start", extra={"adapter": order.id})

    def _loaded(self, adapter_id: str) -> AdapterSpec | None:
        return next((spec for spec in self._host.adapters() if spec.id == adapter_id), None)

    def _know(self, order: AdapterOrder) -> None:
        before = self._known.get(order.id)
        if before is not None:
            self._failures.pop(before, None)
        self._known[order.id] = order

    async def _load_known(self, adapter_id: str) -> None:
        """Tries to load a known adapter once, or waits until it may be worth while to try again."""
        async with self._lock:
            order = self._known.get(adapter_id)
            if order is None:
                raise not_loaded(adapter_id)
            if self._loaded(adapter_id) is not None:  # by one that waited before
                return
            failed_s, failure = self._failures.get(order, (0.0, None))
            if failure is not None and self._clock() < failed_s + RETRY_FAILED_S:
                raise failure.with_traceback(None)
            try:
                await self._load(order)
                return
            except PlatformError as error:
                if error.code is Code.NOT_FOUND:  # it was taken out of the store
                    self._known.pop(adapter_id)
                    self._failures.pop(order, None)
                    raise not_loaded(adapter_id) from error
                if not error.retryable:  # the others are nothing that the adapter is to blame for
                    self._failures[order] = (self._clock(), error)
                if error.reason != FULL or not error.retryable:
                    raise
        await self._host.adapter_freed()

    async def _load(self, order: AdapterOrder, only_newer: bool = False, may_evict: bool = True) -> AdapterSpec:
        """See load. The lock is held."""
        if self._store is None:
            raise PlatformError(Code.FAILED_PRECONDITION, "this generator has no model store: set GENERATOR_STORE_DIR")
        started_s = time.monotonic()
        loaded, present = self._loaded(order.id), self.get(order.id)
        if loaded is not None and loaded.manifest_sha256 == order.manifest_sha256:
            self._observe("present")
            return loaded
        try:
            files = await asyncio.to_thread(self._store.read, order)
            order = replace(order, created_unix_s=files.spec.created_unix_s)
            if only_newer and present is not None and present.created_unix_s > order.created_unix_s:
                self._observe("present")
                return present
            spec = await self._host.load_adapter(files, may_evict=may_evict)
        except Exception as error:
            outcome = _outcome(error)
            if outcome == "full" and loaded is None:
                self._know(order)
            self._observe(outcome)
            raise
        self._know(order)
        self._observe("loaded")
        took_s = round(time.monotonic() - started_s, 3)
        extra = {"adapter": spec.id, "version": spec.version, "path": order.path, "load_s": took_s}
        log.info("adapter loaded", extra=extra)
        return spec

    @contextlib.contextmanager
    def _waiting(self) -> Iterator[None]:
        if self._num_waiting >= MAX_WAITING:
            message = f"{self._num_waiting} requests wait for adapters to be loaded, as many as may"
            raise PlatformError(Code.OVERLOADED, message, retry_after_s=1.0)
        self._num_waiting += 1
        try:
            yield
        finally:
            self._num_waiting -= 1


def _outcome(error: Exception) -> str:
    if not isinstance(error, PlatformError):
        return "failed"
    return "full" if error.reason == FULL else "busy" if error.retryable else "failed"
