"""Makes a model of the store from a folder in transformers' form: config.json, safetensors, tokenizer.json.

Which files of a folder (or of a hub's listing) are read is decided by their names alone, before any is opened.
"""

import functools
import json
import re
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chassis.errors import Code, PlatformError
from modelstore import vetting
from modelstore.formats import WEIGHTS_NAME
from modelstore.packing import Progress
from modelstore.tensors import TensorClaim, TensorEntry, TensorFile, write_tensors

_CONFIG = "config.json"
_SIDE_FILES = ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
_SHARD = re.compile(r"model-(\d{5})-of-(\d{5})\.safetensors", re.ASCII)
_DROPPED = ("auto_map", "chat_template", "_name_or_path", "transformers_version")


@dataclass(frozen=True, slots=True)
class Choice:
    """The files of a source that are read; `ignored` are those that look as if they mattered and are never opened."""

    weights: tuple[str, ...]
    others: tuple[str, ...]
    ignored: tuple[str, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """All that is read, the small ones first."""
        return (*self.others, *self.weights)


def choose(names: Collection[str]) -> Choice:
    """Picks the files of a model by name. Raises PlatformError(INVALID_ARGUMENT) where they make none."""
    ignored = tuple(sorted(n for n in names if n.endswith((*vetting.PICKLES, ".py"))))
    weights = [WEIGHTS_NAME] if WEIGHTS_NAME in names else sorted(n for n in names if _SHARD.fullmatch(n))
    if not weights:
        if pickles := [name for name in ignored if not name.endswith(".py")]:
            why = f"its weights are there only as {pickles[0]}: loading a pickle runs code; convert it to safetensors"
        elif "adapter_model.safetensors" in names:
            why = "it is an adapter, not a model"
        else:
            why = f"it has no {WEIGHTS_NAME}"
        raise _refused(why)
    if _CONFIG not in names:
        raise _refused(f"it has no {_CONFIG}")
    if found := _SHARD.fullmatch(weights[0]):
        count = int(found[2])
        wanted = [f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]
        if missing := sorted(set(wanted) - set(weights)):
            raise _refused(f"{len(missing)} of {count} parts of its weights are missing, such as {missing[0]}")
        weights = wanted
    return Choice(tuple(weights), (_CONFIG, *(name for name in _SIDE_FILES if name in names)), ignored)


def convert(folder: Path, choice: Choice, target: Path, progress: Progress) -> dict[str, Any]:
    """Checks a folder's files, then writes the model's into `target`; returns the `config` of its manifest.

    Raises PlatformError before anything large is read where a check can tell. Weights become bf16.
    """
    config = vetting.read_json(folder / _CONFIG)
    shape = vetting.check_config(config)
    files = [TensorFile(folder / name) for name in choice.weights]
    entries = _joined(files)
    vetting.check_weights(shape, {name: entry for name, (_, entry) in entries.items()})
    vetting.check_tokenizer(folder / "tokenizer.json", shape)
    generation = _optional(folder, "generation_config.json", choice)
    tokenizer_config = _optional(folder, "tokenizer_config.json", choice)
    vetting.refuse_code(tokenizer_config, "tokenizer_config.json")
    template = vetting.read_template(folder, tokenizer_config)
    eos_token_ids = vetting.eos_token_ids(config, generation)

    source_dtype = _write_weights(entries, list(shape.tensors()), files, target / WEIGHTS_NAME, progress)
    shutil.copyfile(folder / "tokenizer.json", target / "tokenizer.json")
    _write_json(target / _CONFIG, _kept(config) | {"dtype": "bfloat16"})
    _write_json(target / "tokenizer_config.json", _kept(tokenizer_config))
    if generation:
        _write_json(target / "generation_config.json", _kept(generation))
    if template is not None:
        (target / "chat_template.jinja").write_text(template, encoding="utf-8")
    return {
        "architecture": "llama",
        "dtype": "bfloat16",
        "source_dtype": source_dtype,
        "context_length": shape.context_length,
        "vocab_size": shape.vocab_size,
        "eos_token_ids": eos_token_ids,
    }


def check_made(folder: Path) -> None:
    """Holds what was converted from another form to what is asked of a folder."""
    shape = vetting.check_config(vetting.read_json(folder / _CONFIG))
    vetting.check_weights(shape, TensorFile(folder / WEIGHTS_NAME).entries)
    vetting.check_tokenizer(folder / "tokenizer.json", shape)
    vetting.read_template(folder, vetting.read_json(folder / "tokenizer_config.json"))


def _joined(files: list[TensorFile]) -> dict[str, tuple[TensorFile, TensorEntry]]:
    found: dict[str, tuple[TensorFile, TensorEntry]] = {}
    for file in files:
        for name, entry in file.entries.items():
            if name in found:
                raise PlatformError(Code.DATA_LOSS, f"tensor {name!r} is in two parts of the weights", param="source")
            found[name] = (file, entry)
    return found


def _write_weights(
    entries: Mapping[str, tuple[TensorFile, TensorEntry]],
    names: list[str],
    files: list[TensorFile],
    target: Path,
    progress: Progress,
) -> str:
    """Writes the named tensors as bf16, one at a time; returns the type that they had."""
    num_done = 0

    def make(name: str) -> NDArray[Any]:
        nonlocal num_done
        file, entry = entries[name]
        values = file.raw(name) if entry.dtype == "BF16" else to_bf16(file.float32(name))
        if ((values & 0x7F80) == 0x7F80).any():  # all bits of the exponent: infinite, or not a number
            raise PlatformError(Code.DATA_LOSS, f"tensor {name!r} holds numbers that are not finite", param="source")
        num_done += 1
        progress(num_done, len(names))
        return values

    dtypes = {entries[name][1].dtype for name in names}
    if dtypes == {"BF16"} and len(files) == 1 and len(entries) == len(names):
        for name in names:
            make(name)
        shutil.copyfile(files[0].path, target)  # as it is: its sum stays the one that others know
    else:
        claims = {n: TensorClaim("BF16", entries[n][1].shape, functools.partial(make, n)) for n in names}
        write_tensors(target, claims, {"format": "pt"})
    return "+".join(sorted(dtypes))


def to_bf16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Returns the nearest bfloat16 of each number, ties to even, as its 16 bits."""
    bits = values.view(np.uint32)
    return ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)


def _optional(folder: Path, name: str, choice: Choice) -> dict[str, Any]:
    return vetting.read_json(folder / name) if name in choice.others else {}


def _kept(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in _DROPPED}


def _write_json(path: Path, document: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def _refused(why: str) -> PlatformError:
    return PlatformError(Code.INVALID_ARGUMENT, f"the model is refused: {why}", param="source")
