"""Where the models come from: the pinned table of installed packages, their files and the sums that these must have.

`sources.toml` beside this module is the table. A file whose sum differs is refused before anything reads it.
"""

import importlib.metadata
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chassis.errors import Code, PlatformError
from modelstore.manifest import sha256_of
from modelstore.packing import PackFormat

_TABLE = Path(__file__).with_name("sources.toml")


@dataclass(frozen=True, slots=True)
class ModelSource:
    """One model that can be made: the package that carries it, the sums of what is read and of what is written.

    `weights` is the path of the weights in the package; `inputs` and `outputs` map paths to sha256; `needed_bytes` is
    the disk space that making it takes; `packs` are the formats that its weights are packed in for the native engine;
    `earlier_versions` are those of its manifest before now, of the same weights.
    """

    id: str
    kind: str
    created_unix_s: int
    needed_bytes: int
    package: str
    install: str
    weights: str
    inputs: Mapping[str, str]
    outputs: Mapping[str, str]
    packs: tuple[PackFormat, ...] = ()
    earlier_versions: tuple[str, ...] = ()


def load_sources(table: Path = _TABLE) -> tuple[ModelSource, ...]:
    """Reads the table."""
    document = tomllib.loads(table.read_text(encoding="utf-8"))
    return tuple(_source(row) for row in document["model"])


def _source(row: dict[str, Any]) -> ModelSource:
    lists = {name: tuple(row.get(name, ())) for name in ("packs", "earlier_versions")}
    return ModelSource(**(row | lists))


def locate_inputs(source: ModelSource) -> tuple[str, dict[str, Path]]:
    """Returns the package's version and where its files lie. The package itself is never imported.

    Raises FAILED_PRECONDITION where the package or a file of it is absent.
    """
    try:
        distribution = importlib.metadata.distribution(source.package)
    except importlib.metadata.PackageNotFoundError as error:
        raise PlatformError(
            Code.FAILED_PRECONDITION,
            f"model {source.id}: package {source.package} is not installed; run: {source.install}",
        ) from error
    paths = {name: Path(str(distribution.locate_file(name))) for name in source.inputs}
    for path in paths.values():
        if not path.is_file():
            raise PlatformError(
                Code.FAILED_PRECONDITION,
                f"model {source.id}: package {source.package} {distribution.version} has no file {path}; "
                f"run: {source.install} --force-reinstall",
            )
    return distribution.version, paths


def check_sums(what: str, expected: Mapping[str, str], paths: Mapping[str, Path]) -> None:
    """Raises DATA_LOSS naming the first file whose sha256 is not the expected one, with both sums. Blocks."""
    for name, sha256 in expected.items():
        found = sha256_of(paths[name])
        if found != sha256:
            raise PlatformError(
                Code.DATA_LOSS, f"{what}: checksum mismatch in {name}: expected sha256 {sha256}, found {found}"
            )
