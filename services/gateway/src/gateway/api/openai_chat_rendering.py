"""The answer of a chat as OpenAI's clients read it: chat.completion, and chat.completion.chunk in a stream."""

import random
import time
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType

from gateway.api.grounding import grounding_fields
from gateway.api.inference import DataEvents, JsonObject
from gateway.api.openai_logprobs import chat_logprobs
from gateway.api.openai_params import usage_object
from gateway.api.openai_tools import ToolCallRendering
from gateway.core.graph import Answering, GraphEvent, Grounding
from gateway.core.services import Delta, Done, Finished, Started, TokenLogprob, ToolCallDelta, Usage


class _Choice:
    """One completion as it grows; with tools its text is read for calls."""

    def __init__(self, has_tools: bool) -> None:
        self.text: list[str] = []
        self.logprobs: list[TokenLogprob] = []
        self.finish_reason: str | None = None
        self._tools = ToolCallRendering() if has_tools else None

    def take(self, delta: Delta) -> Iterable[tuple[Mapping[str, object], Sequence[TokenLogprob]]]:
        """The deltas to show for a piece, and the log probabilities to tell with each: those of calls are not told."""
        if self._tools is None and not delta.logprobs:  # nearly always
            self.text.append(delta.text)
            if delta.text:
                yield {"content": delta.text}, ()
            return
        if self._tools is None:
            self.text.append(delta.text)
            shown: list[tuple[Mapping[str, object], bool]] = [({"content": delta.text}, True)]
        else:
            shown = [*self._tools.take(delta)]
        told = delta.logprobs
        for fields, is_text in shown:
            logprobs = told if is_text else ()
            told = () if is_text else told
            self.logprobs.extend(logprobs)
            if logprobs or not is_text or fields["content"]:
                yield fields, logprobs

    def take_call(self, piece: ToolCallDelta) -> Mapping[str, object]:
        """The delta to show for a piece of a call."""
        assert self._tools is not None  # no backend tells calls where no tools were given
        return self._tools.take_call(piece)

    def finish(self, reason: str) -> Iterable[Mapping[str, object]]:
        """The deltas that are left; sets the reason."""
        self.finish_reason = reason
        if self._tools is not None:
            yield from (fields for fields, _ in self._tools.finish())
            if self._tools.has_calls and reason == "stop":
                self.finish_reason = "tool_calls"

    def message(self) -> dict[str, object]:
        """The whole message."""
        fields = {"content": "".join(self.text)} if self._tools is None else self._tools.message()
        return {"role": "assistant", **fields, "refusal": None}


class ChatRendering(DataEvents):
    """Events as chat.completion and chat.completion.chunk."""

    def __init__(
        self,
        *,
        model: str,
        n: int,
        logprobs: bool,
        include_usage: bool,
        continuous_usage: bool = False,
        has_tools: bool = False,
        params: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self.params = params
        self._has_tools = has_tools
        self._model = model
        self._logprobs = logprobs
        self._include_usage = include_usage
        self._continuous_usage = continuous_usage
        self._id = f"chatcmpl-{random.getrandbits(128):032x}"
        self._created = int(time.time())
        self._choices = [_Choice(has_tools) for _ in range(n)]
        self._fingerprint: str | None = None
        self._grounding: Grounding | None = None
        self._usage = Usage()

    def take(self, event: GraphEvent) -> Iterable[JsonObject]:
        """The chunks for one event."""
        match event:
            case Delta():
                if self._continuous_usage:
                    self._usage += Usage(completion_tokens=event.num_tokens)
                for fields, told in self._choices[event.index].take(event):
                    yield self._chunk(event.index, fields, chat_logprobs(told) if self._logprobs else None)
            case ToolCallDelta():
                yield self._chunk(event.index, self._choices[event.index].take_call(event), None)
            case Started():
                self._fingerprint = event.model_version or None
                self._usage += Usage(prompt_tokens=event.prompt_tokens)
                for index in range(len(self._choices)):
                    # Whether there will be text is not known yet where a call may come in its place.
                    fields = {"role": "assistant", "content": None if self._has_tools else ""}
                    yield self._chunk(index, fields, None)
            case Finished():
                choice = self._choices[event.index]
                for fields in choice.finish(event.reason):
                    yield self._chunk(event.index, fields, None)
                yield self._chunk(event.index, {}, None, choice.finish_reason) | self._grounded()
            case Grounding():
                self._grounding = event
            case Answering():
                self._model = event.model
            case Done():
                self._usage = event.usage
                if self._include_usage:
                    yield self._head("chat.completion.chunk") | {"choices": [], "usage": usage_object(event.usage)}

    def whole(self) -> JsonObject:
        """The answer in one piece."""
        choices = [
            {
                "index": index,
                "message": choice.message(),
                "logprobs": chat_logprobs(choice.logprobs) if self._logprobs else None,
                "finish_reason": choice.finish_reason,
            }
            for index, choice in enumerate(self._choices)
        ]
        head = self._head("chat.completion")
        return head | {"choices": choices, "usage": usage_object(self._usage)} | self._grounded()

    def _head(self, kind: str) -> dict[str, object]:
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": self._model,
            "system_fingerprint": self._fingerprint,
        }

    def _chunk(
        self,
        index: int,
        delta: Mapping[str, object],
        logprobs: Mapping[str, object] | None,
        finish_reason: str | None = None,
    ) -> dict[str, object]:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
        chunk = self._head("chat.completion.chunk")
        chunk["choices"] = [choice]
        if self._include_usage:
            chunk["usage"] = usage_object(self._usage) if self._continuous_usage else None
        return chunk

    def _grounded(self) -> dict[str, object]:
        return {} if self._grounding is None else grounding_fields(self._grounding)
