"""A request that is in the engine: its sequences, their texts and the way back to its reader."""

import contextvars
from dataclasses import dataclass, field

from generator.core.adapters import LoadedAdapter
from generator.core.completion import Completion
from generator.core.events import Event, FinishReason, Summary
from generator.core.requests import GenerationRequest
from generator.core.sequences import Sequence
from generator.core.stream import OnSettled, TokenStream


@dataclass(slots=True, eq=False)
class Active:
    """One request between submit and its end; the engine's lock guards it."""

    request: GenerationRequest
    model_version: str  # of what answers: the adapter's, or the base's
    adapter: LoadedAdapter | None
    stream: TokenStream
    on_settled: OnSettled
    context: contextvars.Context
    arrived_s: float
    sequences: list[Sequence]
    completions: list[Completion]
    is_cancelled: bool = False
    is_started: bool = False
    admitted_s: float | None = None
    first_token_s: float | None = None
    early: list[Event] = field(default_factory=list)  # events of other completions that must wait for `started`

    @property
    def is_finished(self) -> bool:
        return all(completion.reason is not None for completion in self.completions)

    def summarise(self, reasons: list[FinishReason], finished_s: float) -> Summary:
        """Returns the account of the request."""
        return Summary(
            request_id=self.request.request_id,
            num_prompt=len(self.request.prompt_ids),
            num_completion=sum(completion.num_tokens for completion in self.completions),
            num_cached=0,
            reasons=tuple(reasons),
            num_preemptions=sum(sequence.num_preemptions for sequence in self.sequences),
            arrived_s=self.arrived_s,
            admitted_s=self.admitted_s,
            first_token_s=self.first_token_s,
            finished_s=finished_s,
        )
