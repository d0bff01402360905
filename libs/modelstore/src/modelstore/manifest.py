"""The manifest of a model folder: which files make up the model, and the sha256 of each.

A service loads the manifest, verifies it and then opens only files that the manifest lists. Knows nothing of formats
or frameworks.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from chassis.errors import Code, PlatformError

MANIFEST_NAME = "manifest.json"
KINDS = ("llm", "encoder", "adapter")
_MAX_MANIFEST_BYTES = 1024 * 1024
_READ_BYTES = 1024 * 1024
_HEX = frozenset("0123456789abcdef")


@dataclass(frozen=True, slots=True)
class ManifestFile:
    """One file of a model; `path` is relative to the model's folder, with forward slashes."""

    path: str
    sha256: str
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a model folder holds. `version` is the first 12 hex digits of the manifest's own sha256."""

    root: Path
    id: str
    kind: str
    created_unix_s: int
    source: Mapping[str, Any]
    files: tuple[ManifestFile, ...]
    config: Mapping[str, Any]
    version: str

    @classmethod
    def load(cls, directory: Path | str) -> "Manifest":
        """Reads `directory`/manifest.json. Raises NOT_FOUND where there is none, DATA_LOSS where it cannot be right.

        Blocks for a small file's time; checks no sums: that is `verify`.
        """
        root = Path(directory)
        raw = _read_manifest(root / MANIFEST_NAME)
        try:
            document = json.loads(raw)
            files = tuple(_parse_file(entry) for entry in _typed(document["files"], list))
            if not files:
                raise ValueError("it lists no files")
            if len({f.path for f in files}) != len(files):
                raise ValueError("it lists a file twice")
            kind = _typed(document["kind"], str)
            if kind not in KINDS:
                raise ValueError(f"unknown kind {kind!r}")
            return cls(
                root=root,
                id=_typed(document["id"], str),
                kind=kind,
                created_unix_s=_typed(document["created_unix_s"], int),
                source=_typed(document["source"], dict),
                files=files,
                config=_typed(document["config"], dict),
                version=hashlib.sha256(raw).hexdigest()[:12],
            )
        except KeyError as error:
            raise _damaged(root, f"it has no field {error}") from error
        except (TypeError, ValueError, RecursionError) as error:
            raise _damaged(root, str(error)) from error

    def verify(self) -> None:
        """Compares every file with the manifest; raises DATA_LOSS naming the file and both sums.

        Reads all of the model (seconds for a large one), so not for an event loop.
        """
        for entry in self.files:
            path = self._inside(entry)
            try:
                size_bytes = path.stat().st_size
                found = sha256_of(path)
            except OSError as error:
                raise PlatformError(
                    Code.DATA_LOSS,
                    f"model {self.id}: file {entry.path} is missing or cannot be read ({error.strerror}); "
                    f"expected sha256 {entry.sha256}",
                ) from error
            if found != entry.sha256 or size_bytes != entry.size_bytes:
                raise PlatformError(
                    Code.DATA_LOSS,
                    f"model {self.id}: checksum mismatch in {entry.path}: expected sha256 {entry.sha256} "
                    f"({entry.size_bytes} bytes), found {found} ({size_bytes} bytes)",
                )

    def path(self, name: str) -> Path:
        """Returns where a listed file lies; raises DATA_LOSS for one that the manifest does not list."""
        for entry in self.files:
            if entry.path == name:
                return self._inside(entry)
        raise PlatformError(Code.DATA_LOSS, f"model {self.id}: its manifest lists no file {name}")

    @property
    def weights_sha256(self) -> str:
        """The sum of the weights that training and adapters are made from; empty where there are none.

        It stays when a model is packed in one more format, which the version does not.
        """
        return next((entry.sha256 for entry in self.files if entry.path == "model.safetensors"), "")

    def _inside(self, entry: ManifestFile) -> Path:
        """Refuses what leaves the folder through a symlink; the folder itself may be one."""
        path = self.root / entry.path
        if not path.resolve().is_relative_to(self.root.resolve()):
            raise PlatformError(Code.DATA_LOSS, f"model {self.id}: file {entry.path} leads out of the model's folder")
        return path


def sha256_of(path: Path, progress: Callable[[int], None] | None = None) -> str:
    """Returns a file's sha256 in hex, telling `progress` how many bytes were read so far. Blocks."""
    digest = hashlib.sha256()
    num_bytes = 0
    with path.open("rb") as file:
        while block := file.read(_READ_BYTES):
            digest.update(block)
            num_bytes += len(block)
            if progress is not None:
                progress(num_bytes)
    return digest.hexdigest()


def write_manifest(
    directory: Path,
    *,
    model_id: str,
    kind: str,
    created_unix_s: int,
    source: Mapping[str, Any],
    config: Mapping[str, Any],
) -> Manifest:
    """Writes the manifest of every file that lies in `directory` and returns it."""
    paths = sorted(p for p in directory.rglob("*") if p.is_file() and p.name != MANIFEST_NAME)
    document = {
        "id": model_id,
        "kind": kind,
        "created_unix_s": created_unix_s,
        "source": dict(source),
        "files": [
            {"path": p.relative_to(directory).as_posix(), "sha256": sha256_of(p), "size_bytes": p.stat().st_size}
            for p in paths
        ],
        "config": dict(config),
    }
    (directory / MANIFEST_NAME).write_text(json.dumps(document, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return Manifest.load(directory)


def _read_manifest(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            raw = file.read(_MAX_MANIFEST_BYTES + 1)
    except FileNotFoundError as error:
        raise PlatformError(
            Code.NOT_FOUND, f"no model in {path.parent}: {MANIFEST_NAME} is missing; prepare the model store first"
        ) from error
    except OSError as error:
        raise PlatformError(Code.DATA_LOSS, f"{path} cannot be read: {error.strerror}") from error
    if len(raw) > _MAX_MANIFEST_BYTES:
        raise _damaged(path.parent, f"it is larger than {_MAX_MANIFEST_BYTES} bytes")
    return raw


def _parse_file(entry: Any) -> ManifestFile:
    fields = _typed(entry, dict)
    path = _typed(fields["path"], str)
    pure = PurePosixPath(path)
    if not pure.parts or pure.is_absolute() or ".." in pure.parts or "\\" in path or "\0" in path or str(pure) != path:
        raise ValueError(f"file path {path!r} is not a plain path below the model's folder")
    sha256 = _typed(fields["sha256"], str)
    if len(sha256) != 64 or not _HEX.issuperset(sha256):
        raise ValueError(f"{path}: {sha256!r} is no sha256")
    size_bytes = _typed(fields["size_bytes"], int)
    if size_bytes < 0:
        raise ValueError(f"{path}: negative size")
    return ManifestFile(path=path, sha256=sha256, size_bytes=size_bytes)


def _typed(value: Any, kind: type) -> Any:
    if not isinstance(value, kind) or isinstance(value, bool):
        raise TypeError(f"expected {kind.__name__}, found {type(value).__name__}")
    return value


def _damaged(root: Path, why: str) -> PlatformError:
    return PlatformError(Code.DATA_LOSS, f"the manifest of the model in {root} is damaged: {why}")
