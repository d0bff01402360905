"""A constraint on the output as core sees it: what is asked, and what a compiled grammar says of the next token.

Knows no grammar library. Compiling may take long and is done before a request is submitted, off the event loop and
off the engine's thread; a matcher answers within the time of a step.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

MAX_SOURCE_CHARS = 128 * 1024


@dataclass(frozen=True, slots=True)
class Grammar:
    """A constraint on the output.

    kind is "json_schema", "json_object", "regex", "choice" (the source is a JSON list of strings), "ebnf" (llguidance's
    Lark, or GBNF where it has "::=") or "tool_calls" (see core.tool_calls).
    """

    kind: str
    source: str = ""


class TokenMatcher(Protocol):
    """Follows one completion. Used on the engine's thread; none of it blocks."""

    @property
    def is_done(self) -> bool:
        """Whether nothing may follow any more: the completion ends."""
        ...

    def mask(self) -> NDArray[np.int32]:
        """Returns what may come next as ceil(V / 32) words; bit t % 32 of word t // 32 is set where token t may.

        Never raises, and allows a token (an end token at least) unless `is_done`.
        """
        ...

    def accept(self, token_id: int) -> None:
        """Takes the token that was picked. Raises PlatformError, the end of its request, where it cannot go on."""
        ...


class CompiledGrammar(Protocol):
    """A grammar that is ready; shared by the n completions of a request."""

    def matcher(self) -> TokenMatcher:
        """Returns a matcher at the beginning of a completion; cheap."""
        ...


class GrammarCompiler(Protocol):
    """Compiles grammars; may block for its whole budget, and may be called from several threads."""

    def compile(self, grammar: Grammar) -> CompiledGrammar:
        """Raises PlatformError(INVALID_ARGUMENT) for what cannot be compiled, or not within the budget."""
        ...

    def close(self) -> None:
        """Frees what it holds; nothing may be compiled any more."""
        ...
