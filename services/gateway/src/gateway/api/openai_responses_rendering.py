"""The answer of /v1/responses as OpenAI's clients read it: a response, and the events of its stream."""

import time
import uuid
from collections.abc import Iterable, Mapping, Sequence

from chassis.errors import PlatformError
from gateway.api import errors
from gateway.api.grounding import grounding_fields
from gateway.api.inference import NAMED_EVENTS, JsonObject
from gateway.api.openai_logprobs import token_logprobs
from gateway.core.graph import Answering, GraphEvent, Grounding
from gateway.core.services import Delta, Done, Finished, Started, TokenLogprob, ToolCallDelta, Usage
from gateway.core.tool_calls import Arguments, CallBegun, Piece, ToolCallReader

_STATUSES = {"stop": "completed", "length": "incomplete"}


class _Text:
    """A message item as it grows."""

    def __init__(self) -> None:
        self.id = f"msg_{uuid.uuid4().hex}"
        self.text: list[str] = []
        self.logprobs: list[object] = []

    def part(self) -> dict[str, object]:
        return {"type": "output_text", "text": "".join(self.text), "annotations": [], "logprobs": self.logprobs}

    def item(self, status: str) -> dict[str, object]:
        content = [] if status == "in_progress" else [self.part()]
        return {"id": self.id, "type": "message", "role": "assistant", "status": status, "content": content}


class _Call:
    """A function_call item as it grows."""

    def __init__(self, name: str) -> None:
        self.id = f"fc_{uuid.uuid4().hex}"
        self.name = name
        self.arguments: list[str] = []
        self._call_id = f"call_{uuid.uuid4().hex[:24]}"

    def item(self, status: str) -> dict[str, object]:
        return {
            "id": self.id,
            "type": "function_call",
            "status": status,
            "call_id": self._call_id,
            "name": self.name,
            "arguments": "".join(self.arguments),
        }


class ResponseRendering:
    """Events as response.created, response.output_item.added and so on."""

    framing = NAMED_EVENTS

    def __init__(
        self,
        *,
        model: str,
        echoed: Mapping[str, object],
        has_tools: bool,
        logprobs: bool,
        params: Mapping[str, str],
    ) -> None:
        self.params = params
        self._model = model
        self._echoed = echoed
        self._logprobs = logprobs
        self._id = f"resp_{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._reader = ToolCallReader() if has_tools else None
        self._items: list[_Text | _Call] = []
        self._is_open = False  # the last item
        self._status = "in_progress"
        self._error: dict[str, object] | None = None
        self._grounding: Grounding | None = None
        self._usage: Usage | None = None
        self._num_events = 0

    def take(self, event: GraphEvent) -> Iterable[JsonObject]:
        """The chunks for one event."""
        match event:
            case Delta():
                pieces = [event.text] if self._reader is None else self._reader.feed(event.text)
                told: Sequence[TokenLogprob] = event.logprobs
                for piece in pieces:
                    yield from self._grow(piece, told)
                    told = ()
            case ToolCallDelta():
                assert self._reader is not None  # no backend tells calls where no tools were given
                for piece in self._reader.tell(event):
                    yield from self._grow(piece, ())
            case Started():
                yield self._event("response.created", response=self.whole())
                yield self._event("response.in_progress", response=self.whole())
            case Finished():
                for piece in self._reader.finish() if self._reader else ():
                    yield from self._grow(piece, ())
                if not self._items:  # an answer without a word is a message all the same
                    yield from self._open(_Text())
                self._status = _STATUSES.get(event.reason, "completed")
                yield from self._close()
            case Answering():
                self._model = event.model
            case Grounding():
                self._grounding = event
            case Done():
                self._usage = event.usage
                yield self._event(f"response.{self._status}", response=self.whole())

    def whole(self) -> JsonObject:
        """The answer in one piece."""
        done = self._items[:-1] if self._is_open else self._items
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "status": self._status,
            "background": False,
            "error": self._error,
            "incomplete_details": {"reason": "max_output_tokens"} if self._status == "incomplete" else None,
            "model": self._model,
            "output": [item.item(self._item_status(item)) for item in done],
            "reasoning": {"effort": None, "summary": None},
            "service_tier": "default",
            "usage": None if self._usage is None else _usage_object(self._usage),
            **self._echoed,
            **({} if self._grounding is None else grounding_fields(self._grounding)),
        }

    def failure(self, error: PlatformError) -> Iterable[JsonObject]:
        """The response as far as it came, and why it failed."""
        self._status = "failed"
        self._error = {"code": errors.error_code(error), "message": error.message}
        yield self._event("response.failed", response=self.whole())

    def _item_status(self, item: _Text | _Call) -> str:
        """Only the last item can have been cut short."""
        return "incomplete" if self._status == "incomplete" and item is self._items[-1] else "completed"

    def _grow(self, piece: Piece, told: Sequence[TokenLogprob]) -> Iterable[JsonObject]:
        match piece:
            case CallBegun():
                yield from self._close()
                yield from self._open(_Call(piece.name))
            case Arguments():
                call = self._items[-1]
                assert isinstance(call, _Call)
                call.arguments.append(piece.text)
                yield self._of_item("response.function_call_arguments.delta", delta=piece.text)
            case str() if piece or told:
                if not (self._is_open and isinstance(self._items[-1], _Text)):
                    yield from self._close()
                    yield from self._open(_Text())
                text = self._items[-1]
                assert isinstance(text, _Text)
                logprobs = token_logprobs(told) if self._logprobs else []
                text.text.append(piece)
                text.logprobs.extend(logprobs)
                yield self._of_item("response.output_text.delta", content_index=0, delta=piece, logprobs=logprobs)

    def _open(self, item: _Text | _Call) -> Iterable[JsonObject]:
        self._is_open = True
        self._items.append(item)
        added = item.item("in_progress")
        yield self._event("response.output_item.added", output_index=len(self._items) - 1, item=added)
        if isinstance(item, _Text):
            yield self._of_item("response.content_part.added", content_index=0, part=item.part())

    def _close(self) -> Iterable[JsonObject]:
        if not self._is_open:
            return
        self._is_open = False
        item = self._items[-1]
        if isinstance(item, _Text):
            text = "".join(item.text)
            yield self._of_item("response.output_text.done", content_index=0, text=text, logprobs=item.logprobs)
            yield self._of_item("response.content_part.done", content_index=0, part=item.part())
        else:
            arguments = "".join(item.arguments)
            yield self._of_item("response.function_call_arguments.done", name=item.name, arguments=arguments)
        done = item.item(self._item_status(item))
        yield self._event("response.output_item.done", output_index=len(self._items) - 1, item=done)

    def _of_item(self, kind: str, **fields: object) -> JsonObject:
        return self._event(kind, item_id=self._items[-1].id, output_index=len(self._items) - 1, **fields)

    def _event(self, kind: str, **fields: object) -> JsonObject:
        event = {"type": kind, "sequence_number": self._num_events, **fields}
        self._num_events += 1
        return event


def _usage_object(usage: Usage) -> dict[str, object]:
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }
