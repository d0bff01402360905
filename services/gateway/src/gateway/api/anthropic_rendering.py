"""The answer as Anthropic's clients read it: a message, and the events of its stream."""

import uuid
from collections.abc import Collection, Iterable, Mapping

from pydantic_core import from_json

from chassis.errors import PlatformError
from gateway.api import anthropic_errors
from gateway.api.grounding import grounding_fields
from gateway.api.inference import NAMED_EVENTS, JsonObject
from gateway.core.graph import Answering, GraphEvent, Grounding
from gateway.core.services import Delta, Done, Finished, Started, ToolCallDelta, Usage
from gateway.core.tool_calls import Arguments, CallBegun, Piece, ToolCallReader


class MessageRendering:
    """Events as message_start, content_block_start and so on."""

    framing = NAMED_EVENTS

    def __init__(
        self,
        *,
        model: str,
        stop_sequences: Collection[str],
        has_tools: bool,
        params: Mapping[str, str],
        request_id: str,
    ) -> None:
        self.params = params
        self._model = model
        self._stop_sequences = stop_sequences
        self._request_id = request_id
        self._id = f"msg_{uuid.uuid4().hex}"
        self._reader = ToolCallReader() if has_tools else None
        self._blocks: list[dict[str, object]] = []
        self._pieces: list[list[str]] = []  # text, or JSON text of a call's input, one list for each block
        self._is_open = False  # the last block
        self._stop_reason: str | None = None
        self._stop_sequence: str | None = None
        self._grounding: Grounding | None = None
        self._usage = Usage()

    def take(self, event: GraphEvent) -> Iterable[JsonObject]:
        """The chunks for one event."""
        match event:
            case Delta():
                pieces = [event.text] if self._reader is None else self._reader.feed(event.text)
                for piece in pieces:
                    yield from self._grow(piece)
            case ToolCallDelta():
                assert self._reader is not None  # no backend tells calls where no tools were given
                for piece in self._reader.tell(event):
                    yield from self._grow(piece)
            case Started():
                self._usage = Usage(prompt_tokens=event.prompt_tokens)
                yield {"type": "message_start", "message": self.whole()}
                yield {"type": "ping"}
            case Finished():
                for piece in self._reader.finish() if self._reader else ():
                    yield from self._grow(piece)
                yield from self._close()
                self._stopped(event)
            case Answering():
                self._model = event.model
            case Grounding():
                self._grounding = event
            case Done():
                self._usage = event.usage
                delta = {"stop_reason": self._stop_reason, "stop_sequence": self._stop_sequence}
                yield {"type": "message_delta", "delta": delta, "usage": self._usage_object()} | self._grounded()
                yield {"type": "message_stop"}

    def whole(self) -> JsonObject:
        """The answer in one piece."""
        return {
            "id": self._id,
            "type": "message",
            "role": "assistant",
            "model": self._model,
            "content": [self._block(number) for number in range(len(self._blocks))],
            "stop_reason": self._stop_reason,
            "stop_sequence": self._stop_sequence,
            "usage": self._usage_object(),
        } | self._grounded()

    def failure(self, error: PlatformError) -> Iterable[JsonObject]:
        """The error event."""
        yield anthropic_errors.envelope(error, self._request_id)

    def _grow(self, piece: Piece) -> Iterable[JsonObject]:
        match piece:
            case CallBegun():
                yield from self._close()
                id_ = f"toolu_{uuid.uuid4().hex[:24]}"
                yield self._open({"type": "tool_use", "id": id_, "name": piece.name, "input": {}})
            case Arguments():
                yield self._delta({"type": "input_json_delta", "partial_json": piece.text}, piece.text)
            case str() if piece:
                if not (self._is_open and self._blocks[-1]["type"] == "text"):
                    yield from self._close()
                    yield self._open({"type": "text", "text": ""})
                yield self._delta({"type": "text_delta", "text": piece}, piece)

    def _open(self, block: dict[str, object]) -> JsonObject:
        self._is_open = True
        self._blocks.append(block)
        self._pieces.append([])
        return {"type": "content_block_start", "index": len(self._blocks) - 1, "content_block": block}

    def _delta(self, delta: dict[str, object], text: str) -> JsonObject:
        self._pieces[-1].append(text)
        return {"type": "content_block_delta", "index": len(self._blocks) - 1, "delta": delta}

    def _close(self) -> Iterable[JsonObject]:
        if self._is_open:
            self._is_open = False
            yield {"type": "content_block_stop", "index": len(self._blocks) - 1}

    def _block(self, number: int) -> dict[str, object]:
        block, text = self._blocks[number], "".join(self._pieces[number])
        if block["type"] == "text":
            return block | {"text": text}
        # A call that max_tokens cut short has as much of its input as was written.
        return block | {"input": from_json(text or "{}", allow_partial=True)}

    def _stopped(self, finished: Finished) -> None:
        if finished.reason == "length":
            self._stop_reason = "max_tokens"
        elif any(block["type"] == "tool_use" for block in self._blocks):
            self._stop_reason = "tool_use"
        elif finished.stop_match in self._stop_sequences:
            self._stop_reason, self._stop_sequence = "stop_sequence", finished.stop_match
        else:
            self._stop_reason = "end_turn"

    def _usage_object(self) -> dict[str, object]:
        """Anthropic counts the cached part of a prompt apart from the rest of it."""
        return {
            "input_tokens": self._usage.prompt_tokens - self._usage.cached_tokens,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": self._usage.cached_tokens,
            "output_tokens": self._usage.completion_tokens,
        }

    def _grounded(self) -> dict[str, object]:
        return {} if self._grounding is None else grounding_fields(self._grounding)
