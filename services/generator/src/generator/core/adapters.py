"""LoRA adapters as the engine sees them: what one is, which are loaded, and who still uses which.

Knows no file format and no arithmetic: a runner turns the files into weights that only it can read.
"""

import asyncio
from dataclasses import dataclass, field
from typing import Protocol

from chassis.errors import Code, PlatformError

FULL = "adapters_full"  # PlatformError.reason where no more may be loaded


@dataclass(frozen=True, slots=True)
class AdapterSpec:
    """An adapter that answers as a model of its own: `id` is "<base>:<suffix>"."""

    id: str
    base: str
    manifest_sha256: str
    created_unix_s: int

    @property
    def version(self) -> str:
        return self.manifest_sha256[:12]


@dataclass(frozen=True, slots=True)
class AdapterFiles:
    """The files of an adapter, in memory and verified against its manifest."""

    spec: AdapterSpec
    config: bytes = field(repr=False)  # peft's adapter_config.json
    tensors: bytes = field(repr=False)  # peft's adapter_model.safetensors


class AdapterWeights(Protocol):
    """What a runner made of the files; opaque to everyone else."""

    @property
    def size_bytes(self) -> int: ...


@dataclass(slots=True, eq=False)
class LoadedAdapter:
    """Weights under an id. A request keeps the ones that it began with, whatever takes their place meanwhile."""

    spec: AdapterSpec
    weights: AdapterWeights
    num_users: int = 0  # unfinished requests
    unused: asyncio.Event = field(default_factory=asyncio.Event)  # set on the loop when the last of them has ended


@dataclass(frozen=True, slots=True)
class AdapterLimits:
    """Bounds of what is loaded, the probed and the replaced that still run included."""

    max_adapters: int = 32
    max_bytes: int = 512 * 1024 * 1024


