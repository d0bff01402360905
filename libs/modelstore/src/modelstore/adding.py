"""Adds a model to the store: fetched, checked, converted to bf16, packed, and recorded in a manifest.

All of it happens in a folder beside, `.add-<id>/`, whose lock keeps two runs for one id apart; the store's own lock is
held for the renames alone. What was fetched outlives a killed run, what was made of it does not.
"""

import contextlib
import functools
import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from chassis.errors import Code, PlatformError
from modelstore import folders, gguf_llama, origins, prepare, store
from modelstore.formats import WEIGHTS_NAME, formats_of, link_files, pack
from modelstore.hub import DEFAULT_ENDPOINT, Hub, HubModel
from modelstore.manifest import Manifest, sha256_of, write_manifest
from modelstore.origins import Origin
from modelstore.packing import PackFormat

_WAIT_S = 4 * 3600.0  # another add of the same model may be fetching it
_SPARE_BYTES = 64 * 1024 * 1024

Progress = Callable[[str, int, int], None]  # step, done, total


@dataclass(frozen=True, slots=True)
class Order:
    """What is to be added. `forms` are the packed formats beside bf16; `pins` map file names to sums known before."""

    source: str
    model_id: str | None = None
    forms: tuple[PackFormat, ...] = ("int4",)
    revision: str = ""
    pins: Mapping[str, str] = field(default_factory=dict)
    endpoint: str = DEFAULT_ENDPOINT
    token: str = field(default="", repr=False)


@dataclass(frozen=True, slots=True)
class Added:
    """A model that stands in the store; `is_new` says whether this run changed anything. `notes` are for people."""

    manifest: Manifest
    is_new: bool
    notes: tuple[str, ...]


def add(root: Path, order: Order, progress: Progress) -> Added:
    """Adds a model to the store at `root`. Blocks for as long as it takes.

    Raises PlatformError: INVALID_ARGUMENT for what is refused, FAILED_PRECONDITION for what cannot be served, DATA_LOSS
    for damage and other sums, CONFLICT where the id holds another model, UNAVAILABLE without a network; and OSError.
    """
    origin = origins.resolve(order.source, order.revision)
    model_id = origins.model_id_of(origin, order.model_id)
    root.mkdir(parents=True, exist_ok=True)
    who = f"another run has added {model_id}"
    with store.lock_file(root / f".add-{model_id}.lock", _WAIT_S, who, lambda: progress("wait for another add", 0, 1)):
        run = _Run(root, model_id, order, progress)
        try:
            return run.add_package(origin) if origin.package else run.add(origin)
        finally:
            run.tidy()


def forget(root: Path, model_id: str) -> None:
    """Deletes what an unfinished add of a model left."""
    shutil.rmtree(root / f".add-{model_id}", ignore_errors=True)
    with contextlib.suppress(FileNotFoundError):
        (root / f".add-{model_id}.lock").unlink()


