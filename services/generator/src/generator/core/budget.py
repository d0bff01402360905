"""Tokens that are left in a step while it is planned: for prompts, for long prompts, and for the background."""

from dataclasses import dataclass

from generator.core.sequences import Sequence


@dataclass(slots=True)
class StepBudget:
    """`background` is None where the background is alone, `long` where long prompts are not bounded by more than
    `prefill`."""

    prefill: int
    background: int | None
    long: int | None = None

    def tokens_for(self, sequence: Sequence, num_cached: int = 0) -> int:
        """Returns how many tokens a sequence may compute; a decode of the foreground is never held back."""
        num_computed = max(sequence.num_computed, num_cached)
        missing = len(sequence.token_ids) - num_computed
        if sequence.is_background and self.background is not None:
            return min(missing, self.background)
        if missing == 1 and num_computed:
            return 1
        if self.long is not None and sequence.is_long:
            return min(missing, self.prefill, self.long)
        return min(missing, self.prefill)

    def take(self, sequence: Sequence, num_tokens: int) -> None:
        """Books what a sequence got, before it is computed."""
        missing = len(sequence.token_ids) - sequence.num_computed
        if sequence.is_background and self.background is not None:
            self.background -= num_tokens
        elif missing > 1 or not sequence.num_computed:
            self.prefill -= num_tokens
            if self.long is not None and sequence.is_long:
                self.long -= num_tokens
