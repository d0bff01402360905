"""The model store's adapters: found, verified against their manifests and read into memory. Blocks; never unpickles."""

import hashlib
import logging
import re
from collections.abc import Collection
from pathlib import Path, PurePosixPath

from chassis.errors import Code, PlatformError
from generator.core.adapters import AdapterFiles, AdapterSpec
from generator.core.library import ANOTHER_BASE, AdapterOrder
from modelstore.manifest import MANIFEST_NAME, Manifest, sha256_of

log = logging.getLogger(__name__)

CONFIG_NAME = "adapter_config.json"
TENSORS_NAME = "adapter_model.safetensors"
_FOLDER = "adapters"
_MAX_CONFIG_BYTES = 1024 * 1024
_SUFFIX = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}", re.ASCII)  # it becomes a label of metrics


class FolderAdapterStore:
    """See core.library.AdapterStore. Knows the one base whose adapters are of use here.

    max_bytes: most that the files of one adapter may hold together. An adapter names its base's weights by their sum;
    an older one names a version, which may be one of `earlier_versions`: of the same weights.
    """

    def __init__(
        self,
        root: Path,
        base_id: str,
        base_version: str,
        max_bytes: int,
        *,
        base_weights_sha256: str = "",
        earlier_versions: Collection[str] = (),
    ) -> None:
        self._root = root
        self._base_id = base_id
        self._base_version = base_version
        self._base_weights_sha256 = base_weights_sha256
        self._earlier_versions = frozenset(earlier_versions)
        self._max_bytes = max_bytes

    def read(self, order: AdapterOrder) -> AdapterFiles:
        """See AdapterStore.read."""
        folder = self._inside(order.path)
        manifest = Manifest.load(folder)
        found = sha256_of(folder / MANIFEST_NAME)
        if found != order.manifest_sha256 or manifest.version != found[:12]:
            message = f"adapter {order.id!r}: its manifest has sha256 {found}, expected {order.manifest_sha256}"
            raise PlatformError(Code.DATA_LOSS, message, param="manifest_sha256", reason="adapter_damaged")
        self._check(manifest, order.id)
        self._check_sizes(manifest)
        manifest.verify()
        return AdapterFiles(
            spec=AdapterSpec(manifest.id, self._base_id, found, manifest.created_unix_s),
            config=_read(manifest, CONFIG_NAME, _MAX_CONFIG_BYTES),
            tensors=_read(manifest, TENSORS_NAME, self._max_bytes),
        )

    def find(self) -> list[AdapterOrder]:
        """See AdapterStore.find."""
        orders: list[AdapterOrder] = []
        for path in sorted((self._root / _FOLDER).glob(f"*/{MANIFEST_NAME}")):
            if path.parent.name.startswith("."):  # one that is being made
                continue
            try:
                manifest = Manifest.load(self._inside(f"{_FOLDER}/{path.parent.name}"))
                self._check(manifest, manifest.id)
                order = AdapterOrder(
                    manifest.id, f"{_FOLDER}/{path.parent.name}", sha256_of(path), manifest.created_unix_s
                )
            except (PlatformError, OSError) as error:
                is_ours = not isinstance(error, PlatformError) or error.reason != ANOTHER_BASE
                level = logging.ERROR if is_ours else logging.INFO
                log.log(level, "adapter skipped", extra={"folder": path.parent.name, "error": str(error)})
                continue
            orders.append(order)
        return sorted(orders, key=lambda order: order.created_unix_s, reverse=True)

    def _inside(self, path: str) -> Path:
        """Refuses what is no plain path below the store, or leads out of it through a link."""
        pure = PurePosixPath(path)
        is_plain = bool(pure.parts) and not pure.is_absolute() and ".." not in pure.parts
        if is_plain and "\\" not in path and path.isprintable():
            folder = self._root / pure
            if folder.resolve().is_relative_to(self._root.resolve()):
                return folder
        raise PlatformError(Code.INVALID_ARGUMENT, f"{path!r} is not a folder of the model store", param="path")

    def _check(self, manifest: Manifest, adapter_id: str) -> None:
        if manifest.kind != "adapter":
            message = f"{manifest.id!r} is no adapter: its manifest says it is of kind {manifest.kind!r}"
            raise PlatformError(Code.INVALID_ARGUMENT, message, param="path")
        if manifest.id != adapter_id:
            message = f"the folder holds adapter {manifest.id!r}, not {adapter_id!r}"
            raise PlatformError(Code.INVALID_ARGUMENT, message, param="adapter")
        base, version = manifest.config.get("base"), manifest.config.get("base_version")
        if base != self._base_id or not self._has_our_weights(manifest):
            message = (
                f"adapter {manifest.id!r} is for base {base!r} of version {version!r}; "
                f"this generator serves {self._base_id!r} of version {self._base_version!r}"
            )
            raise PlatformError(Code.FAILED_PRECONDITION, message, param="adapter", reason=ANOTHER_BASE)
        prefix, _, suffix = manifest.id.partition(":")
        if prefix != self._base_id or not _SUFFIX.fullmatch(suffix):
            message = (
                f"adapter id {manifest.id[:200]!r} is not '{self._base_id}:<suffix>' of letters, digits, '.', '_', '-'"
            )
            raise PlatformError(Code.INVALID_ARGUMENT, message, param="adapter")

    def _has_our_weights(self, manifest: Manifest) -> bool:
        named = manifest.config.get("base_weights_sha256")
        if named and self._base_weights_sha256:
            return bool(named == self._base_weights_sha256)
        version = manifest.config.get("base_version")
        return version == self._base_version or version in self._earlier_versions

    def _check_sizes(self, manifest: Manifest) -> None:
        """Looks at sizes first: gigabytes are not summed up only to be refused."""
        size_bytes = sum(entry.size_bytes for entry in manifest.files)
        if size_bytes > self._max_bytes:
            message = f"adapter {manifest.id!r} has {size_bytes} bytes; {self._max_bytes} are allowed"
            raise PlatformError(Code.INVALID_ARGUMENT, message, param="adapter", reason="adapter_too_large")
        for entry in manifest.files:
            path = manifest.path(entry.path)
            if path.exists() and path.stat().st_size != entry.size_bytes:
                message = (
                    f"adapter {manifest.id!r}: {entry.path} has {path.stat().st_size} bytes "
                    f"where its manifest says {entry.size_bytes}"
                )
                raise PlatformError(Code.DATA_LOSS, message, reason="adapter_damaged")


def _read(manifest: Manifest, name: str, max_bytes: int) -> bytes:
    """Reads a listed file and sums up the very bytes that will be used: the folder may change under us."""
    path = manifest.path(name)
    entry = next(entry for entry in manifest.files if entry.path == name)
    if entry.size_bytes > max_bytes:
        message = f"adapter {manifest.id!r}: {name} has {entry.size_bytes} bytes; {max_bytes} are allowed"
        raise PlatformError(Code.INVALID_ARGUMENT, message, param="adapter", reason="adapter_too_large")
    with path.open("rb") as file:
        content = file.read(entry.size_bytes + 1)
    if hashlib.sha256(content).hexdigest() != entry.sha256:
        message = f"adapter {manifest.id!r}: {name} changed while it was read"
        raise PlatformError(Code.DATA_LOSS, message, reason="adapter_damaged")
    return content
