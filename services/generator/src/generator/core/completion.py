"""Turns the tokens of one completion into text deltas and decides when it has ended."""

from dataclasses import dataclass

from generator.core.events import Delta, FinishReason
from generator.core.requests import StopParams
from generator.core.sequences import TokenLogprob
from generator.core.text import IncrementalDecoder, StopMatcher, Vocabulary


@dataclass(frozen=True, slots=True)
class _Pending:
    token_id: int
    logprob: TokenLogprob | None
    start: int  # character of the completion at which the token's text begins
    end: int


class Completion:
    """The text side of one sequence."""

    def __init__(
        self, index: int, stop: StopParams, max_new_tokens: int, eos_token_ids: frozenset[int], vocabulary: Vocabulary
    ) -> None:
        self.index = index
        self.num_tokens = 0
        self.reason: FinishReason | None = None
        self.stop_match = ""
        self._min_tokens = stop.min_tokens
        self._max_new_tokens = max_new_tokens
        self._end_ids = frozenset(stop.stop_token_ids) | (frozenset() if stop.ignore_eos else eos_token_ids)
        self._vocabulary = vocabulary
        self._decoder = IncrementalDecoder()
        self._matcher = StopMatcher(stop.stop)
        self._num_decoded = 0
        self._num_shown = 0
        self._pending: list[_Pending] = []

    def add(self, token_id: int, logprob: TokenLogprob | None) -> Delta | None:
        """Takes the next token; returns a delta where there is something to show. Sets `reason` at the end."""
        assert self.reason is None
        self.num_tokens += 1
        if token_id in self._end_ids:
            self.reason, self.stop_match = FinishReason.STOP, self._vocabulary.token_text(token_id)
            return self._show(self._matcher.flush(), is_last=True)
        piece = self._decoder.add(self._vocabulary.token_bytes(token_id))
        start, self._num_decoded = self._num_decoded, self._num_decoded + len(piece)
        self._pending.append(_Pending(token_id, logprob, start, self._num_decoded))
        if self.num_tokens < self._min_tokens:  # a stop string may not end it yet
            text, matched = piece, None
        else:
            text, matched = self._matcher.add(piece)
        if matched is not None:
            self.reason, self.stop_match = FinishReason.STOP, matched
            cut = self._num_shown + len(text)
            self._pending = [p for p in self._pending if p.start < cut]
            return self._show(text, is_last=True)
        if self.num_tokens >= self._max_new_tokens:
            self.reason = FinishReason.LENGTH
            return self._show(text + self._matcher.flush(), is_last=True)
        return self._show(text, is_last=False)

    def end(self, reason: FinishReason) -> Delta | None:
        """Ends the completion from outside; returns what was held back."""
        assert self.reason is None
        self.reason = reason
        return self._show(self._matcher.flush(), is_last=True)

    def _show(self, text: str, is_last: bool) -> Delta | None:
        self._num_shown += len(text)
        if is_last:
            covered, self._pending = self._pending, []
        elif text:
            num = next((i for i, p in enumerate(self._pending) if p.end > self._num_shown), len(self._pending))
            covered, self._pending = self._pending[:num], self._pending[num:]
        else:
            covered = []
        if not text and not covered:
            return None
        logprobs = tuple(p.logprob for p in covered if p.logprob is not None)
        return Delta(self.index, text, tuple(p.token_id for p in covered), logprobs)
