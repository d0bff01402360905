"""The OpenAPI document: what the routes say of themselves, put together.

Routes read their bodies by hand (json_body) and write their answers by hand, so FastAPI knows of their paths and
parameters alone. Each says the rest with @documented, and a test finds the one that does not.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from fastapi.routing import APIRoute
from pydantic import BaseModel
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue, models_json_schema
from pydantic_core import core_schema

from contracts.names import HEADER_REQUEST_ID, HEADER_TRACE_ID
from gateway.api import anthropic_errors, open_inference_errors
from gateway.api.middleware_access import is_protected
from gateway.api.openapi_schemas import TEXT, Schema, nullable, record

_TITLE, _VERSION = "Pressroom", "1"
# As a scheme of its own the second header would have tools send both at once, which is refused.
_SECURITY = "A key, sk-<id>-<secret>. Without this header the header x-api-key may hold it, as Anthropic's clients do."
_REF = "#/components/schemas/{model}"
_DOCUMENTATION = "__documentation__"

E = TypeVar("E", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class Documentation:
    """What one route reads and answers."""

    answer: Schema | None
    body: type[BaseModel] | None
    form: Schema | None
    status: int
    media_type: str
    stream: str | None
    needs_body: bool
    file_types: Sequence[str]


class _BodySchemas(GenerateJsonSchema):
    """Says too what the names of an object's fields may be, which pydantic itself leaves out."""

    def dict_schema(self, schema: core_schema.DictSchema) -> JsonSchemaValue:
        """The schema of a dict."""
        told = super().dict_schema(schema)
        names = self.generate_inner(schema["keys_schema"]) if "keys_schema" in schema else {}
        rules = {rule: names[rule] for rule in ("pattern", "minLength", "maxLength") if rule in names}
        return told | {"propertyNames": rules} if rules else told


def documented(
    answer: Schema | None = None,
    *,
    body: type[BaseModel] | None = None,
    form: Schema | None = None,
    status: int = 200,
    media_type: str = "application/json",
    stream: str | None = None,
    needs_body: bool = True,
    file_types: Sequence[str] = (),
) -> Callable[[E], E]:
    """Says what a route answers, and what it reads: a JSON body, a form with a file, or either.

    answer: the JSON Schema of a good answer; None where it is no JSON. stream: the media type of an answer in pieces.
    file_types: what the form's file may be.
    """

    def say(endpoint: E) -> E:
        setattr(
            endpoint,
            _DOCUMENTATION,
            Documentation(answer, body, form, status, media_type, stream, needs_body, file_types),
        )
        return endpoint

    return say


def documentation_of(route: APIRoute) -> Documentation | None:
    """What the route says of itself."""
    said = getattr(route.endpoint, _DOCUMENTATION, None)
    assert said is None or isinstance(said, Documentation)
    return said


def install(app: FastAPI, routes: Iterable[APIRoute]) -> None:
    """Makes the application serve the document of these routes."""
    shown = [route for route in routes if route.include_in_schema]

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _document(shown)
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]  # FastAPI's own way to replace it


def _document(routes: list[APIRoute]) -> dict[str, Any]:
    document = get_openapi(title=_TITLE, version=_VERSION, routes=routes)
    said = [(route, documentation_of(route)) for route in routes]
    bodies = list({one.body for _, one in said if one is not None and one.body is not None})
    bodies.sort(key=lambda model: f"{model.__module__}.{model.__qualname__}")
    refs, definitions = models_json_schema(
        [(model, "validation") for model in bodies], ref_template=_REF, schema_generator=_BodySchemas
    )
    body_schemas: dict[Any, Schema] = {model: schema for (model, _), schema in refs.items()}
    document["components"] = {
        "schemas": definitions.get("$defs", {}) | _ERROR_SCHEMAS,
        "headers": _HEADERS,
        "responses": _error_responses("Error", "")
        | _error_responses("AnthropicError", "Anthropic")
        | _error_responses("InferenceError", "Inference"),
        "securitySchemes": {
            "bearer": {"type": "http", "scheme": "bearer", "description": _SECURITY},
        },
    }
    for route, one in said:
        for method in route.methods or ():
            operation = document["paths"][route.path_format][method.lower()]
            _complete(operation, route.path, one or _UNSAID, body_schemas)
    return document


