"""Words for JSON Schemas of answers, as the OpenAPI document holds them."""

from typing import Any

Schema = dict[str, Any]

TEXT: Schema = {"type": "string"}
COUNT: Schema = {"type": "integer", "minimum": 0}
NUMBER: Schema = {"type": "number"}
FLAG: Schema = {"type": "boolean"}
TIME: Schema = {"type": "integer", "description": "Unix time in seconds."}
FILE: Schema = {"type": "string", "format": "binary"}
ANY_OBJECT: Schema = {"type": "object"}


def nullable(schema: Schema) -> Schema:
    """That, or null."""
    return {"anyOf": [schema, {"type": "null"}]}


def one_of(*values: str) -> Schema:
    """One of these words."""
    return {"type": "string", "enum": list(values)}


def array(items: Schema) -> Schema:
    """A list of those."""
    return {"type": "array", "items": items}


def record(fields: dict[str, Schema], optional: dict[str, Schema] | None = None) -> Schema:
    """An object that has these fields, and may have the optional ones."""
    return {"type": "object", "properties": fields | (optional or {}), "required": list(fields)}


def page(items: Schema, *, with_ends: bool = False) -> Schema:
    """OpenAI's list, of which there may be more."""
    ends = {"first_id": nullable(TEXT), "last_id": nullable(TEXT)} if with_ends else {}
    return record({"object": one_of("list"), "data": array(items), "has_more": FLAG, **ends})
