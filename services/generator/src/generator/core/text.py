"""Tokens to text, piece by piece: UTF-8 that is never cut in half, and stop strings that are never shown in part."""

import codecs
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One turn of a chat; `tool_calls_json` is empty for none."""

    role: str
    content: str
    tool_calls_json: str = ""
    tool_call_id: str = ""


class Vocabulary(Protocol):
    """What the engine must know of a tokenizer."""

    def token_bytes(self, token_id: int) -> bytes:
        """Returns what a token adds to the text; empty for special tokens."""
        ...

    def token_text(self, token_id: int) -> str:
        """Returns a token as one shows it to people: special tokens by name, broken characters replaced."""
        ...


class Tokenizer(Vocabulary, Protocol):
    """A model's tokenizer with its chat template. Its methods may take milliseconds: not for the event loop."""

    def encode(self, text: str) -> list[int]:
        """Tokenizes a plain text, with the special tokens that the model wants around one."""
        ...

    def encode_chat(self, messages: Sequence[ChatMessage], tools_json: str) -> list[int]:
        """Renders a chat with the model's template, ready for the assistant's turn, and tokenizes it."""
        ...

    @property
    def max_token_bytes(self) -> int:
        """Length of the longest token: a text of B bytes has at least B / max_token_bytes tokens."""
        ...


class IncrementalDecoder:
    """Joins token bytes into text; the beginning of a character waits for its rest. Invalid bytes become U+FFFD."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def add(self, token_bytes: bytes) -> str:
        """Returns the characters that are now whole; an incomplete end is dropped with the decoder."""
        return self._decoder.decode(token_bytes)


class StopMatcher:
    """Finds stop strings in a text that comes in pieces, holding back what may be the beginning of one."""

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._stops = stops
        self._held = ""

    def add(self, piece: str) -> tuple[str, str | None]:
        """Returns the text that is safe to show and the stop string that was found, if one was.

        After a match nothing may be added. Of several matches the one that begins first counts.
        """
        text = self._held + piece
        found = [(at, -len(stop), stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            at, _, stop = min(found)
            self._held = ""
            return text[:at], stop
        held = self._num_held(text)
        self._held = text[len(text) - held :]
        return text[: len(text) - held], None

    def flush(self) -> str:
        """Returns what was held back: the completion ended without that stop."""
        held, self._held = self._held, ""
        return held

    def _num_held(self, text: str) -> int:
        """Length of the longest end of the text with which a stop string begins."""
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        for length in range(min(longest, len(text)), 0, -1):
            end = text[-length:]
            if any(stop.startswith(end) for stop in self._stops):
                return length
        return 0
