"""Reads JSON bodies from strangers: strict JSON first, then the shape, every refusal a 400 that names the field."""

import asyncio
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar, TypeVar

import orjson
from pydantic import BaseModel, ConfigDict, ValidationError
from starlette.requests import ClientDisconnect, Request

from chassis.errors import Code, PlatformError

MAX_DEPTH = 64
_THREAD_FROM_BYTES = 128 * 1024  # larger bodies take over 5 ms to check and would hold up the event loop

_MAX_WHOLE = 2**53  # beyond it a float is not the number that was written
_CONTAINERS = (dict, list)
_KEY_ENDS = re.compile(rb'"[ \t\r\n]*:')

M = TypeVar("M", bound=BaseModel)


class Body(BaseModel):
    """Base of request bodies: no coercion between types; fields that we do not know are tolerated, as OpenAI does.

    `refused` are known fields that would change the answer and are not supported, each with what to do instead.
    """

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)
    refused: ClassVar[Mapping[str, str]] = MappingProxyType({})


class _Refused(ValueError):
    """The JSON text breaks a rule that the parser itself lets pass."""


async def read_json(request: Request, model: type[M]) -> M:
    """Reads and checks the body.

    Raises INVALID_ARGUMENT, UNSUPPORTED_MEDIA_TYPE, PAYLOAD_TOO_LARGE, or CANCELLED when the client left meanwhile.
    """
    _check_headers(request)
    try:
        raw = await request.body()
    except ClientDisconnect:
        raise PlatformError(Code.CANCELLED, "the client left while it sent the body") from None
    if len(raw) > _THREAD_FROM_BYTES:
        return await asyncio.to_thread(_decode, raw, model)
    return _decode(raw, model)


def _decode(raw: bytes, model: type[M]) -> M:
    return validate(parse_json(raw), model)


def _check_headers(request: Request) -> None:
    media_type = request.headers.get("content-type", "application/json").split(";")[0].strip().lower()
    if media_type != "application/json" and not media_type.endswith("+json"):
        raise PlatformError(
            Code.UNSUPPORTED_MEDIA_TYPE,
            f"content-type must be application/json, not {media_type[:100]!r}",
            param="content-type",
        )
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("", "identity"):
        raise PlatformError(
            Code.UNSUPPORTED_MEDIA_TYPE, "send the body without content-encoding", param="content-encoding"
        )


def parse_json(raw: bytes) -> dict[str, Any]:
    """Parses an object; INVALID_ARGUMENT for bad UTF-8, lone surrogates, NaN, repeated keys and deep nesting."""
    try:
        value = orjson.loads(raw)  # refuses bad UTF-8, lone surrogates, NaN, infinities and over 1024 levels
        num_keys = _count_keys(value)
        # Each key in the text ends with a quote and a colon. Where there are no more of these than the value has keys,
        # none was lost to another of its name; where there are, in a string perhaps, the slow reader looks closer.
        if len(_KEY_ENDS.findall(raw)) != num_keys:
            json.loads(raw, object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:
        raise PlatformError(
            Code.INVALID_ARGUMENT, f"the body is not valid JSON: {error}", reason="invalid_json"
        ) from None
    if not isinstance(value, dict):
        raise PlatformError(Code.INVALID_ARGUMENT, "the body must be a JSON object", reason="invalid_type")
    return value


def _count_keys(value: object) -> int:
    """Keys of all objects within; raises _Refused for what is nested too deep."""
    level: list[Any] = [value]
    num_keys = 0
    for _ in range(MAX_DEPTH):
        below: list[Any] = []
        for node in level:
            if isinstance(node, dict):
                num_keys += len(node)
                below.extend(child for child in node.values() if isinstance(child, _CONTAINERS))
            elif isinstance(node, list):
                below.extend(child for child in node if isinstance(child, _CONTAINERS))
        if not below:
            return num_keys
        level = below
    raise _Refused(f"nested deeper than {MAX_DEPTH} levels")


def _unique_keys(pairs: list[tuple[str, Any]]) -> None:
    seen = {key for key, _ in pairs}
    if len(seen) != len(pairs):
        repeated = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise _Refused(f"the key {repeated[:100]!r} appears twice in one object")


def validate(value: Mapping[str, Any], model: type[M]) -> M:
    """Checks the shape; raises INVALID_ARGUMENT that names the first field at fault, or what a refused field does."""
    try:
        checked = _checked(value, model)
    except ValidationError as error:
        raise _named(error, value) from None
    except RecursionError:
        raise PlatformError(Code.INVALID_ARGUMENT, "the body is nested too deep", reason="invalid_value") from None
    if isinstance(checked, Body):
        _refuse(value, checked)
    return checked


def _checked(value: Mapping[str, Any], model: type[M]) -> M:
    """Takes 3.0 for a whole number, which it is in JSON: some languages have no other way to write one."""
    while True:
        try:
            return model.model_validate(value)
        except ValidationError as error:
            faults = error.errors(include_url=False, include_context=False)
            places = [fault["loc"] for fault in faults if _is_whole(fault["input"])]
            if not places:
                raise
            for place in places:
                _make_whole(value, place)


def _is_whole(number: object) -> bool:
    return isinstance(number, float) and number.is_integer() and abs(number) <= _MAX_WHOLE


def _make_whole(value: Any, place: Sequence[int | str]) -> None:
    holder, at = None, None
    for step in place:  # a name of a union's member is no place in the value
        is_place = (isinstance(value, dict) and step in value) or (
            isinstance(value, list) and isinstance(step, int) and step < len(value)
        )
        if is_place:
            holder, at, value = value, step, value[step]
    if holder is not None and _is_whole(value):
        holder[at] = int(value)


def invalid(param: str, message: str) -> PlatformError:
    """The error for fields that do not fit together, in the words of those that a single field gets."""
    return PlatformError(Code.INVALID_ARGUMENT, f"{param}: {message}", param=param, reason="invalid_value")


def unsupported(param: str, message: str) -> PlatformError:
    """The error for what OpenAI's API knows and this server cannot do: as there, it is the request that is at fault."""
    return PlatformError(Code.INVALID_ARGUMENT, message, param=param, reason="unsupported_parameter")


def _refuse(value: Mapping[str, Any], body: Body) -> None:
    for name, instead in body.refused.items():
        if value.get(name):  # null, false, 0 and what is empty ask for nothing
            raise unsupported(name, f"{name} is not supported: {instead}")


def _named(error: ValidationError, value: object) -> PlatformError:
    first = error.errors(include_url=False, include_input=False)[0]
    param = field_path(first["loc"], value, missing=first["type"] == "missing")
    kind = first["type"]
    reason = "invalid_value"
    if kind == "missing":
        reason = "missing_required_parameter"
    elif kind.endswith(("_type", "_parsing", "int_from_float")):
        reason = "invalid_type"
    message = first["msg"].removeprefix("Value error, ")
    shown = f"{param}: {message}" if param else message
    return PlatformError(Code.INVALID_ARGUMENT, shown, param=param, reason=reason)


def field_path(loc: Sequence[int | str], value: object, *, missing: bool = False) -> str | None:
    """Renders pydantic's location as messages[0].content.

    Pydantic mixes names of union members into a location; what is no place in the value is left out.
    """
    path = ""
    for position, step in enumerate(loc):
        if isinstance(value, Mapping) and step in value:
            value = value[step]
            path += f".{step}" if path else str(step)
        elif isinstance(value, list) and isinstance(step, int) and step < len(value):
            value = value[step]
            path += f"[{step}]"
        elif missing and position == len(loc) - 1:
            path += f".{step}" if path else str(step)
    return path[:200] or None
