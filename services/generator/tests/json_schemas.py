"""Two hundred JSON Schemas: some by hand, one for each feature and each trap, and the rest at random from a seed."""

import random
from typing import Any

NUM_SCHEMAS = 200
_WORDS = ("ink", "paper", "press", "type", "folio", "plate", "quire", "spine", "title", "year")
_PATTERNS = (r"^[A-Z]{2}-\d{3}$", r"^\d{4}-\d{2}$", r"^(left|right)+$", r"[aeiou]{2}", r"^[a-f0-9]{8}$", "^x.*y$")
_FORMATS = ("date", "time", "date-time", "uuid", "ipv4", "ipv6", "email", "uri")

BY_HAND: tuple[dict[str, Any], ...] = (
    {"type": "object"},
    {"type": "string"},
    {"type": "integer"},
    {"type": "number"},
    {"type": "boolean"},
    {"type": "null"},
    {"type": ["string", "null"], "maxLength": 10},
    {"type": "array", "items": {"type": "integer"}, "minItems": 2, "maxItems": 4},
    {"type": "array", "prefixItems": [{"type": "string"}, {"type": "integer"}], "items": False, "minItems": 2},
    {"enum": ["a", 1, 2.5, None, True, {"b": [1]}, [2, 3]]},
    {"const": {"a": [1, "x", None], "b": {"c": False}}},
    {"type": "integer", "minimum": -3, "maximum": 250},
    {"type": "integer", "exclusiveMinimum": 9, "exclusiveMaximum": 11},
    {"type": "number", "minimum": 0.5, "maximum": 0.75},
    {"type": "number", "exclusiveMinimum": -1, "exclusiveMaximum": 1},
    {"type": "integer", "multipleOf": 7, "minimum": 0, "maximum": 100},
    {"type": "number", "multipleOf": 0.25},
    {"type": "string", "minLength": 3, "maxLength": 5},
    {"type": "string", "pattern": r"^\+\d{1,3} \d{4,10}$"},
    {"type": "string", "pattern": "ink"},
    {"type": "string", "pattern": '^[€ü💩"\\\\/]{2,4}$'},
    {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False},
    {"type": "object", "properties": {"a": {"type": "integer"}}, "additionalProperties": {"type": "boolean"}},
    {"type": "object", "additionalProperties": {"type": "integer"}, "minProperties": 1, "maxProperties": 3},
    {"type": "object", "patternProperties": {"^n_": {"type": "integer"}}, "additionalProperties": False},
    {"type": "object", "required": ["x", "y"]},
    {"type": "object", "properties": {'quo"te\\': {"type": "string"}, "ü€": {"const": "💩"}}, "required": ['quo"te\\']},
    {"anyOf": [{"type": "integer"}, {"type": "array", "items": {"type": "boolean"}, "maxItems": 3}]},
    {"oneOf": [{"type": "integer"}, {"type": "string", "maxLength": 4}]},
    {
        "oneOf": [
            {"type": "object", "properties": {"kind": {"const": "a"}, "x": {"type": "integer"}}, "required": ["kind"]},
            {"type": "object", "properties": {"kind": {"const": "b"}, "y": {"type": "null"}}, "required": ["kind"]},
        ]
    },
    {"allOf": [{"type": "integer", "minimum": 5}, {"maximum": 8}]},
    {
        "allOf": [
            {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
            {"properties": {"b": {"type": "string", "maxLength": 3}}, "required": ["b"]},
        ]
    },
    {
        "$defs": {
            "node": {
                "type": "object",
                "properties": {
                    "value": {"type": "integer"},
                    "children": {"type": "array", "items": {"$ref": "#/$defs/node"}, "maxItems": 2},
                },
                "required": ["value", "children"],
                "additionalProperties": False,
            }
        },
        "$ref": "#/$defs/node",
    },
    {
        "definitions": {"name": {"type": "string", "minLength": 1, "maxLength": 8}},
        "type": "object",
        "properties": {"first": {"$ref": "#/definitions/name"}, "last": {"$ref": "#/definitions/name"}},
        "required": ["first", "last"],
        "additionalProperties": False,
    },
    {"type": "object", "properties": {"next": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}}, "required": ["next"]},
    {"type": "object", "properties": {}, "additionalProperties": False},
    {"type": "array", "items": {"type": "array", "items": {"type": "number"}, "minItems": 1, "maxItems": 2}},
    {"type": "string", "enum": ["", " ", "\n", "\\", '"', "é", "日本"]},
    {"title": "Annotated", "description": "…", "default": 3, "examples": [1], "type": "integer", "$comment": "no"},
    {"type": "array", "minItems": 3, "maxItems": 3, "items": {"$ref": "#/$defs/c"}, "$defs": {"c": {"enum": [1, 2]}}},
    # What cannot be enforced, or can match nothing, is refused.
    {"type": "array", "items": {"type": "integer"}, "uniqueItems": True},
    {"not": {"type": "integer"}},
    {"if": {"type": "integer"}, "then": {"minimum": 3}, "else": {"type": "string"}},
    {"type": "array", "contains": {"const": 1}},
    {"type": "object", "propertyNames": {"pattern": "^a"}},
    {"type": "object", "dependentRequired": {"a": ["b"]}},
    {"type": "nonsense"},
    {"type": "string", "pattern": "(unclosed"},
    {"type": "string", "pattern": r"^(?!a)b"},
    {"$ref": "#/$defs/missing"},
    {"$ref": "https://example.com/schema.json"},
    {"$ref": "#"},
    {"type": "integer", "minimum": 5, "maximum": 4},
    {"type": "object", "properties": {"a": False}, "required": ["a"]},
    {"allOf": [{"type": "integer"}, {"type": "string"}]},
    {"oneOf": [{"type": "integer"}, {"type": "number"}]},
)


