"""What may be embedded, and what is refused before anything is computed."""

from collections.abc import Sequence
from dataclasses import dataclass

from chassis.errors import Code, PlatformError

MAX_INPUTS = 2048
MAX_TEXT_CHARS = 500_000  # a longer one would hold the interpreter for too long when its tokens are handed over
MAX_TOTAL_CHARS = 4_000_000


@dataclass(frozen=True, slots=True)
class EncoderInfo:
    """What an encoder is: `max_tokens` includes the special tokens that it adds to every text."""

    id: str
    version: str
    dimensions: int
    max_tokens: int
    num_special_tokens: int
    vocabulary_size: int
    created_unix_s: int


@dataclass(frozen=True, slots=True)
class TokenSpan:
    """A token and its place in the text, in code points; `end` is exclusive."""

    id: int
    start: int
    end: int


def check_inputs(num_inputs: int) -> None:
    """Refuses an empty or an over-long list of inputs."""
    if num_inputs == 0:
        raise PlatformError(Code.INVALID_ARGUMENT, "input is empty", param="input")
    if num_inputs > MAX_INPUTS:
        raise PlatformError(
            Code.INVALID_ARGUMENT, f"input has {num_inputs} items; at most {MAX_INPUTS} are taken", param="input"
        )


def check_total(num_chars: int) -> None:
    """Refuses inputs that are too large together; a token id counts as a character."""
    if num_chars > MAX_TOTAL_CHARS:
        raise PlatformError(
            Code.PAYLOAD_TOO_LARGE,
            f"input has {num_chars} characters in all; at most {MAX_TOTAL_CHARS} are taken at once",
            param="input",
        )


def check_text(text: str, index: int) -> None:
    """Refuses a text that is empty or that no tokenizer should be given."""
    if not text.strip():
        raise PlatformError(Code.INVALID_ARGUMENT, f"input {index} is empty", param="input")
    if len(text) > MAX_TEXT_CHARS:
        raise PlatformError(
            Code.OUT_OF_RANGE,
            f"input {index} has {len(text)} characters; at most {MAX_TEXT_CHARS} are read",
            param="input",
            reason="context_length_exceeded",
        )


def check_token_ids(ids: Sequence[int], index: int, info: EncoderInfo) -> None:
    """Refuses token lists that are empty or name a token that the vocabulary does not have."""
    if not ids:
        raise PlatformError(Code.INVALID_ARGUMENT, f"input {index} is empty", param="input")
    if max(ids) >= info.vocabulary_size:
        raise PlatformError(
            Code.INVALID_ARGUMENT,
            f"input {index} has the token {max(ids)}; the vocabulary of {info.id} ends at {info.vocabulary_size - 1}",
            param="input",
        )


def fit(ids: list[int], index: int, info: EncoderInfo, truncate: bool) -> list[int]:
    """Returns the ids that the encoder reads of an input (special tokens not counted in), or refuses it."""
    room = info.max_tokens - info.num_special_tokens
    if len(ids) <= room:
        return ids
    if truncate:
        return ids[:room]
    raise PlatformError(
        Code.OUT_OF_RANGE,
        f"input {index} has {len(ids) + info.num_special_tokens} tokens; {info.id} reads at most {info.max_tokens}",
        param="input",
        reason="context_length_exceeded",
    )


def check_dimensions(dimensions: int, info: EncoderInfo) -> int:
    """Returns how many dimensions to keep; 0 asks for all."""
    if dimensions == 0:
        return info.dimensions
    if dimensions > info.dimensions:
        raise PlatformError(
            Code.INVALID_ARGUMENT, f"dimensions is {dimensions}; {info.id} has {info.dimensions}", param="dimensions"
        )
    return dimensions
