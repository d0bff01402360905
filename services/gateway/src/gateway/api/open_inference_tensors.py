"""The elements of tensors as bytes: little-endian, each of BYTES behind its length in four bytes.

As Triton's binary data extension has them, in REST bodies and in raw_input_contents alike. Every platform that we run
on is little-endian.
"""

import struct
from array import array
from collections.abc import Sequence

from chassis.errors import Code, PlatformError
from gateway.core.open_inference import MAX_ELEMENTS, Tensor

BYTES = "BYTES"
_TYPECODES = {
    "BOOL": "B",
    "UINT8": "B",
    "UINT16": "H",
    "UINT32": "I",
    "UINT64": "Q",
    "INT8": "b",
    "INT16": "h",
    "INT32": "i",
    "INT64": "q",
    "FP32": "f",
    "FP64": "d",
}
DATATYPES = (BYTES, *_TYPECODES)


def from_raw(name: str, datatype: str, shape: Sequence[int], raw: bytes) -> Tensor:
    """Reads a tensor; raises INVALID_ARGUMENT where bytes are too few, too many or of an unknown type."""
    if datatype == BYTES:
        tensor = Tensor(name, datatype, tuple(shape), _texts(name, raw))
    else:
        check_datatype(name, datatype)
        values = array(_TYPECODES[datatype])
        if len(raw) % values.itemsize or len(raw) // values.itemsize > MAX_ELEMENTS:
            raise _bad(name, f"{len(raw)} bytes are not its elements")
        values.frombytes(raw)
        tensor = Tensor(name, datatype, tuple(shape), [bool(v) for v in values] if datatype == "BOOL" else values)
    tensor.check()
    return tensor


def check_datatype(name: str, datatype: str) -> None:
    """Raises INVALID_ARGUMENT for a type that no input of ours has."""
    if datatype not in DATATYPES:
        raise _bad(name, f"the datatype {datatype[:40]!r} is not one of {', '.join(DATATYPES)}")


def _texts(name: str, raw: bytes) -> list[bytes]:
    found: list[bytes] = []
    at = 0
    while at < len(raw):
        if at + 4 > len(raw) or len(found) == MAX_ELEMENTS:
            raise _bad(name, "its elements are cut short, or too many")
        (size,) = struct.unpack_from("<I", raw, at)
        at += 4
        if at + size > len(raw):
            raise _bad(name, "an element is longer than the bytes that are there")
        found.append(raw[at : at + size])
        at += size
    return found


def to_raw(tensor: Tensor) -> bytes:
    """Writes a tensor's elements."""
    if tensor.datatype == BYTES:
        return b"".join(struct.pack("<I", len(one)) + one for one in tensor.values if isinstance(one, bytes))
    if isinstance(tensor.values, array):
        return tensor.values.tobytes()
    numbers = [one for one in tensor.values if not isinstance(one, bytes)]
    return array(_TYPECODES[tensor.datatype], numbers).tobytes()


def _bad(name: str, why: str) -> PlatformError:
    return PlatformError(
        Code.INVALID_ARGUMENT, f"the tensor {name[:100]!r}: {why}", param=name[:100], reason="invalid_value"
    )