def all_schemas() -> list[dict[str, Any]]:
    """Returns NUM_SCHEMAS schemas, always the same."""
    rng = random.Random(20_26)
    return [*BY_HAND, *(_with_defs(rng) for _ in range(NUM_SCHEMAS - len(BY_HAND)))]


def _with_defs(rng: random.Random) -> dict[str, Any]:
    schema = _object(rng, 3, with_refs=True)
    return schema | {"$defs": {name: _any(rng, 1, with_refs=False) for name in _WORDS[:3]}}


def _any(rng: random.Random, depth: int, with_refs: bool) -> dict[str, Any]:
    simple = [_string, _number, _enum, lambda rng: {"type": rng.choice(["boolean", "null"])}]
    nested = [_object, _array, _any_of]
    if with_refs and rng.random() < 0.15:
        return {"$ref": f"#/$defs/{rng.choice(_WORDS[:3])}"}
    if depth and rng.random() < 0.5:
        return rng.choice(nested)(rng, depth - 1, with_refs)
    return rng.choice(simple)(rng)


def _object(rng: random.Random, depth: int, with_refs: bool) -> dict[str, Any]:
    names = rng.sample(_WORDS, rng.randint(1, 4))
    schema: dict[str, Any] = {"type": "object", "properties": {name: _any(rng, depth, with_refs) for name in names}}
    schema["required"] = [name for name in names if rng.random() < 0.7]
    if rng.random() < 0.7:
        schema["additionalProperties"] = rng.choice([False, False, {"type": "integer"}])
    return schema


def _array(rng: random.Random, depth: int, with_refs: bool) -> dict[str, Any]:
    least = rng.randint(0, 2)
    most = least + rng.randint(0, 2)
    return {"type": "array", "items": _any(rng, depth, with_refs), "minItems": least, "maxItems": most}


def _any_of(rng: random.Random, depth: int, with_refs: bool) -> dict[str, Any]:
    return {"anyOf": [_any(rng, depth, with_refs) for _ in range(rng.randint(1, 3))]}


def _string(rng: random.Random) -> dict[str, Any]:
    kind = rng.randrange(4)
    if kind == 0:
        return {"type": "string", "pattern": rng.choice(_PATTERNS)}
    if kind == 1:
        return {"type": "string", "format": rng.choice(_FORMATS)}
    if kind == 2:
        least = rng.randint(0, 4)
        return {"type": "string", "minLength": least, "maxLength": least + rng.randint(0, 6)}
    return {"type": "string"}


def _number(rng: random.Random) -> dict[str, Any]:
    low = rng.randint(-50, 50)
    schema: dict[str, Any] = {"type": rng.choice(["integer", "number"])}
    if rng.random() < 0.6:
        schema[rng.choice(["minimum", "exclusiveMinimum"])] = low
    if rng.random() < 0.6:
        schema[rng.choice(["maximum", "exclusiveMaximum"])] = low + rng.randint(2, 1000)
    if rng.random() < 0.3:
        schema["multipleOf"] = rng.choice([2, 5, 0.5] if schema["type"] == "number" else [2, 5])
    return schema


def _enum(rng: random.Random) -> dict[str, Any]:
    values: list[Any] = [*_WORDS, 1, 2.5, None, True, -7, "ü", 'a"b']
    return {"enum": rng.sample(values, rng.randint(1, 4))} if rng.random() < 0.8 else {"const": rng.choice(values)}