class AdapterTable:
    """The loaded adapters by id, those being probed, and the replaced ones still in use.

    Where room is short the least recently used adapter that nobody uses goes. Not thread-safe: the engine guards it.
    """

    def __init__(self, limits: AdapterLimits) -> None:
        self._limits = limits
        self._loaded: dict[str, LoadedAdapter] = {}  # least recently used first
        self._entering: set[LoadedAdapter] = set()
        self._leaving: set[LoadedAdapter] = set()
        self._freed = asyncio.Event()
        self.num_evicted = 0

    def __len__(self) -> int:
        return len(self._loaded)

    @property
    def size_bytes(self) -> int:
        """Memory of all that is held."""
        return sum(adapter.weights.size_bytes for adapter in self._held())

    def get(self, adapter_id: str) -> LoadedAdapter | None:
        """Returns the adapter that new requests for this id take."""
        return self._loaded.get(adapter_id)

    def specs(self) -> tuple[AdapterSpec, ...]:
        """Returns what is loaded, by id."""
        return tuple(sorted((adapter.spec for adapter in self._loaded.values()), key=lambda spec: spec.id))

    def check_room(self, adapter_id: str, size_bytes: int = 0, *, may_evict: bool = True) -> None:
        """Raises PlatformError where an adapter more, under this id, would pass a limit: OVERLOADED, reason FULL.

        It is retryable where requests that end make room.
        """
        self._victims(adapter_id, size_bytes, may_evict)

    def enter(self, adapter: LoadedAdapter, *, may_evict: bool = True) -> tuple[AdapterSpec, ...]:
        """Makes room for an adapter that will be probed and counts it; returns what was evicted. Raises as check_room.

        What it replaces stays until `put`, so that a probe which fails takes nothing away.
        """
        victims = self._victims(adapter.spec.id, adapter.weights.size_bytes, may_evict)
        for victim in victims:
            del self._loaded[victim.spec.id]
        self.num_evicted += len(victims)
        self._entering.add(adapter)
        return tuple(victim.spec for victim in victims)

    def put(self, adapter: LoadedAdapter) -> None:
        """Lets new requests for its id take an adapter that has entered."""
        self._entering.remove(adapter)
        self._leave(self._loaded.pop(adapter.spec.id, None))
        self._loaded[adapter.spec.id] = adapter

    def drop(self, adapter: LoadedAdapter) -> None:
        """Forgets an adapter that entered and did not answer; harmless after `put`."""
        self._entering.discard(adapter)

    def remove(self, adapter_id: str) -> LoadedAdapter | None:
        """Hides an adapter from new requests; those that run keep it."""
        adapter = self._loaded.pop(adapter_id, None)
        self._leave(adapter)
        return adapter

    def acquire(self, adapter: LoadedAdapter) -> None:
        """Counts a request that uses it."""
        adapter.num_users += 1
        if self._loaded.get(adapter.spec.id) is adapter:  # now it is the most recently used
            self._loaded[adapter.spec.id] = self._loaded.pop(adapter.spec.id)

    def release(self, adapter: LoadedAdapter) -> bool:
        """Counts a request that has ended; tells whether it was the last."""
        adapter.num_users -= 1
        if adapter.num_users == 0:
            self._leaving.discard(adapter)
        return adapter.num_users == 0

    def tell_unused(self, adapter: LoadedAdapter) -> None:
        """Wakes those who wait for the end of an adapter's last request; called on the loop."""
        adapter.unused.set()
        self._freed.set()
        self._freed = asyncio.Event()

    async def freed(self) -> None:
        """Returns when the last request of some adapter has ended."""
        await self._freed.wait()

    def _held(self) -> tuple[LoadedAdapter, ...]:
        return (*self._loaded.values(), *self._entering, *self._leaving)

    def _leave(self, adapter: LoadedAdapter | None) -> None:
        if adapter is not None and adapter.num_users:
            self._leaving.add(adapter)

    def _victims(self, adapter_id: str, size_bytes: int, may_evict: bool) -> list[LoadedAdapter]:
        """Returns what must go for an adapter of this size, least recently used first."""
        if size_bytes > self._limits.max_bytes:
            message = f"adapter {adapter_id!r} needs {size_bytes} bytes; {self._limits.max_bytes} are allowed"
            raise PlatformError(Code.INVALID_ARGUMENT, message, param="adapter", reason="adapter_too_large")
        others = {adapter.spec.id for adapter in (*self._loaded.values(), *self._entering)} - {adapter_id}
        num_others, taken_bytes = len(others), self.size_bytes
        idle = [a for a in self._loaded.values() if may_evict and not a.num_users and a.spec.id != adapter_id]
        for number in range(len(idle) + 1):
            if num_others < self._limits.max_adapters and taken_bytes + size_bytes <= self._limits.max_bytes:
                return idle[:number]
            if number < len(idle):
                num_others -= 1
                taken_bytes -= idle[number].weights.size_bytes
        if num_others >= self._limits.max_adapters:
            why = f"{num_others} adapters are loaded, as many as this generator may hold"
        else:
            taken = f"{taken_bytes} of {self._limits.max_bytes} are taken"
            why = f"adapter {adapter_id!r} needs {size_bytes} bytes, and {taken}"
        raise _no_room(why, is_in_use=any(adapter.num_users for adapter in self._held()))


def not_loaded(adapter_id: str) -> PlatformError:
    """Makes the error for an adapter that does not answer here."""
    message = f"adapter {adapter_id!r} is not loaded here"
    return PlatformError(Code.NOT_FOUND, message, param="model", reason="model_not_found")


def _no_room(why: str, is_in_use: bool) -> PlatformError:
    message = f"{why}: unload an adapter, or raise GENERATOR_MAX_ADAPTERS and GENERATOR_ADAPTER_MEMORY_MB"
    if is_in_use:
        return PlatformError(Code.OVERLOADED, f"{why} and in use", reason=FULL, retry_after_s=1.0)
    # It does not get better by itself, so trying again at once is no help.
    return PlatformError(Code.OVERLOADED, message, retryable=False, reason=FULL)
