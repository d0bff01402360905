"""What one request has used so far, kept from its arrival to its end, whatever way it ends."""

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from enum import StrEnum

from gateway.core.graph import Answering, GraphEvent, Grounding, cut_off
from gateway.core.ports import Principal, RequestRecord
from gateway.core.services import Abandoned, Delta, Done, Finished, Started, ToolCallDelta, Usage

HEADER_MODEL = "x-pressroom-model"  # which model answered
MAX_KEPT_TEXT_CHARS = 32_768  # of prompt and of completion each, for the tenants that allow text


class Wish(StrEnum):
    """What a request says of repeats; see core.repeats."""

    UNSAID = ""  # the policies of key and tenant decide on the cache; concurrent repeats share a run
    ON = "on"  # from the cache and into it, whatever the policies, even where chance makes the answer
    REFRESH = "refresh"  # run anew, and keep the answer
    OFF = "off"  # a run of its own, nothing is kept


class Repeat(StrEnum):
    """How a request was answered without a run of its own."""

    NO = ""
    HIT = "hit"  # from the cache
    SHARED = "shared"  # from the run of another request
    REPLAYED = "replayed"  # by its Idempotency-Key


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
    cache_wish: Wish = Wish.UNSAID
    repeat: Repeat = Repeat.NO
    # Ours alone, whatever id the client sent: what the ledger and the generator account this request under.
    usage_id: str = field(default_factory=lambda: f"{random.getrandbits(128):032x}")
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
    _is_estimate: bool = False
    _num_started: int = 0
    _asks_generator: bool = False
    _left_a_call: bool = False
    _usage: Usage | None = None
    _when_used: list[Callable[[Usage], None]] = field(default_factory=list, repr=False)
    _repeated: Usage = field(default_factory=Usage)
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
            case ToolCallDelta():
                self.produced(event.num_tokens, event.arguments or event.name)
            case Started():
                self.prompt_known(event.prompt_tokens, is_estimate=event.is_estimate)
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

    def take_repeated(self, event: GraphEvent) -> GraphEvent:
        """The same for an event of a run that is not this request's own; returns it as this request is to see it.

        Nothing of it is used, so the usage stays as it is: what the client is told says that it was cached.
        """
        match event:
            case Delta():
                self.produced(0, event.text)
            case Done():
                self._repeated = replace(event.usage, cached_tokens=event.usage.prompt_tokens)
                return Done(self._repeated)
            case Finished():
                self.finish_reason = event.reason
            case Answering():
                self.model = self.answer_headers[HEADER_MODEL] = event.model
        return event

    def prompt_known(self, num_tokens: int, *, is_estimate: bool = False) -> None:
        """The prompt was admitted with so many tokens."""
        self._prompt_tokens += num_tokens
        self._is_estimate |= is_estimate
        self._num_started += 1

    def asks_generator(self, it_does: bool = True) -> None:
        """From here on the generator may compute tokens for the request, seen or unseen; or another server does.

        The last word counts: where another server answers in the generator's place, what it told is what was used.
        """
        self._asks_generator = it_does

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

    def when_used(self, tell: Callable[[Usage], None]) -> None:
        """Tells what was used: now, or once it is settled where the generator knows more than we have seen."""
        if self.is_exact:
            tell(self.usage)
        else:
            self._when_used.append(tell)

    def settled(self, usage: Usage) -> None:
        """This is what was used, for good."""
        for tell in self._when_used:
            tell(usage)
        self._when_used.clear()

    @property
    def usage(self) -> Usage:
        """What was used, exactly; before the end, what has been counted so far. Nothing for a repeat."""
        return self._usage or Usage(self._prompt_tokens, self._num_streamed, is_estimate=self._is_estimate)

    @property
    def told_usage(self) -> Usage:
        """What the client is told: the usage, or a repeat's that was another's and is marked as cached."""
        return self._repeated if self.repeat else self.usage

    @property
    def is_exact(self) -> bool:
        """Whether the usage is all that was used; otherwise the generator knows more than we have seen."""
        if self.usage.is_estimate:
            return False
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
            repeat=self.repeat,
            repeated_prompt_tokens=self._repeated.prompt_tokens,
            repeated_completion_tokens=self._repeated.completion_tokens,
            prompt_text=self.prompt_text[:MAX_KEPT_TEXT_CHARS] if allows_text else "",
            completion_text="".join(self._completion)[:MAX_KEPT_TEXT_CHARS] if allows_text else "",
            usage_id=self.usage_id,
            is_exact=self.is_exact,
        )
