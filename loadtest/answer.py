"""Reads one streamed answer as its bytes arrive, and notes when. Knows neither sockets nor clocks."""

import json
from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True)
class Answer:
    """What is known of an answer so far; times are those that the caller passed in. Tokens are the server's count."""

    first_token_s: float | None = None
    last_token_s: float | None = None
    num_chunks: int = 0
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    cached_tokens: int = 0
    finish_reason: str = ""
    grounded: bool | None = None
    error: str = ""
    is_done: bool = False
    _pending: bytes = field(default=b"", repr=False)

    def feed(self, data: bytes, now_s: float) -> None:
        """Takes bytes that arrived now; they may end anywhere in a line."""
        *lines, rest = (self._pending + data).split(b"\n")
        self._pending = rest
        for line in lines:
            if line.startswith(b"data:"):
                self._take(line[5:].strip(), now_s)

    def close(self) -> None:
        """The connection ended. An answer without [DONE] is a failure, whatever was read of it."""
        if not self.is_done and not self.error:
            self.error = "no_done"

    def refuse(self, body: bytes) -> None:
        """The answer is not a stream but a refusal, in OpenAI's envelope."""
        try:
            self._fail(json.loads(body)["error"])
        except (ValueError, KeyError, TypeError):
            self.error = "unreadable_error"

    def _take(self, payload: bytes, now_s: float) -> None:
        if payload == b"[DONE]":
            self.is_done = True
            return
        try:
            event: dict[str, Any] = json.loads(payload)
        except ValueError:
            self.error = "unreadable_event"
            return
        if "error" in event:
            self._fail(event["error"])
            return
        if usage := event.get("usage"):
            self.prompt_tokens = usage["prompt_tokens"]
            self.completion_tokens = usage["completion_tokens"]
            self.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        if "grounded" in event:
            self.grounded = event["grounded"]
        for choice in event.get("choices") or ():
            if choice["delta"].get("content"):
                self.first_token_s = now_s if self.first_token_s is None else self.first_token_s
                self.last_token_s = now_s
                self.num_chunks += 1
            self.finish_reason = choice.get("finish_reason") or self.finish_reason

    def _fail(self, error: dict[str, Any]) -> None:
        self.error = str(error.get("code") or error.get("type") or "error")
