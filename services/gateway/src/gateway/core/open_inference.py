"""What the Open Inference Protocol v2 speaks of: models by name, tensors in, tensors out.

https://github.com/kserve/open-inference-protocol. Knows neither REST nor gRPC: both read their requests into these.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from chassis.errors import Code, PlatformError

Parameter = bool | int | float | str
MAX_ELEMENTS = 65_536  # of one tensor that a client sends
ONLY_VERSION = "1"
_LARGE_ELEMENTS = 24_576  # 64 embeddings of 384


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor; values row by row: bytes for BYTES, else numbers or bools."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    values: Sequence[bytes] | Sequence[bool | int | float]

    def check(self) -> None:
        """Raises INVALID_ARGUMENT where the shape does not hold the values."""
        if math.prod(self.shape) != len(self.values):
            raise PlatformError(
                Code.INVALID_ARGUMENT,
                f"the tensor {self.name[:100]!r} has {len(self.values)} elements, and the shape {list(self.shape)}",
                param=self.name,
                reason="invalid_value",
            )


@dataclass(frozen=True, slots=True)
class InferRequest:
    """Asks a model. outputs: the names of those that are wanted, none for all."""

    model: str
    version: str = ""
    id: str = ""
    parameters: Mapping[str, Parameter] = field(default_factory=dict)
    inputs: tuple[Tensor, ...] = ()
    outputs: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class InferResponse:
    """What a model gives."""

    model: str
    id: str
    outputs: tuple[Tensor, ...]
    parameters: Mapping[str, Parameter] = field(default_factory=dict)

    @property
    def is_large(self) -> bool:
        """It takes over 5 ms to write and would hold up the event loop."""
        return sum(len(output.values) for output in self.outputs) > _LARGE_ELEMENTS


@dataclass(frozen=True, slots=True)
class TensorKind:
    """What a model says of a tensor; -1 in the shape is any size."""

    name: str
    datatype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ModelKind:
    """What a model takes and gives. Its parameters are those of the route that its platform names."""

    name: str
    platform: str
    inputs: tuple[TensorKind, ...]
    outputs: tuple[TensorKind, ...]


def check_version(version: str) -> None:
    """Raises NOT_FOUND for a version that no model has."""
    if version not in ("", ONLY_VERSION):
        raise PlatformError(
            Code.NOT_FOUND, f"no model has the version {version[:100]!r}; there is: {ONLY_VERSION}", param="version"
        )


def chosen(request: InferRequest, outputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The outputs that were asked for."""
    return tuple(one for one in outputs if not request.outputs or one.name in request.outputs)


def check_outputs(request: InferRequest, known: Sequence[str]) -> None:
    """Raises INVALID_ARGUMENT for an output that the model does not have."""
    for name in request.outputs:
        if name not in known:
            raise PlatformError(
                Code.INVALID_ARGUMENT,
                f"the model has no output {name[:100]!r}; there are: {', '.join(known)}",
                param="outputs",
                reason="invalid_value",
            )
