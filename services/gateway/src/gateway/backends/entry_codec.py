"""Cached answers as bytes: JSON lists, packed. Read by the version of this program that wrote them, or not at all.

Not pickle: whoever can write to the cache must not be able to run code here.
"""

import base64
import json
import zlib
from collections.abc import Sequence
from typing import Any

from gateway.core.graph import GraphEvent
from gateway.core.repeats import Entry
from gateway.core.services import Delta, Done, Finished, Started, TokenLogprob, TopLogprob, Usage

_FORMAT = 1


def encoded(entry: Entry) -> bytes:
    """Writes an entry."""
    text = json.dumps([_FORMAT, entry.model_version, [_written(event) for event in entry.events]])
    return zlib.compress(text.encode(), level=1)


def decoded(packed: bytes, *, max_bytes: int) -> Entry:
    """Reads what encoded() wrote; raises ValueError for anything else, and for what unpacks to more than max_bytes."""
    unpacker = zlib.decompressobj()
    try:
        text = unpacker.decompress(packed, max_bytes)
        if not unpacker.eof:
            raise ValueError("it is cut short or too large")
        form, version, events = json.loads(text)
        if form != _FORMAT:
            raise ValueError("it is of another format")
        return Entry(version, tuple(_read(*event) for event in events))
    except (zlib.error, TypeError, ValueError) as error:
        raise ValueError(f"not an entry: {error}") from error


def _written(event: GraphEvent) -> list[Any]:
    match event:
        case Started():
            return ["s", event.prompt_tokens, event.model_version, _tokens(event.prompt_logprobs), event.prompt_index]
        case Delta():
            return ["d", event.index, event.text, event.num_tokens, _tokens(event.logprobs)]
        case Finished():
            return ["f", event.index, event.reason]
        case Done():
            return ["u", event.usage.prompt_tokens, event.usage.completion_tokens, event.usage.cached_tokens]
    raise TypeError(f"{type(event).__name__} is never kept")


def _read(kind: str, *rest: Any) -> GraphEvent:
    match kind:
        case "s":
            prompt_tokens, version, logprobs, index = rest
            return Started(prompt_tokens, version, _logprobs(logprobs), index)
        case "d":
            index, text, num_tokens, logprobs = rest
            return Delta(index, text, num_tokens, _logprobs(logprobs))
        case "f":
            return Finished(*rest)
        case "u":
            return Done(Usage(*rest))
    raise ValueError("there is an event of an unknown kind")


def _tokens(tokens: Sequence[TokenLogprob]) -> list[Any]:
    return [[*_token(one), [_token(top) for top in one.top]] for one in tokens]


def _token(one: TokenLogprob | TopLogprob) -> list[Any]:
    return [one.token_id, one.logprob, one.text, base64.b64encode(one.token_bytes).decode()]


def _logprobs(written: list[Any]) -> tuple[TokenLogprob, ...]:
    return tuple(
        TokenLogprob(
            token_id,
            logprob,
            text,
            base64.b64decode(raw),
            tuple(TopLogprob(i, p, t, base64.b64decode(b)) for i, p, t, b in top),
        )
        for token_id, logprob, text, raw, top in written
    )
