"""What calls used, by the id under which their caller accounts for them, kept until the caller has had time to ask.

A caller that saw no end of its call (it cancelled, it was killed) learns here what was used. Knows nothing of engines
or transports; all of it runs on the event loop.
"""

import asyncio
import time
import uuid
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

from chassis.errors import Code, PlatformError
from generator.core.events import Summary

_MAX_KEPT = 65_536  # ended ids; some 300 bytes each
_KEPT_S = 3600.0  # a gateway that was killed is back in seconds


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens as they are accounted, everywhere alike: in the metrics, in a stream's last event and in the book."""

    num_prompt: int = 0
    num_completion: int = 0
    num_cached: int = 0

    @staticmethod
    def of(summary: Summary) -> "Usage":
        """What an ended request used."""
        return Usage(summary.num_prompt_read, summary.num_completion, summary.num_cached)

    def __add__(self, other: "Usage") -> "Usage":
        return Usage(
            self.num_prompt + other.num_prompt,
            self.num_completion + other.num_completion,
            self.num_cached + other.num_cached,
        )


@dataclass(slots=True, eq=False)
class _Page:
    """One usage id."""

    num_calls: int = 0
    usage: Usage = Usage()
    running: "set[UsageCall]" = field(default_factory=set)
    is_closed: bool = False
    ended_s: float = 0.0
    has_ended: asyncio.Event = field(default_factory=asyncio.Event)


class UsageCall:
    """One call under a usage id; `end` it exactly once."""

    def __init__(self, end: "Callable[[UsageCall, Usage], None]", is_closed: Callable[[], bool]) -> None:
        self._end = end
        self._is_closed = is_closed
        self._cancel: Callable[[], None] | None = None

    def runs(self, cancel: Callable[[], None]) -> None:
        """Tells how the call can be cancelled; it is at once where its id was closed meanwhile."""
        self._cancel = cancel
        if self._is_closed():
            cancel()

    def cancel(self) -> None:
        """Cancels the call if it can be yet."""
        if self._cancel is not None:
            self._cancel()

    def end(self, usage: Usage) -> None:
        """Books what the call used; nothing runs for it any more."""
        self._end(self, usage)


class UsageBook:
    """Bounded in number and time. `instance` names it: a restart makes a new one, which knows nothing of the old."""

    def __init__(
        self, max_kept: int = _MAX_KEPT, kept_s: float = _KEPT_S, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.instance = uuid.uuid4().hex
        self._max_kept = max_kept
        self._kept_s = kept_s
        self._clock = clock
        self._running: dict[str, _Page] = {}
        self._ended: OrderedDict[str, _Page] = OrderedDict()  # in the order of their ends

    def begin(self, usage_id: str) -> UsageCall:
        """Enters a call, before anything is done for it. Raises FAILED_PRECONDITION where the id was closed."""
        if not usage_id:
            return UsageCall(lambda call, usage: None, lambda: False)
        page = self._page(usage_id)
        page.num_calls += 1
        if page.is_closed:
            message = "the usage id was closed: whoever called has gone"
            raise PlatformError(Code.FAILED_PRECONDITION, message, param="usage_id", reason="usage_closed")
        call = UsageCall(lambda call, usage: self._end(usage_id, call, usage), lambda: page.is_closed)
        page.running.add(call)
        self._running[usage_id] = page
        self._ended.pop(usage_id, None)
        return call

    async def close(self, usage_id: str) -> tuple[int, Usage]:
        """Ends what runs under an id and refuses what would come; returns the number of calls and what they used.

        Waits for the next step at most; whoever calls bounds it.
        """
        page = self._page(usage_id)
        page.is_closed = True
        for call in tuple(page.running):
            call.cancel()
        while page.running:
            page.has_ended.clear()
            await page.has_ended.wait()
        return page.num_calls, page.usage

    def __len__(self) -> int:
        """Ids that are known."""
        return len(self._running) + len(self._ended)

    def _page(self, usage_id: str) -> _Page:
        page = self._running.get(usage_id) or self._ended.get(usage_id)
        if page is None:
            page = _Page()
            self._keep(usage_id, page)
        return page

    def _end(self, usage_id: str, call: UsageCall, usage: Usage) -> None:
        page = self._running[usage_id]
        page.usage += usage
        page.running.remove(call)
        if not page.running:
            del self._running[usage_id]
            self._keep(usage_id, page)
            page.has_ended.set()

    def _keep(self, usage_id: str, page: _Page) -> None:
        now_s = self._clock()
        page.ended_s = now_s
        self._ended[usage_id] = page
        while self._ended:
            oldest = next(iter(self._ended.values()))
            if len(self._ended) <= self._max_kept and now_s - oldest.ended_s <= self._kept_s:
                return
            self._ended.popitem(last=False)
