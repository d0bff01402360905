"""Guesses the next tokens of a sequence by looking up what followed the last time (prompt lookup decoding).

Texts repeat themselves and their prompts: names, code, quotations, lists. Where the last few tokens stood before, the
tokens behind them are proposed as drafts, and one step computes them all. What comes out is what would have come out
one by one; only the number of steps changes. See Saxena, "Prompt Lookup Decoding" (2023); arXiv 2304.04487.
"""

from collections.abc import Sequence as Seq

_SIZES = (3, 2)  # tokens that must agree, the longer first
_WEIGHT = 0.3  # of the newest proposal in the average
_HOPE = 0.5  # right drafts, before the first are known: two proposals in vain are enough where rows are cheap
_RETRY_AFTER = 24  # steps without proposals, where they did not pay


class PromptLookup:
    """The guesses for one sequence, and how good they were."""

    def __init__(self) -> None:
        # Where the text goes on behind the last occurrence of some tokens.
        self._follows: dict[tuple[int, ...], int] = {}
        self._num_indexed = 0
        self._mean_right = _HOPE
        self._num_skipped = _RETRY_AFTER  # the first guess is always tried

    def propose(self, token_ids: Seq[int], most: int, least_right: float) -> tuple[int, ...]:
        """Returns up to `most` guesses of what follows the tokens of a sequence, which only ever grows.

        Returns none where fewer than `least_right` of them were right on average, but tries again now and then.
        """
        if self._mean_right < least_right and self._num_skipped < _RETRY_AFTER:
            self._num_skipped += 1
            return ()
        self._index(token_ids)
        for size in _SIZES:
            start = self._follows.get(tuple(token_ids[-size:]))
            if start is not None:
                period = len(token_ids) - start
                return tuple(token_ids[start + place % period] for place in range(most))
        return ()

    def note(self, num_right: int) -> None:
        """Learns how many of the last proposal's drafts were right."""
        self._num_skipped = 0
        self._mean_right += _WEIGHT * (num_right - self._mean_right)

    def _index(self, token_ids: Seq[int]) -> None:
        """Notes what is followed by something; the very end is not, yet."""
        for end in range(max(self._num_indexed, _SIZES[-1]), len(token_ids)):
            for size in _SIZES:
                if end >= size:
                    self._follows[tuple(token_ids[end - size : end])] = end
        self._num_indexed = len(token_ids)
