"""The forms in which a model folder holds its weights: bf16 for training and torch, packed for the native engine.

A manifest's config says of each packed form: `quantisation: {<form>: {file, group_size, layout, source_dtype}}`.
"""

from collections.abc import Collection
from pathlib import Path
from typing import Any

from modelstore.manifest import Manifest
from modelstore.packing import GROUP, LAYOUT, PackFormat, Progress, pack_model, pack_name
from modelstore.store import link_or_copy
from modelstore.tensors import TensorFile

WEIGHTS_NAME = "model.safetensors"
_DTYPE_NAMES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}


def dtype_of(folder: Path) -> str:
    """Returns the name of the type that most of the weights of a folder have."""
    counts: dict[str, int] = {}
    for entry in TensorFile(folder / WEIGHTS_NAME).entries.values():
        counts[entry.dtype] = counts.get(entry.dtype, 0) + entry.end - entry.start
    most = max(counts, key=lambda name: counts[name])
    return _DTYPE_NAMES.get(most, most)


def pack(folder: Path, form: PackFormat, *, source_dtype: str, progress: Progress) -> dict[str, Any]:
    """Packs the weights of a folder in place; returns the form's entry for the manifest. Blocks for long."""
    name = pack_name(form)
    pack_model(folder, folder / name, form, progress)
    return {"file": name, "group_size": GROUP, "layout": LAYOUT, "source_dtype": source_dtype}


def link_files(manifest: Manifest, target: Path, without: Collection[str] = ()) -> None:
    """Gives every listed file a second name in `target`, but for those named in `without`."""
    for entry in manifest.files:
        if entry.path not in without:
            link_or_copy(manifest.path(entry.path), target / entry.path)


def formats_of(manifest: Manifest) -> list[str]:
    """Returns the forms of a model's weights by name, the unpacked one first."""
    plain = {"bfloat16": "bf16", "float32": "fp32"}.get(str(manifest.config.get("dtype")), "")
    return [name for name in (plain, *manifest.config.get("quantisation", {})) if name]


def size_bytes_of(manifest: Manifest, form: str) -> int:
    """Returns the size of a model's weights in one form; 0 for a form that it has not."""
    entry = manifest.config.get("quantisation", {}).get(form)
    name = entry["file"] if entry else WEIGHTS_NAME
    return sum(file.size_bytes for file in manifest.files if file.path == name)
