"""Reads tool calls out of an answer while it is written.

The generator has models write a call as

    <tool_call>
    {"name": "get_weather", "arguments": {"city": "Paris"}}
    </tool_call>

and holds them to it by a grammar, but what is read here may also be cut off, or be of a model that was not held: what
is no call is text. Knows nothing of OpenAI's shapes.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

from gateway.core.services import ToolCallDelta

BEGIN, END = "<tool_call>", "</tool_call>"
_MAX_HEAD_CHARS = 512  # more without a name is no call
_HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*"([A-Za-z0-9_-]{1,64})"\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)')


@dataclass(frozen=True, slots=True)
class CallBegun:
    """A call's name is known; its arguments follow."""

    number: int  # from 0, within the answer
    name: str


@dataclass(frozen=True, slots=True)
class Arguments:
    """A piece of the JSON text of a call's arguments."""

    number: int
    text: str


Piece = str | CallBegun | Arguments
"""A str is text of the answer beside its calls."""


class _State(Enum):
    TEXT = 0
    HEAD = 1  # behind the begin tag, up to the arguments
    ARGUMENTS = 2
    TAIL = 3  # behind the arguments, up to the end tag


class ToolCallReader:
    """Reads one answer that comes in pieces."""

    def __init__(self) -> None:
        self.num_calls = 0
        self._state = _State.TEXT
        self._held = ""  # what cannot be judged yet
        self._depth = 0  # of the arguments' brackets
        self._in_string = self._is_escaped = False

    @property
    def is_in_call(self) -> bool:
        """Whether the next character is a call's and no text."""
        return self._state is not _State.TEXT

    def feed(self, text: str) -> Iterator[Piece]:
        """Takes the next piece of the answer."""
        self._held += text
        while True:
            before = (self._state, len(self._held))
            match self._state:
                case _State.TEXT:
                    yield from self._read_text()
                case _State.HEAD:
                    yield from self._read_head()
                case _State.ARGUMENTS:
                    yield from self._read_arguments()
                case _State.TAIL:
                    self._read_tail()
            if not self._held or before == (self._state, len(self._held)):
                return

    def tell(self, call: ToolCallDelta) -> Iterator[Piece]:
        """Takes a piece of a call that an upstream told apart from the text."""
        if call.name:
            self.num_calls += 1
            yield CallBegun(call.number, call.name)
        if call.arguments:
            yield Arguments(call.number, call.arguments)

    def finish(self) -> Iterator[Piece]:
        """Takes the end of the answer: what was begun and is no call is text."""
        held, self._held = self._held, ""
        if self._state is _State.HEAD:
            held = BEGIN + held
        if self._state in (_State.TEXT, _State.HEAD) and (held if not self.num_calls else held.strip()):
            yield held

    def _read_text(self) -> Iterator[Piece]:
        text, tag, rest = self._held.partition(BEGIN)
        if tag:
            self._state, self._held = _State.HEAD, rest
            text = text.rstrip()
        else:
            # White space may be what stands between the text and a call.
            shown = len(text[: len(text) - _num_begun(text)].rstrip())
            text, self._held = text[:shown], text[shown:]
        if text:
            yield text

    def _read_head(self) -> Iterator[Piece]:
        head = _HEAD.match(self._held)
        if head is not None:
            self._held = self._held[head.end() :]
            self._state = _State.ARGUMENTS
            yield CallBegun(self.num_calls, head[1])
            self.num_calls += 1
        elif END in self._held or len(self._held) > _MAX_HEAD_CHARS:
            self._state = _State.TEXT
            text, self._held = BEGIN + self._held, ""
            yield text

    def _read_arguments(self) -> Iterator[Piece]:
        for place, char in enumerate(self._held):
            if self._in_string:
                if self._is_escaped:
                    self._is_escaped = False
                elif char == "\\":
                    self._is_escaped = True
                elif char == '"':
                    self._in_string = False
            elif char == '"':
                self._in_string = True
            elif char in "{[":
                self._depth += 1
            elif char in "}]":
                self._depth -= 1
                if self._depth == 0:
                    text, self._held = self._held[: place + 1], self._held[place + 1 :]
                    self._state = _State.TAIL
                    yield Arguments(self.num_calls - 1, text)
                    return
        text, self._held = self._held, ""
        if text:
            yield Arguments(self.num_calls - 1, text)

    def _read_tail(self) -> None:
        _, tag, rest = self._held.partition(END)
        if tag:
            self._state, self._held = _State.TEXT, rest
        else:
            self._held = self._held[-len(END) :]


def _num_begun(text: str) -> int:
    """Length of the longest end of the text that a begin tag begins with."""
    longest = min(len(BEGIN) - 1, len(text))
    return next((length for length in range(longest, 0, -1) if text.endswith(BEGIN[:length])), 0)