_UNSAID = Documentation(None, None, None, 200, "application/json", None, True, ())


def _complete(
    operation: dict[str, Any], path: str, said: Documentation, bodies: Mapping[type[BaseModel], Schema]
) -> None:
    content: dict[str, Any] = {"application/json": {"schema": bodies[said.body]}} if said.body else {}
    if said.form is not None:
        content["multipart/form-data"] = {"schema": said.form}
        if said.file_types:
            content["multipart/form-data"]["encoding"] = {"file": {"contentType": ", ".join(said.file_types)}}
    if content:
        operation["requestBody"] = {"required": said.needs_body, "content": content}
    answers: dict[str, Any] = {said.media_type: {"schema": said.answer} if said.answer is not None else {}}
    if said.stream is not None:
        answers[said.stream] = {"schema": TEXT}
    headers = dict(_ALWAYS)
    if is_protected(path):
        operation["security"] = [{"bearer": []}]
        headers |= _LIMITS
    good = {"description": "What was asked for.", "headers": headers, "content": answers}
    errors = _ERRORS if content else _ERRORS_WITHOUT_BODY
    operation["responses"] = {str(said.status): good} | {
        status: {"$ref": f"#/components/responses/{_dialect(path)}{name}"} for status, name in errors.items()
    }


def _dialect(path: str) -> str:
    if open_inference_errors.is_spoken(path):
        return "Inference"
    return "Anthropic" if anthropic_errors.is_spoken({"path": path, "headers": []}) else ""


_ERRORS_WITHOUT_BODY = {
    "400": "Failed",
    "401": "Unauthenticated",
    "403": "Failed",
    "404": "Failed",
    "429": "RateLimited",
    "4XX": "Failed",
    "500": "Failed",
    "503": "Unavailable",
    "5XX": "Failed",
}
_ERRORS = _ERRORS_WITHOUT_BODY | {"413": "Failed", "415": "Failed"}

_ERROR_SCHEMAS = {
    "Error": record(
        {"error": record({"message": TEXT, "type": TEXT, "param": nullable(TEXT), "code": TEXT})},
    ),
    "InferenceError": record({"error": TEXT}),
    "AnthropicError": record(
        {
            "type": {"const": "error"},
            "error": record({"type": TEXT, "message": TEXT}),
            "request_id": TEXT,
        }
    ),
}


def _header(description: str, *, is_required: bool = False) -> dict[str, Any]:
    return {"description": description, "required": is_required, "schema": TEXT}


def _ref(name: str) -> dict[str, str]:
    return {"$ref": f"#/components/headers/{name}"}


_LIMIT_HEADERS = [
    f"x-ratelimit-{what}-{counted}" for counted in ("requests", "tokens") for what in ("limit", "remaining", "reset")
]
_HEADERS = {
    HEADER_REQUEST_ID: _header("Names the request: quote it when you report a failure.", is_required=True),
    HEADER_TRACE_ID: _header("Names the trace of the request: 32 hexadecimal digits.", is_required=True),
    "retry-after": _header("Seconds after which it is worth trying again."),
    "www-authenticate": _header("How to authenticate."),
} | {name: _header("How much of a limit there is, is left, or when it is whole again.") for name in _LIMIT_HEADERS}
_ALWAYS = {name: _ref(name) for name in (HEADER_REQUEST_ID, HEADER_TRACE_ID)}
_LIMITS = {name: _ref(name) for name in _LIMIT_HEADERS}


def _error_responses(schema: str, dialect: str) -> dict[str, Any]:
    content = {"application/json": {"schema": {"$ref": _REF.format(model=schema)}}}
    described = {
        "Failed": ("What failed, and the field at fault.", {}),
        "Unauthenticated": ("No key, or none that is valid.", {"www-authenticate": _ref("www-authenticate")}),
        "RateLimited": ("More than a limit allows.", {"retry-after": _ref("retry-after"), **_LIMITS}),
        "Unavailable": ("Too much to do, or a part is away.", {"retry-after": _ref("retry-after")}),
    }
    return {
        f"{dialect}{name}": {"description": description, "headers": _ALWAYS | headers, "content": content}
        for name, (description, headers) in described.items()
    }
