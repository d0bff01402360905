"""Which finished requests are profiled, and what of their text. Knows nothing of whylogs, the bus or the disk."""

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field

_JOINT = "\n"


@dataclass(frozen=True, slots=True)
class Sample:
    """One request that is to be profiled. `model` is a bounded label already; texts are cut already."""

    message_id: str
    model: str
    window_start_unix_s: int
    window_s: int
    ended_unix_s: float
    prompt: str = field(repr=False)
    response: str = field(repr=False)


class Sampler:
    """Decides by the message's id alone, so that a delivery that is repeated, also to another process, decides alike.

    rate: share of the records that are taken, in [0, 1]. max_chars: of each text, what is kept.
    """

    def __init__(
        self, *, rate: float, window_s: int, max_chars: int, unix_time: Callable[[], float] = time.time
    ) -> None:
        self.rate = rate
        self._window_s = window_s
        self._max_chars = max_chars
        self._unix_time = unix_time

    def take(self, message_id: str, model: str, ended_unix_s: float, prompt: str, response: str) -> Sample | None:
        """Returns the sample of a record, or None where it is not taken or its tenant lets no text out."""
        if not (prompt or response) or _share(message_id) >= self.rate:
            return None
        # A clock that is wrong must open no window in the future, which would never be pruned.
        ended_unix_s = min(max(ended_unix_s, 0.0), self._unix_time())
        return Sample(
            message_id=message_id,
            model=model,
            window_start_unix_s=int(ended_unix_s // self._window_s) * self._window_s,
            window_s=self._window_s,
            ended_unix_s=ended_unix_s,
            prompt=cut(prompt, self._max_chars),
            response=cut(response, self._max_chars),
        )


def cut(text: str, max_chars: int) -> str:
    """Returns a text of at most `max_chars`: its first and its last half, for a question often follows its context."""
    if len(text) <= max_chars:
        return text
    head = (max_chars - len(_JOINT)) // 2
    tail = max_chars - len(_JOINT) - head
    return text[:head] + _JOINT + text[len(text) - tail :]


def _share(message_id: str) -> float:
    """A number in [0, 1) that looks random and is the same for the same id."""
    return int.from_bytes(hashlib.sha256(message_id.encode()).digest()[:6]) / (1 << 48)
