"""Whether a value keeps to a JSON Schema: the keywords that the tests of grammars use, read plainly.

An oracle of its own: nothing here is shared with what enforces the schemas.
"""

import ipaddress
import re
import uuid
from collections.abc import Mapping
from datetime import date, datetime, time
from decimal import Decimal
from typing import Any

_TYPES: Mapping[str, Any] = {
    "null": lambda v: v is None,
    "boolean": lambda v: isinstance(v, bool),
    "string": lambda v: isinstance(v, str),
    "object": lambda v: isinstance(v, dict),
    "array": lambda v: isinstance(v, list),
    "number": lambda v: isinstance(v, int | Decimal) and not isinstance(v, bool),
    "integer": lambda v: isinstance(v, int | Decimal) and not isinstance(v, bool) and v == int(v),
}
_FORMATS: Mapping[str, Any] = {
    "date": date.fromisoformat,
    "time": lambda v: time.fromisoformat(v.upper().replace(":60", ":59")),  # RFC 3339 has leap seconds
    "date-time": lambda v: datetime.fromisoformat(v.upper().replace(":60", ":59")),
    "uuid": uuid.UUID,
    "ipv4": ipaddress.IPv4Address,
    "ipv6": ipaddress.IPv6Address,
    "email": lambda v: _match(r"[^@]+@[^@]+", v),
    "uri": lambda v: _match(r"[A-Za-z][A-Za-z0-9+.-]*:\S*", v),
}
_BOUNDS: Mapping[str, Any] = {
    "minimum": ("number", lambda v, bound: v >= bound),
    "maximum": ("number", lambda v, bound: v <= bound),
    "exclusiveMinimum": ("number", lambda v, bound: v > bound),
    "exclusiveMaximum": ("number", lambda v, bound: v < bound),
    "multipleOf": ("number", lambda v, bound: Decimal(v) % bound == 0),
    "minLength": ("string", lambda v, bound: len(v) >= bound),
    "maxLength": ("string", lambda v, bound: len(v) <= bound),
    "pattern": ("string", lambda v, bound: re.search(bound, v) is not None),
    "minItems": ("array", lambda v, bound: len(v) >= bound),
    "maxItems": ("array", lambda v, bound: len(v) <= bound),
    "minProperties": ("object", lambda v, bound: len(v) >= bound),
    "maxProperties": ("object", lambda v, bound: len(v) <= bound),
    "required": ("object", lambda v, bound: set(bound) <= set(v)),
}


def violation(value: Any, schema: Any, root: Any, path: str = "$") -> str | None:
    """Returns where and how a value (its floats read as Decimal) breaks a schema, None where it does not."""
    if isinstance(schema, bool):
        return None if schema else f"{path}: nothing is allowed"
    if "$ref" in schema and (broken := violation(value, _resolve(schema["$ref"], root), root, path)):
        return broken
    kinds = schema.get("type", [])
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if kinds and not any(_TYPES[kind](value) for kind in kinds):
        return f"{path}: {value!r} is not {kinds}"
    if "const" in schema and value != schema["const"]:
        return f"{path}: {value!r} is not {schema['const']!r}"
    if "enum" in schema and value not in schema["enum"]:
        return f"{path}: {value!r} is not in {schema['enum']!r}"
    for keyword, (kind, holds) in _BOUNDS.items():
        if keyword in schema and _TYPES[kind](value):
            bound = schema[keyword]
            if not holds(value, Decimal(str(bound)) if isinstance(bound, float) else bound):
                return f"{path}: {value!r} breaks {keyword} {bound!r}"
    if isinstance(value, str) and schema.get("format") in _FORMATS:
        try:
            _FORMATS[schema["format"]](value)
        except ValueError as error:
            return f"{path}: {value!r} is no {schema['format']}: {error}"
    return _inside(value, schema, root, path) or _combined(value, schema, root, path)


def _inside(value: Any, schema: Any, root: Any, path: str) -> str | None:
    children: list[tuple[Any, Any, str]] = []
    if isinstance(value, dict):
        patterns = schema.get("patternProperties", {})
        for name, child in value.items():
            subs = [sub for pattern, sub in patterns.items() if re.search(pattern, name)]
            subs += [schema["properties"][name]] if name in schema.get("properties", {}) else []
            children += [(child, sub, name) for sub in subs or [schema.get("additionalProperties", True)]]
    elif isinstance(value, list):
        prefix = schema.get("prefixItems", [])
        for place, child in enumerate(value):
            sub = prefix[place] if place < len(prefix) else schema.get("items", True)
            children.append((child, sub, str(place)))
    broken = (violation(child, sub, root, f"{path}.{name}") for child, sub, name in children)
    return next((text for text in broken if text), None)


def _combined(value: Any, schema: Any, root: Any, path: str) -> str | None:
    for sub in schema.get("allOf", ()):
        if broken := violation(value, sub, root, path):
            return broken
    for keyword, allowed in (("anyOf", range(1, 1000)), ("oneOf", range(1, 2))):
        if keyword in schema:
            found = [violation(value, sub, root, path) for sub in schema[keyword]]
            if found.count(None) not in allowed:
                return f"{path}: {value!r} matches {found.count(None)} of {keyword}: {found}"
    return None


def _resolve(ref: str, root: Any) -> Any:
    node = root
    for step in ref.removeprefix("#").strip("/").split("/"):
        node = node[step] if step else node
    return node


def _match(pattern: str, value: str) -> None:
    if not re.fullmatch(pattern, value):
        raise ValueError("no match")
