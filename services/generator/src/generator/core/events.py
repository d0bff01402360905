"""What a request's stream says, and the account of a request when it has ended."""

from dataclasses import dataclass
from enum import StrEnum

from generator.core.sequences import TokenLogprob


class FinishReason(StrEnum):
    """Why a completion ended."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    DEADLINE = "deadline"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class Started:
    """The request runs. `prompt_logprobs` begins with the prompt's second token: the first has none."""

    num_prompt: int
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    model_version: str = ""  # of the adapter or the base that answers


@dataclass(frozen=True, slots=True)
class Delta:
    """New text of one completion, and the tokens that it covers."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class Finished:
    """One completion ended; `stop_match` is the stop string or the end token's text."""

    index: int
    reason: FinishReason
    stop_match: str = ""


@dataclass(frozen=True, slots=True)
class Summary:
    """The account of a request. Times are Unix seconds; None where that point was never reached."""

    request_id: str
    num_prompt: int
    num_completion: int  # sampled tokens of all completions, the end tokens included
    num_cached: int
    reasons: tuple[FinishReason, ...]
    num_preemptions: int
    arrived_s: float
    finished_s: float
    admitted_s: float | None = None
    first_token_s: float | None = None
    num_drafted: int = 0  # tokens guessed by prompt lookup
    num_accepted: int = 0  # those of them that were right

    @property
    def num_prompt_read(self) -> int:
        """Tokens of the prompt, or 0 where the request ended before it was admitted: that is what is accounted."""
        return self.num_prompt if self.admitted_s is not None else 0

    @property
    def queue_s(self) -> float:
        return (self.admitted_s or self.finished_s) - self.arrived_s

    @property
    def prefill_s(self) -> float:
        return (self.first_token_s or self.finished_s) - self.admitted_s if self.admitted_s else 0.0

    @property
    def decode_s(self) -> float:
        return self.finished_s - self.first_token_s if self.first_token_s else 0.0

    @property
    def ttft_s(self) -> float | None:
        """From arrival to the first token."""
        return self.first_token_s - self.arrived_s if self.first_token_s else None

    @property
    def tpot_s(self) -> float | None:
        """Mean time between the tokens of one completion; None where there was at most one."""
        per_completion = self.num_completion / max(1, len(self.reasons))
        return self.decode_s / (per_completion - 1) if per_completion > 1 else None

    @property
    def tokens_per_s(self) -> float | None:
        """Tokens of all completions over the time from arrival to end; None where there were none."""
        took_s = self.finished_s - self.arrived_s
        return self.num_completion / took_s if self.num_completion and took_s > 0 else None


@dataclass(frozen=True, slots=True)
class Done:
    """The request ended; always the last event."""

    summary: Summary


Event = Started | Delta | Finished | Done
