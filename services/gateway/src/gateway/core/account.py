"""What one request has used so far, kept from its arrival to its end, whatever way it ends."""

import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field

from gateway.core.graph import Answering, GraphEvent, Grounding, cut_off
from gateway.core.ports import Principal, RequestRecord
from gateway.core.services import Abandoned, Delta, Done, Finished, Started, Usage

MAX_KEPT_TEXT_CHARS = 32_768  # of prompt and of completion each, for the tenants that allow text


@dataclass(slots=True)
class Account:
    """Collects the facts of one request; record() gives them at its end."""

    request_id: str
    trace_id: str
    traceparent: str
    route: str
    principal: Principal
    clock: Callable[[], float] = time.monotonic
    model: str = ""
    stream: bool = False
    grounded: bool | None = None
    # Ours alone, whatever id the client sent: what the ledger and the generator account this request under.
    usage_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    answer_headers: dict[str, str] = field(default_factory=dict)  # what is to be said beside the answer, over HTTP
    prompt_text: str = field(default="", repr=False)
    finish_reason: str = ""
    error_code: str = ""
    _started_s: float = 0.0
    _started_unix_ms: int = 0
    _first_content_s: float | None = None
    _last_content_s: float = 0.0
    _prompt_tokens: int = 0
    _num_streamed: int = 0
    _num_started: int = 0
    _asks_generator: bool = False
    _left_a_call: bool = False
    _usage: Usage | None = None
    _completion: list[str] = field(default_factory=list, repr=False)
    _completion_chars: int = 0

    def __post_init__(self) -> None:
        self._started_s = self.clock()
        self._started_unix_ms = int(time.time() * 1000)

    def take(self, event: GraphEvent) -> None:
        """Keeps what an event of the answer tells; raises PlatformError for what the engine cut off."""
        match event:
            case Delta():
                self.produced(event.num_tokens, event.text)
            case Started():
                self.prompt_known(event.prompt_tokens)
            case Done():
                self.done(event.usage)
            case Grounding():
                self.grounded = event.grounded
            case Answering():
                self.model = event.model
            case Abandoned():
                self.left_a_call()
            case Finished():
                self.finish_reason = event.reason
                if (error := cut_off(event)) is not None:
                    raise error

    def prompt_known(self, num_tokens: int) -> None:
        """The prompt was admitted with so many tokens."""
        self._prompt_tokens += num_tokens
        self._num_started += 1

    def asks_generator(self) -> None:
        """From here on the generator may compute tokens for the request, seen or unseen."""
        self._asks_generator = True

    def left_a_call(self) -> None:
        """A call of the generator is given up and another takes its place: what is seen of that one is not all."""
        self._left_a_call = True

    def produced(self, num_tokens: int, text: str) -> None:
        """So many tokens came, and this text."""
        self._num_streamed += num_tokens
        if not text:
            return
        now_s = self.clock()
        if self._first_content_s is None:
            self._first_content_s = now_s
        self._last_content_s = now_s
        if self.principal.allows_text and self._completion_chars < MAX_KEPT_TEXT_CHARS:
            self._completion.append(text)
            self._completion_chars += len(text)

    def done(self, usage: Usage) -> None:
        """The service told the exact usage."""
        self._usage = usage

    @property
    def usage(self) -> Usage:
        """The exact usage; before the end, what has been counted so far."""
        return self._usage or Usage(self._prompt_tokens, self._num_streamed)

    @property
    def is_exact(self) -> bool:
        """Whether the usage is all that was used; otherwise the generator knows more than we have seen."""
        return not self._asks_generator or (self._usage is not None and not self._left_a_call)

    @property
    def num_started(self) -> int:
        """Calls of the generator that told their beginning."""
        return self._num_started

    @property
    def started_unix_ms(self) -> int:
        """When the request came."""
        return self._started_unix_ms

    @property
    def ttft_s(self) -> float:
        """From arrival to the first content; 0 where there was none."""
        return 0.0 if self._first_content_s is None else self._first_content_s - self._started_s

    @property
    def tpot_s(self) -> float:
        """Seconds between tokens after the first, on average; 0 where there was at most one."""
        num_gaps = self.usage.completion_tokens - 1
        if self._first_content_s is None or num_gaps < 1:
            return 0.0
        return (self._last_content_s - self._first_content_s) / num_gaps

    def record(self, http_status: int) -> RequestRecord:
        """What is to be written; call it once, at the end."""
        allows_text = self.principal.allows_text
        return RequestRecord(
            request_id=self.request_id,
            trace_id=self.trace_id,
            traceparent=self.traceparent,
            tenant=self.principal.tenant,
            key_id=self.principal.key_id,
            model=self.model,
            route=self.route,
            prompt_tokens=self.usage.prompt_tokens,
            completion_tokens=self.usage.completion_tokens,
            cached_tokens=self.usage.cached_tokens,
            finish_reason=self.finish_reason or "error",
            http_status=http_status,
            stream=self.stream,
            started_unix_ms=self._started_unix_ms,
            duration_s=self.clock() - self._started_s,
            ttft_s=self.ttft_s,
            tpot_s=self.tpot_s,
            grounded=self.grounded,
            error_code=self.error_code,
            prompt_text=self.prompt_text[:MAX_KEPT_TEXT_CHARS] if allows_text else "",
            completion_text="".join(self._completion)[:MAX_KEPT_TEXT_CHARS] if allows_text else "",
            usage_id=self.usage_id,
            is_exact=self.is_exact,
        )
