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
    """The loaded adapters by id, and the replaced ones still in use. Not thread-safe: the engine guards it."""

    def __init__(self, limits: AdapterLimits) -> None:
        self._limits = limits
        self._loaded: dict[str, LoadedAdapter] = {}
        self._leaving: set[LoadedAdapter] = set()

    def get(self, adapter_id: str) -> LoadedAdapter | None:
        """Returns the adapter that new requests for this id take."""
        return self._loaded.get(adapter_id)

    def specs(self) -> tuple[AdapterSpec, ...]:
        """Returns what is loaded, by id."""
        return tuple(sorted((adapter.spec for adapter in self._loaded.values()), key=lambda spec: spec.id))

    def check_room(self, adapter_id: str, size_bytes: int = 0) -> None:
        """Raises PlatformError where an adapter more, under this id, would pass a limit: OVERLOADED, reason FULL."""
        if adapter_id not in self._loaded and len(self._loaded) >= self._limits.max_adapters:
            raise _no_room(f"{len(self._loaded)} adapters are loaded, as many as this generator may hold")
        if size_bytes > self._limits.max_bytes:
            message = f"adapter {adapter_id!r} needs {size_bytes} bytes; {self._limits.max_bytes} are allowed"
            raise PlatformError(Code.INVALID_ARGUMENT, message, param="adapter", reason="adapter_too_large")
        # What it replaces is still held while it is read and probed, so it counts.
        held = sum(a.weights.size_bytes for a in (*self._loaded.values(), *self._leaving))
        if held + size_bytes > self._limits.max_bytes:
            raise _no_room(
                f"adapter {adapter_id!r} needs {size_bytes} bytes, and {held} of {self._limits.max_bytes} are taken"
            )

    def put(self, adapter: LoadedAdapter) -> None:
        """Lets new requests for its id take this one. Raises PlatformError(OVERLOADED) where there is no room."""
        self.check_room(adapter.spec.id, adapter.weights.size_bytes)
        self._leave(self._loaded.pop(adapter.spec.id, None))
        self._loaded[adapter.spec.id] = adapter

    def remove(self, adapter_id: str) -> LoadedAdapter | None:
        """Hides an adapter from new requests; those that run keep it."""
        adapter = self._loaded.pop(adapter_id, None)
        self._leave(adapter)
        return adapter

    def acquire(self, adapter: LoadedAdapter) -> None:
        """Counts a request that uses it."""
        adapter.num_users += 1

    def release(self, adapter: LoadedAdapter) -> bool:
        """Counts a request that has ended; tells whether it was the last."""
        adapter.num_users -= 1
        if adapter.num_users == 0:
            self._leaving.discard(adapter)
        return adapter.num_users == 0

    def _leave(self, adapter: LoadedAdapter | None) -> None:
        if adapter is not None and adapter.num_users:
            self._leaving.add(adapter)


def not_loaded(adapter_id: str) -> PlatformError:
    """Makes the error for an adapter that does not answer here."""
    message = f"adapter {adapter_id!r} is not loaded here"
    return PlatformError(Code.NOT_FOUND, message, param="model", reason="model_not_found")


def _no_room(why: str) -> PlatformError:
    message = f"{why}: unload an adapter, or raise GENERATOR_MAX_ADAPTERS and GENERATOR_ADAPTER_MEMORY_MB"
    # It does not get better by itself, so trying again at once is no help.
    return PlatformError(Code.OVERLOADED, message, retryable=False, reason=FULL)
