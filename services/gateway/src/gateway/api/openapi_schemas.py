"""Words for JSON Schemas of answers, as the OpenAPI document holds them."""

from typing import Any

Schema = dict[str, Any]

# What core.content takes for text: something in it is no white space, and it is none of the formats that are not text.
TEXT_PATTERN = r"^[^\u0000%]*[A-Za-z0-9][^\u0000%]*$"

TEXT: Schema = {"type": "string"}
COUNT: Schema = {"type": "integer", "minimum": 0}
NUMBER: Schema = {"type": "number"}
FLAG: Schema = {"type": "boolean"}
TIME: Schema = {"type": "integer", "description": "Unix time in seconds."}
FILE: Schema = {"type": "string", "format": "binary", "minLength": 1}
TEXT_FILE: Schema = {"type": "string", "contentMediaType": "application/octet-stream", "pattern": TEXT_PATTERN}
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


def form(fields: dict[str, Schema], optional: dict[str, Schema] | None = None) -> Schema:
    """A form; it may have no other fields."""
    return record(fields, optional) | {"additionalProperties": False}


def page(items: Schema, *, with_ends: bool = False) -> Schema:
    """OpenAI's list, of which there may be more."""
    ends = {"first_id": nullable(TEXT), "last_id": nullable(TEXT)} if with_ends else {}
    return record({"object": one_of("list"), "data": array(items), "has_more": FLAG, **ends})
