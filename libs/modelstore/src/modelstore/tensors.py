"""Reads safetensors files with numpy alone, and believes nothing that their headers claim; writes them.

safetensors' own reader hands numpy no bfloat16; here it becomes float32, exactly. Its writer holds all tensors at once
and gives the metadata in another order each time; here the same tensors give the same bytes.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chassis.errors import Code, PlatformError

MAX_HEADER_BYTES = 100 * 1024 * 1024  # the limit of the format's own implementation
_DTYPES: Mapping[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}


_ALIGNMENT = 64


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where a tensor lies: `start` counts from the beginning of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


class TensorFile:
    """A safetensors file, mapped into memory: nothing is read before it is used. Not for files that may change."""

    def __init__(self, path: Path) -> None:
        """Checks the header against the file. Raises PlatformError(DATA_LOSS) for a damaged or lying one."""
        self.path = path
        self.entries, self.metadata = _read_header(path)
        self._bytes: NDArray[np.uint8] = np.memmap(path, dtype=np.uint8, mode="r")

    def raw(self, name: str) -> NDArray[Any]:
        """Returns a tensor as a view into the file; bfloat16 as its 16 bits. Raises PlatformError(DATA_LOSS)."""
        entry = self._entry(name)
        return self._bytes[entry.start : entry.end].view(_DTYPES[entry.dtype]).reshape(entry.shape)

    def float32(self, name: str) -> NDArray[np.float32]:
        """Returns a tensor of floats as float32. Raises PlatformError(DATA_LOSS) for a missing one or another kind."""
        values = self.raw(name)
        match self._entry(name).dtype:
            case "BF16":
                return (values.astype(np.uint32) << 16).view(np.float32)
            case "F64" | "F32" | "F16":
                return np.ascontiguousarray(values, dtype=np.float32)
        raise _damaged(self.path, f"tensor {name!r} holds no floating-point numbers")

    def _entry(self, name: str) -> TensorEntry:
        if name not in self.entries:
            raise _damaged(self.path, f"tensor {name!r} is missing")
        return self.entries[name]


@dataclass(frozen=True, slots=True)
class TensorClaim:
    """A tensor that is to be written; `make` is called when its turn has come and gives its very bits."""

    dtype: str
    shape: tuple[int, ...]
    make: Callable[[], NDArray[Any]]

    @property
    def size_bytes(self) -> int:
        """How many bytes it takes."""
        return math.prod(self.shape) * _DTYPES[self.dtype].itemsize


def claim_of(values: NDArray[Any]) -> TensorClaim:
    """Returns the claim of an array that is there already."""
    name = next(name for name, dtype in _DTYPES.items() if dtype == values.dtype and name != "BF16")
    return TensorClaim(name, values.shape, lambda: values)


def write_tensors(path: Path, claims: Mapping[str, TensorClaim], metadata: Mapping[str, str]) -> None:
    """Writes tensors one after another, the widest numbers first. The same input gives the same bytes."""
    names = sorted(claims, key=lambda name: (-_DTYPES[claims[name].dtype].itemsize, name))
    document: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    end = 0
    for name in names:
        claim, start = claims[name], end
        end += claim.size_bytes
        document[name] = {"dtype": claim.dtype, "shape": list(claim.shape), "data_offsets": [start, end]}
    header = json.dumps(document, separators=(",", ":")).encode()
    header += b" " * (-(len(header) + 8) % _ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for name in names:
            values = np.ascontiguousarray(claims[name].make())
            assert values.nbytes == claims[name].size_bytes, name
            file.write(values.data.cast("B") if values.size else b"")


def _read_header(path: Path) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    size_bytes = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size_bytes < 8 or length > min(MAX_HEADER_BYTES, size_bytes - 8):
            raise _damaged(path, f"its header claims {length} bytes; the file has {size_bytes}")
        try:
            document = json.loads(file.read(length))
        except (ValueError, RecursionError) as error:
            raise _damaged(path, "its header is no JSON") from error
    if not isinstance(document, dict):
        raise _damaged(path, "its header is no JSON object")
    metadata = document.pop("__metadata__", {})
    if not isinstance(metadata, dict):
        raise _damaged(path, "its metadata are no JSON object")
    entries = {name: _read_entry(path, name, claim, 8 + length) for name, claim in document.items()}
    end = 8 + length
    for name, entry in sorted(entries.items(), key=lambda item: item[1].start):
        if entry.start != end:
            raise _damaged(path, f"tensor {name!r} overlaps another or leaves a gap")
        end = entry.end
    if end != size_bytes:
        raise _damaged(path, f"its tensors end at byte {end}; the file has {size_bytes}")
    return entries, {str(key): str(value) for key, value in metadata.items()}


def _read_entry(path: Path, name: str, claim: Any, offset: int) -> TensorEntry:
    try:
        dtype, shape, (start, end) = claim["dtype"], tuple(claim["shape"]), claim["data_offsets"]
        is_sound = dtype in _DTYPES and all(type(n) is int and n >= 0 for n in (*shape, start, end))
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(path, f"the header's entry of tensor {name!r} is malformed") from error
    if not is_sound or end - start != math.prod(shape) * _DTYPES[dtype].itemsize:
        raise _damaged(path, f"the header's entry of tensor {name!r} contradicts itself")
    return TensorEntry(dtype, shape, offset + start, offset + end)


def _damaged(path: Path, why: str) -> PlatformError:
    return PlatformError(Code.DATA_LOSS, f"{path.name} is damaged: {why}", retryable=False)
