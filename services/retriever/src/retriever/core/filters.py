"""Typed conditions on metadata, evaluated here and never written into a store's expression: nothing can be injected."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from chassis.errors import Code, PlatformError

MAX_CONDITIONS = 32
MAX_VALUES = 100
MAX_KEY_CHARS = 128

Scalar = str | int | float | bool | None


class Operator(StrEnum):
    """Comparisons."""

    EQ = "eq"
    NE = "ne"
    LT = "lt"
    LE = "le"
    GT = "gt"
    GE = "ge"
    IN = "in"


@dataclass(frozen=True, slots=True)
class Condition:
    """One condition: a metadata key, a comparison, one value (several for IN)."""

    key: str
    operator: Operator
    values: tuple[Scalar, ...]

    def holds(self, metadata: dict[str, object]) -> bool:
        """Tells whether metadata meets it. An absent key meets NE alone; values of other types are never ordered."""
        present, value = self.key in metadata, metadata.get(self.key)
        if self.operator is Operator.NE:
            return not (present and _equal(value, self.values[0]))
        if not present:
            return False
        if self.operator in (Operator.EQ, Operator.IN):
            return any(_equal(value, wanted) for wanted in self.values)
        return _ordered(self.operator, value, self.values[0])


def parse_condition(key: str, operator: Operator, values_json: Sequence[str]) -> Condition:
    """Reads a condition from JSON texts; raises INVALID_ARGUMENT naming the filter."""
    if not 0 < len(key) <= MAX_KEY_CHARS:
        raise _invalid(f"a filter key has 1 to {MAX_KEY_CHARS} characters")
    most = MAX_VALUES if operator is Operator.IN else 1
    if not 1 <= len(values_json) <= most:
        raise _invalid(f"the filter on {key!r} has {len(values_json)} values, {operator.value} takes 1 to {most}")
    return Condition(key, operator, tuple(_value(key, text) for text in values_json))


def _value(key: str, text: str) -> Scalar:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        raise _invalid(f"a value of the filter on {key!r} is not JSON") from None
    if value is not None and not isinstance(value, str | int | float | bool):
        raise _invalid(f"a value of the filter on {key!r} is no string, number, boolean or null")
    if isinstance(value, float) and not math.isfinite(value):
        raise _invalid(f"a value of the filter on {key!r} is not finite")
    return value


def _kind(value: object) -> type:
    """Puts a value among those it can be compared with: True is not 1."""
    if isinstance(value, bool):
        return bool
    return float if isinstance(value, int | float) else type(value)


def _equal(left: object, right: object) -> bool:
    return _kind(left) is _kind(right) and left == right


def _ordered(operator: Operator, left: object, right: object) -> bool:
    both = (left, right)
    if not (all(_kind(v) is float for v in both) or all(isinstance(v, str) for v in both)):
        return False
    less, equal = left < right, left == right  # type: ignore[operator]
    match operator:
        case Operator.LT:
            return bool(less)
        case Operator.LE:
            return bool(less or equal)
        case Operator.GT:
            return not (less or equal)
        case _:
            return not less


def _invalid(message: str) -> PlatformError:
    return PlatformError(Code.INVALID_ARGUMENT, message, param="filter")
