"""What a step of the engine took and did: measured by the engine and its runner, told to whoever observes them."""

from collections.abc import Sequence as Seq
from dataclasses import dataclass

from generator.core.sequences import Outcome, Work


@dataclass(frozen=True, slots=True)
class StepTimes:
    """How a runner's time divided in its last step."""

    forward_s: float
    sample_s: float


@dataclass(frozen=True, slots=True)
class StepReport:
    """One step. `num_sequences` is the size of its batch; a decode computes one token of a completion."""

    num_sequences: int
    num_decodes: int
    num_prefill_tokens: int
    num_drafts: int
    num_accepted: int  # drafts that were right
    num_sampled: int  # tokens that came out
    schedule_s: float
    forward_s: float
    sample_s: float
    num_entered: int = 0  # tokens that completions got: not what was guessed right past a stop

    @property
    def num_positions(self) -> int:
        """Rows that the step computed."""
        return self.num_decodes + self.num_prefill_tokens + self.num_drafts

    @property
    def execute_s(self) -> float:
        """Time in the runner."""
        return self.forward_s + self.sample_s


def report(
    step: Seq[Work], outcomes: Seq[Outcome], schedule_s: float, execute_s: float, times: StepTimes | None
) -> StepReport:
    """Counts a step, before its outcomes are entered. A runner that tells no times spent all of it in forward."""
    num_decodes = sum(work.is_decode for work in step)
    num_sampled = sum(len(outcome.tokens) for outcome in outcomes)
    return StepReport(
        num_sequences=len(step),
        num_decodes=num_decodes,
        num_prefill_tokens=sum(work.num_tokens for work in step) - num_decodes,
        num_drafts=sum(len(work.drafts) for work in step),
        num_accepted=num_sampled - sum(1 for outcome in outcomes if outcome.tokens),
        num_sampled=num_sampled,
        schedule_s=schedule_s,
        forward_s=times.forward_s if times else execute_s,
        sample_s=times.sample_s if times else 0.0,
    )
