"""Makes every model of the table from the installed packages: `python -m modelstore.prepare --store DIR`.

Nothing is downloaded. A model that is there and whole is left alone; a damaged one is made again. A model appears at
once or not at all: it is made in a folder beside its place and renamed.
Lines on stdout: `progress <model> <step> <i>/<n>` and at last `ready <model> <version>`.
"""

import argparse
import contextlib
import errno
import fcntl
import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from chassis.errors import Code, PlatformError
from modelstore import minilm, smollm2
from modelstore.manifest import Manifest, write_manifest
from modelstore.sources import ModelSource, check_sums, load_sources, locate_inputs

_STEPS = ("check-source", "convert", "write", "verify")
_MAKING = ".making-"
_REPLACED = ".replaced-"
_LOCK_WAIT_S = 600.0
_LOCK_POLL_S = 0.2


def prepare(store: Path, sources: tuple[ModelSource, ...]) -> None:
    """Brings `store` to hold every model; raises PlatformError or OSError and leaves what was there."""
    store.mkdir(parents=True, exist_ok=True)
    with _locked(store):
        _remove_leftovers(store)
        for source in sources:
            manifest = _present(store, source) or _make(store, source)
            _say("ready", source.id, manifest.version)


def _present(store: Path, source: ModelSource) -> Manifest | None:
    """Returns the manifest of a model that is there, is whole and is what the table says."""
    directory = store / source.id
    if not directory.exists():
        return None
    try:
        manifest = Manifest.load(directory)
        manifest.verify()
    except PlatformError as error:
        print(f"warning: {error.message}; it is made again", file=sys.stderr, flush=True)
        return None
    sums = {entry.path: entry.sha256 for entry in manifest.files}
    same_source = manifest.id == source.id and manifest.source.get("sha256") == source.inputs[source.weights]
    return manifest if same_source and source.outputs.items() <= sums.items() else None


def _make(store: Path, source: ModelSource) -> Manifest:
    _step(source, "check-source")
    version, inputs = locate_inputs(source)
    check_sums(f"source of model {source.id}", source.inputs, inputs)
    if (free_bytes := shutil.disk_usage(store).free) < source.needed_bytes:
        why = f"model {source.id} needs {source.needed_bytes} bytes, {free_bytes} are free in {store}"
        raise OSError(errno.ENOSPC, why)
    making = store / f"{_MAKING}{source.id}-{os.getpid()}"
    making.mkdir()
    try:
        _step(source, "convert")
        config = _convert(source, inputs, making)
        _step(source, "write")
        check_sums(f"converted model {source.id}", source.outputs, {n: making / n for n in source.outputs})
        origin = {
            "package": source.package,
            "version": version,
            "file": source.weights,
            "sha256": source.inputs[source.weights],
        }
        write_manifest(
            making,
            model_id=source.id,
            kind=source.kind,
            created_unix_s=source.created_unix_s,
            source=origin,
            config=config,
        )
        _settle(making)
        _step(source, "verify")
        Manifest.load(making).verify()
        _put_in_place(making, store / source.id)
    finally:
        shutil.rmtree(making, ignore_errors=True)
    return Manifest.load(store / source.id)


def _convert(source: ModelSource, inputs: dict[str, Path], target: Path) -> dict[str, Any]:
    if source.id == "all-minilm-l6-v2":
        return minilm.convert(inputs, target)
    last = 0.0

    def progress(done: int, total: int) -> None:
        nonlocal last
        if done == total or time.monotonic() - last > 1.0:
            last = time.monotonic()
            _say("progress", source.id, "convert-weights", f"{done}/{total}")

    return smollm2.convert(inputs[source.weights], target, progress)


def _settle(directory: Path) -> None:
    """Makes the files readable by all, and durable before the rename makes them visible."""
    directory.chmod(0o755)
    for path in [*directory.iterdir(), directory]:
        if path.is_file():
            path.chmod(0o644)
        _fsync(path)


def _put_in_place(making: Path, place: Path) -> None:
    replaced = place.with_name(f"{_REPLACED}{place.name}-{os.getpid()}")
    if place.exists():
        os.rename(place, replaced)
    os.rename(making, place)
    _fsync(place.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_leftovers(store: Path) -> None:
    """Clears what a killed run left; the lock says that nobody is at it now."""
    for path in store.iterdir():
        if path.name.startswith((_MAKING, _REPLACED)):
            shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def _locked(store: Path) -> Iterator[None]:
    """Keeps a second run out until this one ends; the kernel frees the lock of a killed one."""
    deadline_s = time.monotonic() + _LOCK_WAIT_S
    with (store / ".lock").open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() > deadline_s:
                    message = f"another run has prepared {store} for more than {_LOCK_WAIT_S:.0f} s"
                    raise PlatformError(Code.DEADLINE_EXCEEDED, message) from error
                time.sleep(_LOCK_POLL_S)
        yield


def _step(source: ModelSource, name: str) -> None:
    _say("progress", source.id, name, f"{_STEPS.index(name) + 1}/{len(_STEPS)}")


def _say(*words: str) -> None:
    print(*words, flush=True)


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="modelstore.prepare", description=__doc__.split("\n")[0])
    parser.add_argument("--store", type=Path, required=True, help="folder that holds one folder for each model")
    store: Path = parser.parse_args(arguments).store
    # Before transformers is imported: no hub is ever asked, and no bars between the progress lines.
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error"}
    try:
        prepare(store, load_sources())
    except PlatformError as error:
        print(f"error: {error.message}", file=sys.stderr)
        return 1
    except ImportError as error:
        print(f"error: {error}; install the locked requirements (make up does)", file=sys.stderr)
        return 1
    except OSError as error:
        why = "the disk is full" if error.errno == errno.ENOSPC else "cannot write the model store"
        print(f"error: {why}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
