"""Makes every model of the table from the installed packages: `python -m modelstore.prepare --store DIR`.

Nothing is downloaded. A model that is there and whole is left alone; a damaged one is made again; one that only lacks
its packed weights gets them in seconds. A model appears at once or not at all (modelstore.store).
Lines on stdout: `progress <model> <step> <i>/<n>` and at last `ready <model> <version>`.
"""

import argparse
import errno
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from chassis.errors import Code, PlatformError
from modelstore import gguf_llama, minilm
from modelstore.formats import WEIGHTS_NAME, dtype_of, link_files, pack
from modelstore.manifest import Manifest, write_manifest
from modelstore.packing import pack_name
from modelstore.sources import ModelSource, check_sums, load_sources, locate_inputs
from modelstore.store import check_space, locked, making, put_in_place

_STEPS = ("check-source", "convert", "write", "verify")


def prepare(store: Path, sources: tuple[ModelSource, ...]) -> None:
    """Brings `store` to hold every model; raises PlatformError or OSError and leaves what was there."""
    with locked(store):
        for source in sources:
            manifest = _whole(store, source)
            if manifest is None:
                manifest = _make(store, source)
            elif not _has(manifest, source.outputs):
                manifest = _pack_again(store, source, manifest)
            _say("ready", source.id, manifest.version)


def prepare_apart(store: Path, model_id: str, progress: Callable[[str, int, int], None]) -> None:
    """Makes one model of the table in a process of its own, whose libraries know of no hub. Raises PlatformError."""
    argv = [sys.executable, "-u", "-m", "modelstore.prepare", "--store", str(store), "--only", model_id]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        last = ""
        for line in process.stdout:
            last = line.strip() or last
            match line.split():
                case ["progress", _, step, count]:
                    done, _, total = count.partition("/")
                    progress(step, int(done), int(total))
    if process.returncode:
        raise PlatformError(Code.FAILED_PRECONDITION, last.removeprefix("error: "))


def _whole(store: Path, source: ModelSource) -> Manifest | None:
    """Returns the manifest of a model that is there, is whole and is what the table says, its packed weights aside."""
    directory = store / source.id
    if not directory.exists():
        return None
    try:
        manifest = Manifest.load(directory)
        manifest.verify()
    except PlatformError as error:
        print(f"warning: {error.message}; it is made again", file=sys.stderr, flush=True)
        return None
    same_source = manifest.id == source.id and manifest.source.get("sha256") == source.inputs[source.weights]
    packed = {pack_name(form) for form in source.packs}
    converted = {name: sha256 for name, sha256 in source.outputs.items() if name not in packed}
    return manifest if same_source and _has(manifest, converted) else None


def _has(manifest: Manifest, sums: Mapping[str, str]) -> bool:
    return sums.items() <= {entry.path: entry.sha256 for entry in manifest.files}.items()


def _make(store: Path, source: ModelSource) -> Manifest:
    _step(source, "check-source")
    version, inputs = locate_inputs(source)
    check_sums(f"source of model {source.id}", source.inputs, inputs)
    check_space(store, f"model {source.id}", source.needed_bytes)
    with making(store, source.id) as folder:
        _step(source, "convert")
        config = _convert(source, inputs, folder)
        config |= _packed(source, folder)
        _step(source, "write")
        check_sums(f"converted model {source.id}", source.outputs, {n: folder / n for n in source.outputs})
        origin = {
            "package": source.package,
            "version": version,
            "file": source.weights,
            "sha256": source.inputs[source.weights],
        }
        write_manifest(
            folder,
            model_id=source.id,
            kind=source.kind,
            created_unix_s=source.created_unix_s,
            source=origin,
            config=config,
        )
        _step(source, "verify")
        Manifest.load(folder).verify()
        put_in_place(folder, store / source.id)
    return Manifest.load(store / source.id)


def _pack_again(store: Path, source: ModelSource, old: Manifest) -> Manifest:
    """Brings a model of an earlier version of this program up to date without converting its weights again."""
    _step(source, "write")
    with making(store, source.id) as folder:
        packed = {str(entry["file"]) for entry in old.config.get("quantisation", {}).values()}
        link_files(old, folder, without=packed | {pack_name(form) for form in source.packs})
        check_space(store, f"model {source.id}", (folder / WEIGHTS_NAME).stat().st_size)
        config = dict(old.config) | _packed(source, folder)
        check_sums(f"packed model {source.id}", source.outputs, {n: folder / n for n in source.outputs})
        write_manifest(
            folder,
            model_id=source.id,
            kind=source.kind,
            created_unix_s=source.created_unix_s,
            source=old.source,
            config=config,
        )
        _step(source, "verify")
        put_in_place(folder, store / source.id)
    return Manifest.load(store / source.id)


def _packed(source: ModelSource, folder: Path) -> dict[str, Any]:
    """Packs the weights, if the table says so; returns what the manifest's config says of it."""
    if not source.packs:
        return {}
    quantisation = {
        form: pack(folder, form, progress=_progress(source, f"pack-{form}"), source_dtype=dtype_of(folder))
        for form in source.packs
    }
    return {"quantisation": quantisation, "earlier_versions": list(source.earlier_versions)}


def _convert(source: ModelSource, inputs: dict[str, Path], target: Path) -> dict[str, Any]:
    if source.id == "all-minilm-l6-v2":
        return minilm.convert(inputs, target)
    return gguf_llama.convert(inputs[source.weights], target, _progress(source, "convert-weights"))


def _progress(source: ModelSource, name: str) -> Callable[[int, int], None]:
    """Returns a callback that says how far a long step is, once a second."""
    last = 0.0

    def progress(done: int, total: int) -> None:
        nonlocal last
        if done == total or time.monotonic() - last > 1.0:
            last = time.monotonic()
            _say("progress", source.id, name, f"{done}/{total}")

    return progress


def _step(source: ModelSource, name: str) -> None:
    _say("progress", source.id, name, f"{_STEPS.index(name) + 1}/{len(_STEPS)}")


def _say(*words: str) -> None:
    print(*words, flush=True)


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="modelstore.prepare", description=__doc__.split("\n")[0])
    parser.add_argument("--store", type=Path, required=True, help="folder that holds one folder for each model")
    parser.add_argument("--only", metavar="ID", help="the one model to make; without it, all of the table")
    given = parser.parse_args(arguments)
    sources = tuple(source for source in load_sources() if given.only in (None, source.id))
    if not sources:
        parser.error(f"there is no model {given.only!r} in the table")
    # Before transformers is imported: no hub is ever asked, and no bars between the progress lines.
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error"}
    try:
        prepare(given.store, sources)
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
