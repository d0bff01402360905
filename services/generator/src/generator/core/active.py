"""A request that is in the engine: its sequences, their texts and the way back to its reader."""

import contextvars
import random
from collections.abc import Callable
from dataclasses import dataclass, field

from generator.core import prefixes, requests
from generator.core.adapters import LoadedAdapter
from generator.core.completion import Completion
from generator.core.events import Event, FinishReason, Summary
from generator.core.requests import GenerationRequest, ModelSpec
from generator.core.sequences import Sequence
from generator.core.speculation import PromptLookup
from generator.core.stream import OnSettled, TokenStream
from generator.core.text import Vocabulary


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
            num_cached=self.sequences[0].num_cached,  # the others find what the first one computed
            reasons=tuple(reasons),
            num_preemptions=sum(sequence.num_preemptions for sequence in self.sequences),
            arrived_s=self.arrived_s,
            admitted_s=self.admitted_s,
            first_token_s=self.first_token_s,
            finished_s=finished_s,
        )


def make_active(
    request: GenerationRequest,
    model: ModelSpec,
    vocabulary: Vocabulary,
    adapter: LoadedAdapter | None,
    cancel: Callable[[Active], None],
    on_settled: OnSettled,
    arrived_s: float,
    speculates: bool = False,
) -> Active:
    """Makes what the engine keeps of a request that was checked, with its sequences not yet in any queue."""
    most = requests.max_new_tokens(request, model)
    eos = model.eos_token_ids
    suppressed = tuple(eos | frozenset(request.stop.stop_token_ids)) if request.stop.min_tokens else ()
    seed = random.getrandbits(64) if request.sampling.seed is None else request.sampling.seed
    weights = adapter.weights if adapter else None
    active = Active(
        request=request,
        model_version=adapter.spec.version if adapter else model.version,
        adapter=adapter,
        stream=TokenStream(lambda: cancel(active)),
        on_settled=on_settled,
        context=contextvars.copy_context(),
        arrived_s=arrived_s,
        sequences=[Sequence(request, i, 0, seed, most, suppressed, weights) for i in range(request.n)],
        completions=[Completion(i, request.stop, most, eos, vocabulary) for i in range(request.n)],
    )
    cache_root = prefixes.root(request.cache_salt, adapter.spec.manifest_sha256 if adapter else "")
    for sequence in active.sequences:
        sequence.cache_root = cache_root
        if request.compiled is not None:
            sequence.matcher = request.compiled.matcher()
        elif speculates and not request.sampling.is_penalised:  # penalties and grammars look at every token before
            sequence.lookup = PromptLookup()
    return active
