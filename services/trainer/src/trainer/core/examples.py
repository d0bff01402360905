"""Training files: chat JSONL, one example a line, checked line by line. Knows nothing of tokens."""

import json
from dataclasses import dataclass
from typing import Any

from chassis.errors import Code, PlatformError

ROLES = ("system", "user", "assistant")
PARAM = "training_file"

_TOLD = 5  # problems that one message names; a file of another kind has one in every line
_KEYS_OF_MESSAGE = {"role", "content", "weight", "name"}


@dataclass(frozen=True, slots=True)
class FileLimits:
    """The most that one file may hold."""

    max_bytes: int
    max_examples: int


@dataclass(frozen=True, slots=True)
class Turn:
    """One message of a chat; `is_learned`: its tokens count in the loss."""

    role: str
    content: str
    is_learned: bool = False


@dataclass(frozen=True, slots=True)
class Example:
    """One chat and the line that it stands in, counted from 1."""

    line: int
    turns: tuple[Turn, ...]


class BadLine(Exception):
    """One line cannot be trained on; the text says why."""


def parse_examples(data: bytes, limits: FileLimits) -> list[Example]:
    """Reads a file. Raises INVALID_ARGUMENT that names the bad lines, or PAYLOAD_TOO_LARGE."""
    if len(data) > limits.max_bytes:
        message = f"it has {len(data)} bytes; the most is {limits.max_bytes}"
        raise PlatformError(Code.PAYLOAD_TOO_LARGE, f"{PARAM}: {message}", param=PARAM)
    examples: list[Example] = []
    problems = Problems()
    # Split as bytes: text has line ends of its own (U+2028) that JSON may hold inside a string.
    for number, raw in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        if not raw.strip():
            continue
        if len(examples) >= limits.max_examples:
            raise refused(f"it has more than {limits.max_examples} examples, which is the most")
        try:
            examples.append(Example(number, _turns(_object(raw))))
        except BadLine as why:
            problems.add(number, str(why))
    problems.check()
    if not examples:
        raise refused("it is empty: at least 1 example is needed, and 10 or more are recommended")
    return examples


class Problems:
    """Collects what is wrong with a file's lines."""

    def __init__(self) -> None:
        self._told: list[str] = []
        self._num = 0

    def add(self, line: int, why: str) -> None:
        """Notes a bad line."""
        self._num += 1
        if len(self._told) < _TOLD:
            self._told.append(f"line {line}: {why}")

    def check(self) -> None:
        """Raises INVALID_ARGUMENT where there was one."""
        if self._told:
            rest = f"; and {self._num - len(self._told)} more lines" if self._num > len(self._told) else ""
            raise refused("; ".join(self._told) + rest)


def refused(why: str) -> PlatformError:
    """Makes the error that says what is wrong with a training file."""
    return PlatformError(Code.INVALID_ARGUMENT, f"{PARAM}: {why}", param=PARAM, reason="invalid_training_file")


def _object(raw: bytes) -> dict[str, Any]:
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadLine(f"it is not UTF-8 (byte 0x{raw[error.start]:02x} at column {error.start + 1})") from error
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise BadLine(f"it is not valid JSON ({error.msg} at column {error.colno})") from error
    except (ValueError, RecursionError) as error:
        raise BadLine(f"it is not valid JSON ({type(error).__name__})") from error
    if not isinstance(value, dict):
        raise BadLine('it must be an object with "messages"')
    for name in value:
        if name != "messages":
            raise BadLine(f'unknown field "{name[:64]}": an example holds "messages" and nothing else')
    return value


def _turns(example: dict[str, Any]) -> tuple[Turn, ...]:
    messages = example.get("messages")
    if not isinstance(messages, list) or not messages:
        raise BadLine('it has no "messages", a list that is not empty')
    turns = tuple(_turn(message, number) for number, message in enumerate(messages, 1))
    if not any(turn.role == "assistant" for turn in turns):
        raise BadLine("it has no message of the assistant: there is nothing to learn from")
    if turns[-1].role != "assistant":
        raise BadLine(f"its last message is the {turns[-1].role}'s and must be the assistant's")
    if turns[0].role == "assistant":
        raise BadLine("its first message is the assistant's: there is nothing to answer to")
    if any(turn.role == "system" for turn in turns[1:]):
        raise BadLine("only its first message may be the system's")
    if not any(turn.is_learned for turn in turns):
        raise BadLine("every message of the assistant has weight 0: there is nothing to learn from")
    return turns


def _turn(message: Any, number: int) -> Turn:
    if not isinstance(message, dict):
        raise BadLine(f"message {number} must be an object with role and content")
    role, content, weight = message.get("role"), message.get("content"), message.get("weight", 1)
    if role not in ROLES:
        shown = json.dumps(role)[:64] if "role" in message else "none"
        raise BadLine(f"message {number} has the role {shown}; known are {', '.join(ROLES)}")
    for name in message:
        if name not in _KEYS_OF_MESSAGE:
            raise BadLine(f'message {number} has the unknown field "{name[:64]}"')
    if not isinstance(content, str) or not content.strip():
        raise BadLine(f"message {number} has no content, a text that is not empty")
    try:
        content.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadLine(f"message {number} holds half a character (a lone surrogate)") from error
    if "weight" in message and (role != "assistant" or isinstance(weight, bool) or weight not in (0, 1)):
        raise BadLine(f"message {number} has a bad weight: 0 or 1, on messages of the assistant alone")
    return Turn(role, content, is_learned=role == "assistant" and weight == 1)
