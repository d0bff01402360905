"""Adapters from the model store into the engine and out again: who asks, in which order, and what counts as done."""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from chassis.errors import Code, PlatformError
from generator.core.adapters import FULL, AdapterFiles, AdapterSpec
from generator.core.engine import AdapterHost

log = logging.getLogger(__name__)

ANOTHER_BASE = "adapter_for_another_base"  # PlatformError.reason of an adapter that is not for the served model


@dataclass(frozen=True, slots=True)
class AdapterOrder:
    """An adapter to load; `path` is relative to the model store."""

    id: str
    path: str
    manifest_sha256: str


class AdapterStore(Protocol):
    """Where adapters lie. Both methods block."""

    def read(self, order: AdapterOrder) -> AdapterFiles:
        """Verifies and reads an adapter. Raises PlatformError: NOT_FOUND where there is none, DATA_LOSS where it is
        damaged, FAILED_PRECONDITION with reason ANOTHER_BASE, INVALID_ARGUMENT for all else."""
        ...

    def find(self) -> list[AdapterOrder]:
        """Returns every adapter of the served base, newest first; what cannot be read is logged and left out."""
        ...


Observer = Callable[[str], None]  # told how a load ended: "loaded", "present" or "failed"


class AdapterLibrary:
    """Loads one adapter at a time, so that two calls for one adapter are one load. Used on the event loop."""

    def __init__(self, host: AdapterHost, store: AdapterStore | None, observe: Observer = lambda _: None) -> None:
        self._host = host
        self._store = store
        self._observe = observe
        self._lock = asyncio.Lock()

    def get(self, adapter_id: str) -> AdapterSpec | None:
        """Returns what answers under an id."""
        return next((spec for spec in self._host.adapters() if spec.id == adapter_id), None)

    async def load(self, order: AdapterOrder, *, only_newer: bool = False) -> AdapterSpec:
        """Returns what answers under the id when a probe was answered; at once where that is this very adapter.

        only_newer: leaves what is loaded if it was made later; for news that may come twice or late.
        Raises PlatformError as AdapterStore.read and AdapterHost.load_adapter do.
        """
        if self._store is None:
            raise PlatformError(Code.FAILED_PRECONDITION, "this generator has no model store: set GENERATOR_STORE_DIR")
        async with self._lock:
            present = self.get(order.id)
            if present is not None and present.manifest_sha256 == order.manifest_sha256:
                self._observe("present")
                return present
            try:
                files = await asyncio.to_thread(self._store.read, order)
                if only_newer and present is not None and present.created_unix_s > files.spec.created_unix_s:
                    self._observe("present")
                    return present
                spec = await self._host.load_adapter(files)
            except BaseException:
                self._observe("failed")
                raise
        self._observe("loaded")
        log.info("adapter loaded", extra={"adapter": spec.id, "version": spec.version, "path": order.path})
        return spec

    async def unload(self, adapter_id: str) -> None:
        """Returns when nothing uses the adapter any more. Raises NOT_FOUND. The store keeps it: a restart loads it."""
        await self._host.unload_adapter(adapter_id)
        log.info("adapter unloaded", extra={"adapter": adapter_id})

    async def load_all(self) -> None:
        """Loads the newest adapter of each id in the store, newest first, until no more may be loaded.

        Whatever is wrong with one adapter is logged: base and other adapters must answer.
        """
        if self._store is None:
            return
        orders = await asyncio.to_thread(self._store.find)
        for number, order in enumerate(orders):
            if self.get(order.id) is not None:  # a newer one
                continue
            try:
                await self.load(order)
            except PlatformError as error:
                log.error("adapter not loaded at start", extra={"adapter": order.id, "error": repr(error)})
                if error.reason == FULL:  # reading and refusing the rest would only make the start longer
                    log.error("adapters left out at start", extra={"num_left_out": len(orders) - number})
                    return
            except Exception:
                log.exception("adapter not loaded at start", extra={"adapter": order.id})
