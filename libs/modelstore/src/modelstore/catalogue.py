"""What a model store holds, and how a model leaves it."""

from dataclasses import dataclass
from pathlib import Path

from chassis.errors import Code, PlatformError
from modelstore import store
from modelstore.adding import forget
from modelstore.manifest import MANIFEST_NAME, Manifest

_ADAPTERS = "adapters"


@dataclass(frozen=True, slots=True)
class Entry:
    """One folder of the store. `problem` says why there is no manifest."""

    id: str
    folder: Path
    manifest: Manifest | None
    problem: str = ""

    @property
    def size_bytes(self) -> int:
        """All files of it, as they lie there."""
        return sum(path.stat().st_size for path in self.folder.iterdir() if path.is_file())


def entries(root: Path) -> list[Entry]:
    """Returns the models of a store, then the adapters, each by id. Reads manifests alone."""
    models = [_entry(path) for path in _folders(root) if path.name != _ADAPTERS]
    adapters = [_entry(path) for path in _folders(root / _ADAPTERS)]
    return sorted(models, key=lambda entry: entry.id) + sorted(adapters, key=lambda entry: entry.id)


def find(root: Path, model_id: str) -> Entry:
    """Returns a model or an adapter by its id. Raises NOT_FOUND, which names what there is."""
    found = entries(root)
    for entry in found:
        if entry.id == model_id:
            return entry
    known = ", ".join(entry.id for entry in found) or "nothing"
    raise PlatformError(Code.NOT_FOUND, f"there is no {model_id!r} in the model store; there is: {known}", param="id")


def adapters_of(root: Path, model_id: str) -> list[str]:
    """Returns the ids of the adapters that were made for a base."""
    found = [_entry(path).manifest for path in _folders(root / _ADAPTERS)]
    return sorted(manifest.id for manifest in found if manifest and manifest.config.get("base") == model_id)


def remove(root: Path, model_id: str, *, force: bool = False) -> None:
    """Removes a model, its unfinished adds with it.

    Raises NOT_FOUND; FAILED_PRECONDITION for one that adapters stand on, unless forced, and for an adapter: those
    belong to the job that made them.
    """
    if (root / f".add-{model_id}").exists() and not (root / model_id).exists():
        forget(root, model_id)
        return
    with store.locked(root):
        entry = find(root, model_id)
        if entry.folder.parent.name == _ADAPTERS:
            message = f"{model_id} is an adapter: it belongs to its finetuning job, and is not removed here"
            raise PlatformError(Code.FAILED_PRECONDITION, message, param="id")
        if not force and (adapters := adapters_of(root, model_id)):
            message = f"{len(adapters)} adapters stand on {model_id} and would answer no more: {', '.join(adapters)}"
            raise PlatformError(Code.FAILED_PRECONDITION, f"{message} (--force removes it anyway)", param="id")
        store.take_away(entry.folder)
    forget(root, model_id)


def _folders(root: Path) -> list[Path]:
    if not root.is_dir():
        return []
    return [path for path in root.iterdir() if path.is_dir() and not path.name.startswith(".")]


def _entry(folder: Path) -> Entry:
    try:
        manifest = Manifest.load(folder)
    except PlatformError as error:
        problem = f"no {MANIFEST_NAME}" if error.code is Code.NOT_FOUND else error.message
        return Entry(folder.name, folder, None, problem)
    return Entry(manifest.id, folder, manifest)
