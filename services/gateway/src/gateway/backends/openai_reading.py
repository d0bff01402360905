"""Reads what an OpenAI-compatible server answers: chunks of a stream, or one whole answer, as the core's events.

It comes from a stranger: whatever is not as it should be raises Malformed, and nothing is taken on trust.
"""

import math
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import orjson

from gateway.core.services import (
    Chat,
    Delta,
    Done,
    Finished,
    Generation,
    GenerationEvent,
    Started,
    TokenLogprob,
    ToolCallDelta,
    ToolCalls,
    TopLogprob,
    Usage,
)

_BYTES_PER_TOKEN = 4  # about, in English: for the estimate of a prompt that nobody counted
_REASONS = frozenset({"stop", "length", "tool_calls", "content_filter"})
_CUT_OFF = frozenset({"error", "abort"})


class Malformed(Exception):
    """The answer is none of OpenAI's; the message says what is wrong with it."""


class Reported(Exception):
    """The server reports an error in the middle of its stream."""


class AnswerReader:
    """Reads one answer to one call."""

    def __init__(self, call: Generation, *, has_running_usage: bool) -> None:
        self._call = call
        self._has_running_usage = has_running_usage  # every chunk tells what its completion has used so far
        self._has_tools = isinstance(call.grammar, ToolCalls)
        self._has_started = False
        self._unfinished = set(range(call.n))
        self._counted = [0] * call.n
        self._num_chars = 0
        self._calls: list[dict[int, int]] = [{} for _ in range(call.n)]  # the server's number of a call: ours
        self._usage: Usage | None = None

    def take(self, payload: bytes) -> Iterator[GenerationEvent]:
        """The events of one chunk, or of an answer in one piece; raises Malformed or Reported."""
        try:
            chunk = orjson.loads(payload)
            if chunk.get("error"):
                raise Reported(_error_message(chunk["error"]))
            usage = _usage(chunk.get("usage"))
            if usage is not None:
                self._usage = usage
            choices = chunk["choices"]
            if not self._has_started:
                self._has_started = True
                yield self._started(chunk, usage)
            for choice in choices:
                if (delta := self._plain_text(choice)) is not None:
                    yield delta
                else:
                    yield from self._choice(choice, usage)
        except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
            raise Malformed(f"a chunk that is none of OpenAI's ({type(error).__name__})") from error

    def take_echo(self, payload: bytes) -> Iterator[GenerationEvent]:
        """The events of an answer in one piece that repeats the prompt with its log probabilities; raises as take."""
        try:
            answer = orjson.loads(payload)
            usage = self._usage = _usage(answer["usage"])
            assert usage is not None  # else the subscript has raised
            num_prompt = usage.prompt_tokens
            for choice in answer["choices"]:
                tokens = _completion_logprobs(choice["logprobs"])
                if not self._has_started:
                    self._has_started = True
                    yield Started(num_prompt, _fingerprint(answer), tokens[:num_prompt])
                own = tokens[num_prompt:]
                text = self._completion(choice["text"], tokens[:num_prompt], own)
                if text or own:
                    yield Delta(self._index(choice), text, len(own), own if self._call.logprobs is not None else ())
                yield self._finished(self._index(choice), choice["finish_reason"])
        except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
            raise Malformed(f"an echo that is none of OpenAI's ({type(error).__name__})") from error

    def finish(self) -> Done:
        """The end of the answer; raises Malformed where a completion has none."""
        if self._unfinished:
            raise Malformed("an answer that ended too early")
        if self._usage is not None:
            return Done(self._usage)
        num_tokens = max(sum(self._counted), self._num_chars // _BYTES_PER_TOKEN)
        return Done(Usage(prompt_estimate(self._call), num_tokens, is_estimate=True))

    def _started(self, chunk: Mapping[str, Any], usage: Usage | None) -> Started:
        if usage is not None and usage.prompt_tokens:
            return Started(usage.prompt_tokens, _fingerprint(chunk))
        return Started(prompt_estimate(self._call), _fingerprint(chunk), is_estimate=True)

    def _plain_text(self, choice: Mapping[str, Any]) -> Delta | None:
        """What nearly every chunk is: a piece of text and nothing else. None for all others."""
        said = choice.get("delta")
        if not said or len(said) > 1 or choice.get("finish_reason") is not None or choice.get("logprobs") is not None:
            return None
        text = said.get("content")
        if not text or not isinstance(text, str) or self._has_running_usage:
            return None
        index = self._index(choice)
        self._counted[index] += 1
        self._num_chars += len(text)
        return Delta(index, text, 1)

    def _choice(self, choice: Mapping[str, Any], usage: Usage | None) -> Iterator[GenerationEvent]:
        index = self._index(choice)
        said = choice.get("delta") or choice.get("message") or choice
        text = said.get("content") or said.get("refusal") or said.get("text") or ""
        logprobs = self._logprobs(choice.get("logprobs"))
        calls = said.get("tool_calls") or ()
        num_tokens = self._num_tokens(index, usage, has_content=bool(text or calls), logprobs=logprobs)
        if text or logprobs or (num_tokens and not calls):
            yield Delta(index, _text(text), num_tokens, logprobs)
            self._num_chars += len(text)
            num_tokens = 0
        for place, call in enumerate(calls):
            yield self._call_piece(index, place, call, num_tokens)
            num_tokens = 0
        if choice.get("finish_reason") is not None:
            yield self._finished(index, choice["finish_reason"])

    def _index(self, choice: Mapping[str, Any]) -> int:
        index = choice.get("index", 0)
        if not isinstance(index, int) or not 0 <= index < self._call.n:
            raise ValueError("no completion has this index")
        return index

    def _num_tokens(
        self, index: int, usage: Usage | None, *, has_content: bool, logprobs: Sequence[TokenLogprob]
    ) -> int:
        """New tokens of a chunk: as the running usage or the log probabilities tell, or one where there is content."""
        if self._has_running_usage and usage is not None:
            new = max(0, usage.completion_tokens - self._counted[index])
        else:
            new = len(logprobs) or int(has_content)
        self._counted[index] += new
        return new

    def _logprobs(self, said: Any) -> tuple[TokenLogprob, ...]:
        if said is None or self._call.logprobs is None:
            return ()
        if isinstance(self._call.prompt, Chat):
            return tuple(_chat_logprob(token) for token in said.get("content") or ())
        return _completion_logprobs(said)

    def _call_piece(self, index: int, place: int, call: Mapping[str, Any], num_tokens: int) -> ToolCallDelta:
        if not self._has_tools:
            raise ValueError("a tool call, and no tools were given")
        known, function = self._calls[index], call.get("function") or {}
        theirs = call.get("index", place)
        arguments = _text(function.get("arguments") or "")
        if theirs in known:
            if known[theirs] != len(known) - 1:
                raise ValueError("a call goes on after another one has begun")
            return ToolCallDelta(index, known[theirs], arguments, num_tokens)
        number = known[theirs] = len(known)
        call_id = _text(call.get("id") or f"call_{uuid.uuid4().hex[:24]}")
        return ToolCallDelta(index, number, arguments, num_tokens, call_id, _text(function["name"]))

    def _finished(self, index: int, reason: Any) -> Finished:
        if reason in _CUT_OFF:
            raise Reported("it ended the answer by an error")
        self._unfinished.discard(index)
        return Finished(index, reason if reason in _REASONS else "stop")

    def _completion(self, text: str, prompt: Sequence[TokenLogprob], own: Sequence[TokenLogprob]) -> str:
        """What follows the prompt in an echo; its tokens' texts where the echo is not letter by letter the prompt."""
        known = self._call.prompt if isinstance(self._call.prompt, str) else "".join(token.text for token in prompt)
        return text[len(known) :] if text.startswith(known) else "".join(token.text for token in own)


def prompt_estimate(call: Generation) -> int:
    """About how many tokens a prompt has, for as long as nobody told."""
    match call.prompt:
        case Chat():
            texts = [message.content + message.tool_calls_json for message in call.prompt.messages]
            num_bytes = sum(len(text.encode()) for text in texts) + len(call.prompt.tools_json)
        case str():
            num_bytes = len(call.prompt.encode())
        case _:
            return len(call.prompt)
    return -(-num_bytes // _BYTES_PER_TOKEN)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError("no text")
    return value


def _count(value: Any) -> int:
    if not isinstance(value, int) or value < 0:
        raise ValueError("no count")
    return value


def _usage(said: Any) -> Usage | None:
    if said is None:
        return None
    details = said.get("prompt_tokens_details") or {}
    return Usage(
        _count(said.get("prompt_tokens") or 0),
        _count(said.get("completion_tokens") or 0),
        _count(details.get("cached_tokens") or 0),
    )


def _fingerprint(answer: Mapping[str, Any]) -> str:
    return str(answer.get("system_fingerprint") or "")


def _chat_logprob(said: Mapping[str, Any]) -> TokenLogprob:
    top = tuple(TopLogprob(0, float(one["logprob"]), _text(one["token"]), _bytes(one)) for one in _tops(said))
    return TokenLogprob(0, float(said["logprob"]), _text(said["token"]), _bytes(said), top)


def _tops(said: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    return said.get("top_logprobs") or ()


def _bytes(said: Mapping[str, Any]) -> bytes:
    told = said.get("bytes")
    return bytes(told) if told is not None else _text(said["token"]).encode(errors="replace")


def _completion_logprobs(said: Mapping[str, Any]) -> tuple[TokenLogprob, ...]:
    tokens, logprobs = said["tokens"], said["token_logprobs"]
    tops = said.get("top_logprobs") or [None] * len(tokens)
    return tuple(
        TokenLogprob(
            0,
            math.nan if logprob is None else float(logprob),
            _text(token),
            token.encode(errors="replace"),
            tuple(TopLogprob(0, float(one), text, text.encode(errors="replace")) for text, one in (top or {}).items()),
        )
        for token, logprob, top in zip(tokens, logprobs, tops, strict=True)
    )


def _error_message(error: Any) -> str:
    message = error.get("message") if isinstance(error, Mapping) else error
    return str(message)[:500]