class _Run:
    """One add, with its lock held."""

    def __init__(self, root: Path, model_id: str, order: Order, progress: Progress) -> None:
        self._root = root
        self._id = model_id
        self._order = order
        self._progress = progress
        self._work = root / f".add-{model_id}"
        self._made = self._work / "made"
        self._notes: list[str] = []

    def add_package(self, origin: Origin) -> Added:
        """What the table pins, modelstore.prepare makes, in a process of its own; then the formats beyond the table."""
        assert origin.package is not None
        before = self._version()
        if self._order.pins:
            origins.check_pins(self._order.pins, {Path(n).name: s for n, s in origin.package.inputs.items()})
        self._notes.append(f"verified against the table of sources: {', '.join(map(_name, origin.package.inputs))}")
        prepare.prepare_apart(self._root, self._id, self._progress)
        manifest = Manifest.load(self._root / self._id)
        if manifest.kind == "llm":
            manifest = self._with_forms(manifest)
        return Added(manifest, manifest.version != before, tuple(self._notes))

    def tidy(self) -> None:
        """Leaves nothing but what was fetched and is not yet used."""
        shutil.rmtree(self._made, ignore_errors=True)
        with contextlib.suppress(OSError):  # not empty, or never made
            self._work.rmdir()

    def add(self, origin: Origin) -> Added:
        """A folder, a file or a repository."""
        self._work.mkdir(exist_ok=True)
        known = self._standing()
        if origin.repository:
            fetched = self._fetch(origin, known)
            if fetched is None:  # the very commit that stands
                assert known is not None
                manifest = self._with_forms(known)
                return Added(manifest, manifest.version != known.version, tuple(self._notes))
            folder, names, told = fetched
        elif origin.path and origin.path.is_dir():
            choice = folders.choose([path.name for path in origin.path.iterdir() if path.is_file()])
            folder, names, told = origin.path, choice.names, {"type": "folder", "name": origin.name}
        else:
            assert origin.path is not None
            folder, names, told = origin.path.parent, (origin.path.name,), {"type": "gguf", "name": origin.name}
        sums = self._sums(folder, names)
        origins.check_pins(self._order.pins, sums)
        self._note_trust(sums, told)
        source = {**told, "sha256": origins.digest_of(sums), "files": sums}
        if known is None:
            manifest = self._make(folder, names, source)
        else:
            _check_same(known, source)
            manifest = known
        had = known.version if known else ""
        manifest = self._with_forms(manifest)
        shutil.rmtree(self._work, ignore_errors=True)
        return Added(manifest, manifest.version != had, tuple(self._notes))

    def _further(self, step: str, before: int, total: int, have: int) -> None:
        self._progress(step, before + have, total)

    def _version(self) -> str:
        try:
            return Manifest.load(self._root / self._id).version
        except PlatformError:
            return ""

    def _standing(self) -> Manifest | None:
        """Returns the model that has the id already, if it is whole; a damaged one may be made again."""
        if not (self._root / self._id).exists():
            return None
        manifest = Manifest.load(self._root / self._id)
        try:
            manifest.verify()
        except PlatformError as error:
            self._notes.append(f"made again, for it was damaged: {error.message}")
            return None
        return manifest

    def _fetch(self, origin: Origin, known: Manifest | None) -> tuple[Path, tuple[str, ...], dict[str, str]] | None:
        """Brings a repository's files to a folder; None where the standing model was made of this commit."""
        with Hub(self._order.endpoint, self._order.token) as hub:
            self._progress("look up", 0, 1)
            model = hub.look_up(origin.repository, origin.revision)
            if known and (known.source.get("name"), known.source.get("commit")) == (origin.repository, model.commit):
                origins.check_pins(self._order.pins, known.source["files"])
                return None
            choice = folders.choose([file.name for file in model.files])
            files = [model.file(name) for name in choice.names]
            _check_announced(known, model, choice.weights)
            folder = self._staging(model)
            total = sum(file.size_bytes for file in files)
            left = total - sum(path.stat().st_size for path in folder.iterdir())
            store.check_space(self._root, f"fetching {origin.repository}", left + _SPARE_BYTES)
            done = 0
            for file in files:
                hub.fetch(model, file, folder, functools.partial(self._further, "fetch", done, total))
                done += file.size_bytes
        self._note_ignored(choice)
        told = {
            "type": "hub",
            "name": origin.repository,
            "endpoint": self._order.endpoint,
            "revision": origin.revision,
            "commit": model.commit,
        }
        return folder, choice.names, told

    def _staging(self, model: HubModel) -> Path:
        """Returns where a commit's files are fetched to; those of another commit go."""
        folder = self._work / f"fetch-{model.repository.replace('/', '--')}-{model.commit}"
        for path in self._work.iterdir():
            if path != folder:
                shutil.rmtree(path, ignore_errors=True)
        folder.mkdir(exist_ok=True)
        return folder

    def _sums(self, folder: Path, names: tuple[str, ...]) -> dict[str, str]:
        total, done, sums = sum((folder / name).stat().st_size for name in names), 0, {}
        for name in names:
            path = folder / name
            sums[name] = sha256_of(path, functools.partial(self._further, "check sums", done, total))
            done += path.stat().st_size
        return sums

    def _make(self, folder: Path, names: tuple[str, ...], source: Mapping[str, Any]) -> Manifest:
        size_bytes = sum((folder / name).stat().st_size for name in names)
        # bf16 of numbers that had 4 bits takes four times their size; the packed weights come on top.
        factor = 5 if source["type"] == "gguf" else 2
        store.check_space(self._root, f"model {self._id}", factor * size_bytes + _SPARE_BYTES)
        made, converted = self._empty(), functools.partial(self._progress, "convert")
        if source["type"] == "gguf":
            config = gguf_llama.convert(folder / names[0], made, converted)
            folders.check_made(made)
        else:
            choice = folders.choose([path.name for path in folder.iterdir() if path.is_file()])
            if source["type"] == "folder":
                self._note_ignored(choice)
            config = folders.convert(folder, choice, made, converted)
        return self._stand(made, config | self._packed(made, config), source, int(time.time()))

    def _with_forms(self, manifest: Manifest) -> Manifest:
        """Adds the packed formats that a standing model lacks."""
        if all(form in formats_of(manifest) for form in self._order.forms):
            return manifest
        made = self._empty()
        store.check_space(self._root, f"model {self._id}", manifest.path(WEIGHTS_NAME).stat().st_size)
        link_files(manifest, made)
        config = dict(manifest.config)
        config |= self._packed(made, config)
        # An adapter that knows its base's version alone finds it here.
        config["earlier_versions"] = [*config.get("earlier_versions", []), manifest.version]
        return self._stand(made, config, manifest.source, manifest.created_unix_s)

    def _empty(self) -> Path:
        shutil.rmtree(self._made, ignore_errors=True)  # a killed run's
        self._made.mkdir(parents=True)
        return self._made

    def _packed(self, made: Path, config: Mapping[str, Any]) -> dict[str, Any]:
        found = dict(config.get("quantisation", {}))
        for form in self._order.forms:
            if form not in found:
                packing = functools.partial(self._progress, f"pack {form}")
                found[form] = pack(made, form, source_dtype=str(config["dtype"]), progress=packing)
        return {"quantisation": found}

    def _stand(self, made: Path, config: Mapping[str, Any], source: Mapping[str, Any], created_unix_s: int) -> Manifest:
        self._progress("write", 0, 1)
        write_manifest(made, model_id=self._id, kind="llm", created_unix_s=created_unix_s, source=source, config=config)
        with store.locked(self._root):
            store.put_in_place(made, self._root / self._id)
        self._progress("write", 1, 1)
        return Manifest.load(self._root / self._id)

    def _note_trust(self, sums: Mapping[str, str], told: Mapping[str, str]) -> None:
        pinned = [name for name in sums if name in self._order.pins]
        rest = [name for name in sums if name not in self._order.pins]
        if pinned:
            self._notes.append(f"verified against the sums that you gave: {', '.join(pinned)}")
        if rest and told["type"] == "hub":
            self._notes.append(f"verified against what the hub announced, and trusted as it stands: {', '.join(rest)}")
        elif rest:
            self._notes.append(f"trusted as they are, their sums recorded: {', '.join(rest)}")

    def _note_ignored(self, choice: folders.Choice) -> None:
        if choice.ignored:
            self._notes.append(f"never opened: {', '.join(choice.ignored[:8])}")


def _check_same(known: Manifest, source: Mapping[str, Any]) -> None:
    if known.source.get("sha256") != source["sha256"]:
        raise PlatformError(
            Code.CONFLICT,
            f"{known.id} stands in the store already, from other files: sha256 {known.source.get('sha256')} there, "
            f"{source['sha256']} here. Remove it first (models remove {known.id}) or choose another name: --id",
        )


def _check_announced(known: Manifest | None, model: HubModel, weights: tuple[str, ...]) -> None:
    """Refuses other weights under a known id by what the hub announces, before gigabytes were fetched for nothing."""
    if known is None:
        return
    recorded = known.source.get("files", {})
    for name in weights:
        sha256 = model.file(name).sha256
        if sha256 and recorded.get(name) != sha256:
            _check_same(known, {"sha256": f"{sha256} of {name}"})


def _name(path: str) -> str:
    return os.path.basename(path)
