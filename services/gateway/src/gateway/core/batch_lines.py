"""The lines of a batch's file: found in a stream of bytes, read strictly, and written back with their answers.

A line that is no request is a fault of its own and never one of its neighbours'. Knows nothing of HTTP or files.
"""

import json
import uuid
from collections.abc import AsyncIterable, AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

MAX_CUSTOM_ID_CHARS = 512
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class RawLine:
    """A line as it stands in the file; content is None where it was too long to keep. Numbers count from 1."""

    number: int
    content: bytes | None


@dataclass(frozen=True, slots=True)
class Line:
    """One request of a batch: the client's name for it and the body of the POST."""

    number: int
    custom_id: str
    body: bytes


@dataclass(frozen=True, slots=True)
class Fault:
    """What is wrong with a line, or with the file where line is None."""

    code: str
    message: str
    param: str | None = None
    line: int | None = None
    custom_id: str | None = None


@dataclass(frozen=True, slots=True)
class Result:
    """What became of a line: a line of the output file, or of the error file where is_answered is False."""

    line: int
    is_answered: bool
    content: bytes


async def raw_lines(pieces: AsyncIterable[bytes], max_bytes: int) -> AsyncIterator[list[RawLine]]:
    """Cuts a file into its lines, blank ones left out; yields those that end in each piece.

    Holds one piece and one line of at most max_bytes.
    """
    number, carried = 1, bytearray()
    async for piece in pieces:
        *ends, rest = piece.split(b"\n")
        found = []
        for end in ends:
            carried += end
            found += _found(number, carried, max_bytes)
            number += 1
            carried.clear()
        # One byte over the limit is enough to know that a line is too long.
        carried += rest[: max(0, max_bytes + 1 - len(carried))]
        yield found
    yield _found(number, carried, max_bytes)


def _found(number: int, content: bytearray, max_bytes: int) -> list[RawLine]:
    if len(content) > max_bytes:
        return [RawLine(number, None)]
    kept = bytes(content).removeprefix(_BYTE_ORDER_MARK) if number == 1 else bytes(content)
    return [RawLine(number, kept)] if kept.strip() else []


def read_line(raw: RawLine, endpoint: str) -> Line | Fault:
    """Reads one line of a batch for that endpoint; what its body says is for the endpoint to judge."""
    if raw.content is None:
        return Fault("line_too_long", "the line is longer than a request may be", line=raw.number)
    try:
        value = _strict_json(raw.content)
    except (ValueError, RecursionError) as error:
        return Fault("invalid_json_line", f"the line is not valid JSON: {str(error)[:200]}", line=raw.number)
    if not isinstance(value, dict):
        return Fault("invalid_json_line", "the line is not a JSON object", line=raw.number)
    return _read_fields(raw.number, value, endpoint)


def _read_fields(number: int, value: dict[str, Any], endpoint: str) -> Line | Fault:
    custom_id = value.get("custom_id")

    def fault(code: str, message: str, param: str) -> Fault:
        return Fault(code, message, param, number, custom_id if _is_custom_id(custom_id) else None)

    for name in ("custom_id", "method", "url", "body"):
        if name not in value:
            return fault("missing_required_parameter", f"the line has no {name}", name)
    if not isinstance(custom_id, str) or not _is_custom_id(custom_id):
        return fault("invalid_custom_id", f"custom_id must be a text of 1 to {MAX_CUSTOM_ID_CHARS}", "custom_id")
    if value["method"] != "POST":
        return fault("invalid_method", "method must be POST", "method")
    if value["url"] != endpoint:
        return fault("mismatched_endpoint", f"url must be the batch's endpoint, {endpoint}", "url")
    body = value["body"]
    if not isinstance(body, dict):
        return fault("invalid_type", "body must be an object", "body")
    if body.get("stream"):
        return fault("invalid_value", "the answer of a batch's line cannot be streamed", "body.stream")
    return Line(number, custom_id, json.dumps(body).encode())


def _is_custom_id(value: object) -> bool:
    if not isinstance(value, str) or not 0 < len(value) <= MAX_CUSTOM_ID_CHARS:
        return False
    try:
        value.encode()
    except UnicodeEncodeError:  # a lone surrogate
        return False
    return True


def _strict_json(content: bytes) -> object:
    return json.loads(content.decode(), object_pairs_hook=_unique, parse_constant=_refuse_constant)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise ValueError("a key appears twice in one object")
    return made


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


class Census:
    """Counts a file's lines and finds the names that were taken already."""

    def __init__(self, endpoint: str) -> None:
        self._endpoint = endpoint
        self._seen: set[str] = set()
        self.num_lines = 0
        self.repeated: set[int] = set()  # lines whose custom_id an earlier line has
        self.faults: list[Fault] = []  # of the first lines
        self.num_good = 0

    def take(self, lines: Sequence[RawLine], most_faults: int) -> None:
        """Looks at lines; keeps the first faults. May take long: not for the event loop."""
        for raw in lines:
            self.num_lines += 1
            line = read_line(raw, self._endpoint)
            if isinstance(line, Line) and line.custom_id in self._seen:
                self.repeated.add(line.number)
                line = repeated_name(line)
            if isinstance(line, Line):
                self._seen.add(line.custom_id)
                self.num_good += 1
            elif len(self.faults) < most_faults:
                self.faults.append(line)


def repeated_name(line: Line) -> Fault:
    """The fault of a line whose name is taken."""
    return Fault(
        "duplicate_custom_id",
        "an earlier line has the same custom_id",
        "custom_id",
        line.number,
        line.custom_id,
    )


def answered(line: Line, status: int, request_id: str, body: bytes) -> Result:
    """The result of a line that was asked; the body is kept as it came."""
    head = json.dumps({"id": _result_id(), "custom_id": line.custom_id})[:-1]
    response = json.dumps({"status_code": status, "request_id": request_id})[:-1]
    content = f'{head}, "response": {response}, "body": '.encode() + body + b'}, "error": null}\n'
    return Result(line.number, 200 <= status < 300, content)


def not_asked(fault: Fault) -> Result:
    """The result of a line that was never asked."""
    assert fault.line is not None
    said = {
        "id": _result_id(),
        "custom_id": fault.custom_id,
        "response": None,
        "error": {"code": fault.code, "message": fault.message, "param": fault.param, "line": fault.line},
    }
    return Result(fault.line, False, json.dumps(said).encode() + b"\n")


def _result_id() -> str:
    return f"batch_req_{uuid.uuid4().hex}"
