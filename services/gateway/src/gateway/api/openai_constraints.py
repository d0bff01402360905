"""What form an answer must have: OpenAI's response_format, and vLLM's guided_* and structured_outputs beside it."""

from typing import Annotated, Any, Literal

import orjson
from pydantic import Field

from chassis.errors import Code, PlatformError
from gateway.api.json_body import Body, invalid
from gateway.core.services import Grammar

Schema = dict[str, Any] | str
Options = Annotated[list[str], Field(min_length=1, max_length=4096)]


class JsonSchema(Body):
    """The schema that an answer must keep to. It always does, `strict` or not."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
    description: str | None = None
    json_schema: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(Body):
    """What form the answer must have."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    def grammar(self) -> Grammar | None:
        """The constraint for the generator; raises INVALID_ARGUMENT where the schema is missing."""
        if self.type == "text":
            return None
        if self.type == "json_object":
            return Grammar("json_object")
        if self.json_schema is None:
            raise invalid("response_format", "type json_schema needs the field json_schema with a schema")
        return Grammar("json_schema", _dump(self.json_schema.json_schema), bool(self.json_schema.strict))


class StructuredOutputs(Body):
    """vLLM's way to ask for a form; one of the fields."""

    json_: Schema | None = Field(None, alias="json")
    json_object: bool | None = None
    regex: str | None = None
    choice: Options | None = None
    grammar: str | None = None


class ConstrainedBody(Body):
    """The fields of a request that say what form its answer must have. At most one of them may."""

    guided_json: Schema | None = None
    guided_regex: str | None = None
    guided_choice: Options | None = None
    guided_grammar: str | None = None
    structured_outputs: StructuredOutputs | None = None

    def constraint(self, response_format: ResponseFormat | None = None) -> tuple[Grammar | None, str]:
        """The constraint and the field that asks for it. Raises INVALID_ARGUMENT where several do."""
        asked = response_format.grammar() if response_format is not None else None
        found = [] if asked is None else [(asked, "response_format")]
        found += _guided(self.guided_json, self.guided_regex, self.guided_choice, self.guided_grammar, "guided_")
        if (outputs := self.structured_outputs) is not None:
            prefix = "structured_outputs."
            found += _guided(outputs.json_, outputs.regex, outputs.choice, outputs.grammar, prefix)
            if outputs.json_object:
                found.append((Grammar("json_object"), f"{prefix}json_object"))
        if len(found) > 1:
            names = " and ".join(name for _, name in found)
            message = f"the answer can have one form only, but {names} ask for one each"
            raise PlatformError(Code.INVALID_ARGUMENT, message, param=found[1][1], reason="invalid_value")
        return found[0] if found else (None, "response_format")


def _guided(
    schema: Schema | None, regex: str | None, choice: list[str] | None, grammar: str | None, prefix: str
) -> list[tuple[Grammar, str]]:
    found = []
    if schema is not None:
        source = schema if isinstance(schema, str) else _dump(schema)
        found.append((Grammar("json_schema", source), f"{prefix}json"))
    if regex is not None:
        found.append((Grammar("regex", regex), f"{prefix}regex"))
    if choice is not None:
        found.append((Grammar("choice", _dump(choice)), f"{prefix}choice"))
    if grammar is not None:
        found.append((Grammar("ebnf", grammar), f"{prefix}grammar"))
    return found


def _dump(value: object) -> str:
    return orjson.dumps(value).decode()
