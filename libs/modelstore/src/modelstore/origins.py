"""Where a model that is added comes from, and what is known of its files before they are believed.

A source is a name of the table of packages, a folder, a GGUF file, or a repository of the hub.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from chassis.errors import Code, PlatformError
from modelstore import hub
from modelstore.sources import ModelSource, load_sources

_ID = re.compile(r"[a-z0-9][a-z0-9._-]{0,95}", re.ASCII)
_SUM_LINE = re.compile(r"([0-9a-f]{64})\s+\*?(\S.*)", re.ASCII)
_RESERVED = ("adapters",)
_MAX_SUMS_BYTES = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Origin:
    """What a source's name means. Exactly one of `package`, `path` and `repository` is there."""

    package: ModelSource | None = None
    path: Path | None = None
    repository: str = ""
    revision: str = ""

    @property
    def name(self) -> str:
        """What the source is called, without where it lies on this machine."""
        return self.package.id if self.package else self.path.resolve().name if self.path else self.repository


def resolve(source: str, revision: str = "") -> Origin:
    """Says what a source is. Raises NOT_FOUND for what is nothing of all that, INVALID_ARGUMENT for a wrong kind."""
    for package in load_sources():
        if source in (package.id, package.package):
            return Origin(package=package)
    path = Path(source).expanduser()
    if path.is_dir() or (path.is_file() and path.suffix == ".gguf"):
        return Origin(path=path)
    if path.exists():
        message = f"{path.name} is neither a folder nor a GGUF file: add the folder that holds the safetensors"
        raise PlatformError(Code.INVALID_ARGUMENT, message, param="source")
    repository, _, named = source.partition("@")
    if hub.REPOSITORY.fullmatch(repository):
        return Origin(repository=repository, revision=named or revision or "main")
    known = ", ".join(package.id for package in load_sources())
    message = f"there is no {source!r}: not a name ({known}), not a path, not a hub's org/name[@revision]"
    raise PlatformError(Code.NOT_FOUND, message, param="source")


def model_id_of(origin: Origin, asked: str | None) -> str:
    """Returns the id that a model gets. Raises INVALID_ARGUMENT for one that cannot be."""
    if origin.package:
        if asked not in (None, origin.package.id):
            message = f"a model of the table keeps its id, {origin.package.id}"
            raise PlatformError(Code.INVALID_ARGUMENT, message, param="id")
        return origin.package.id
    plain = origin.name.removesuffix(".gguf").rpartition("/")[2]
    model_id = asked or re.sub(r"[^a-z0-9._-]+", "-", plain.lower()).strip("-._")
    taken = [*_RESERVED, *(package.id for package in load_sources())]
    if not _ID.fullmatch(model_id) or model_id in taken:
        message = f"{model_id!r} cannot be a model's id: small letters, digits, '.', '_', '-'; not {', '.join(taken)}"
        raise PlatformError(Code.INVALID_ARGUMENT, f"{message}. Choose one: --id", param="id")
    return model_id


def read_pins(values: list[str]) -> dict[str, str]:
    """Reads FILE=SUM, and files of such lines as sha256sum writes. Raises INVALID_ARGUMENT."""
    pins: dict[str, str] = {}
    for value in values:
        name, is_pair, sha256 = value.rpartition("=")
        if is_pair:
            lines = [f"{sha256.lower()}  {name}"]
        else:
            path = Path(value)
            if not path.is_file() or path.stat().st_size > _MAX_SUMS_BYTES:
                raise _bad_pin(f"{value!r} is neither FILE=SUM nor a file with lines of sha256sum")
            lines = path.read_text(errors="replace").splitlines()
        for line in filter(str.strip, lines):
            found = _SUM_LINE.fullmatch(line.strip())
            if found is None:
                raise _bad_pin(f"{line[:200]!r} is no sha256 with the name of a file")
            pins[found[2].removeprefix("./")] = found[1]
    return pins


def check_pins(pins: Mapping[str, str], sums: Mapping[str, str]) -> None:
    """Compares the sums that somebody knew beforehand with those that were found. Raises DATA_LOSS with both."""
    if unknown := sorted(pins.keys() - sums.keys()):
        raise _bad_pin(f"{unknown[0]} is not read from this source; read are: {', '.join(sorted(sums))}")
    for name, expected in pins.items():
        if sums[name] != expected:
            message = f"checksum mismatch in {name}: expected sha256 {expected}, found {sums[name]}"
            raise PlatformError(Code.DATA_LOSS, message, param="sha256")


def digest_of(sums: Mapping[str, str]) -> str:
    """Returns one sum for all files of a source; of a single file, its own."""
    if len(sums) == 1:
        return next(iter(sums.values()))
    return hashlib.sha256(json.dumps(dict(sums), sort_keys=True).encode()).hexdigest()


def _bad_pin(why: str) -> PlatformError:
    return PlatformError(Code.INVALID_ARGUMENT, why, param="sha256")
