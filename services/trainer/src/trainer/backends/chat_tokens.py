"""Turns chats into token ids and a mask of what is learned, with the tokenizer and the chat template of a model folder.

The ids are those that the generator would see: each answer is tokenized apart from the prompt that leads to it, and
the names of special tokens inside a text stay text. Needs no torch.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from chassis.errors import Code, PlatformError
from trainer.core.examples import BadLine, Example, Turn

# Marks where the tokenizer must not join characters. A lone surrogate: no text that came as UTF-8 holds one.
_CUT = "\ud800"
_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token")


@dataclass(frozen=True, slots=True)
class TokenSequence:
    """One example as ids; `is_learned[i]`: predicting ids[i] counts in the loss."""

    ids: list[int]
    is_learned: list[bool]


class ChatTokens:
    """Raises PlatformError(FAILED_PRECONDITION) for a folder that it cannot use."""

    def __init__(self, folder: Path) -> None:
        try:
            self._raw = Tokenizer.from_file(str(folder / "tokenizer.json"))
            config = json.loads((folder / "tokenizer_config.json").read_text())
            source = (folder / "chat_template.jinja").read_text()
        except OSError as error:
            raise _unusable(folder, f"{error.filename} is missing: a chat cannot be rendered") from error
        self._raw.no_truncation()
        self._raw.no_padding()
        named = {name: config.get(name) for name in _SPECIAL_NAMES}
        flat = {name: value["content"] if isinstance(value, dict) else value for name, value in named.items()}
        self._special_tokens = {name: value for name, value in flat.items() if value is not None}
        self._stops = _stop_ids(folder)
        added = self._raw.get_added_tokens_decoder().values()
        names = [token.content for token in added if token.special and len(token.content) > 1]
        # Matches the first character of each name, so that names which overlap are found too.
        self._special_start = re.compile(f"(?={'|'.join(map(re.escape, names))})(.)", re.DOTALL) if names else None
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateError as error:
            raise _unusable(folder, f"its chat template is broken: {error}") from error

    def encode(self, example: Example) -> TokenSequence:
        """Returns ids and mask. Raises BadLine where the template refuses the chat."""
        turns = [Turn(turn.role, self._as_plain_text(turn.content), turn.is_learned) for turn in example.turns]
        sequence = TokenSequence([], [])
        done = ""
        for number, turn in enumerate(turns):
            if turn.role != "assistant":
                continue
            prompt = self._render(turns[:number], is_open=True)
            closed = self._render(turns[: number + 1], is_open=False)
            if not prompt.startswith(done) or not closed.startswith(prompt):
                raise BadLine("the model's chat template does not write a chat turn by turn, so it cannot be learned")
            self._append(sequence, prompt[len(done) :], is_learned=False)
            self._append(sequence, closed[len(prompt) :], is_learned=turn.is_learned)
            done = closed
        return sequence

    def _append(self, sequence: TokenSequence, text: str, *, is_learned: bool) -> None:
        """Adds a piece; of an answer, what stands behind the token that ends it is never sampled, so not learned."""
        ids = [token for part in text.split(_CUT) for token in self._raw.encode(part, add_special_tokens=False).ids]
        last = max((i for i, token in enumerate(ids) if token in self._stops), default=len(ids) - 1)
        sequence.ids.extend(ids)
        sequence.is_learned.extend(is_learned and i <= last for i in range(len(ids)))

    def _render(self, turns: Sequence[Turn], *, is_open: bool) -> str:
        messages = [{"role": turn.role, "content": turn.content} for turn in turns]
        try:
            return self._template.render(
                messages=messages, tools=None, documents=None, add_generation_prompt=is_open, **self._special_tokens
            )
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise BadLine(f"the model's chat template refused it: {error}") from error

    def _as_plain_text(self, text: str) -> str:
        return self._special_start.sub(rf"\1{_CUT}", text) if self._special_start else text


def _environment() -> ImmutableSandboxedEnvironment:
    """Offers what transformers offers to templates, as the generator does."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.globals["raise_exception"] = _raise_exception
    return environment


def _stop_ids(folder: Path) -> frozenset[int]:
    """Ids that end an answer, as the generator reads them."""
    found: set[int] = set()
    for name in ("config.json", "generation_config.json"):
        path = folder / name
        content: Any = json.loads(path.read_text()) if path.exists() else {}
        ids = content.get("eos_token_id")
        found |= set() if ids is None else {ids} if isinstance(ids, int) else set(ids)
    return frozenset(found)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _unusable(folder: Path, why: str) -> PlatformError:
    return PlatformError(Code.FAILED_PRECONDITION, f"model {folder.name}: {why}", param="model")
