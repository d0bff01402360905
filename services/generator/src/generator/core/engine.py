"""What the service needs of an engine, whichever it is, and what our own batching engine needs of a model runner."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from generator.core.adapters import AdapterFiles, AdapterSpec, AdapterWeights
from generator.core.events import Summary
from generator.core.requests import GenerationRequest, ModelSpec
from generator.core.sequences import Outcome, Work
from generator.core.steps import StepTimes
from generator.core.stream import TokenStream


@dataclass(frozen=True, slots=True)
class EngineStats:
    """The load of an engine. Waiting counts sequences."""

    running_sequences: int
    waiting_sequences: int
    blocks_used: int
    blocks_total: int
    prompt_tokens_total: int
    completion_tokens_total: int
    preemptions_total: int
    prefix_query_tokens_total: int = 0  # prompt tokens of admitted sequences
    prefix_hit_tokens_total: int = 0  # those of them that the prefix cache spared
    loaded_adapters: int = 0
    adapter_bytes: int = 0  # the probed and the replaced that still run included
    adapter_evictions_total: int = 0
    draft_tokens_total: int = 0
    accepted_tokens_total: int = 0  # drafts that were right


class AdapterHost(Protocol):
    """The side of an engine that adapters come and go by. Called on the event loop."""

    def adapters(self) -> tuple[AdapterSpec, ...]:
        """Returns what is loaded; a request names it by its id."""
        ...

    async def load_adapter(self, files: AdapterFiles, *, may_evict: bool = True) -> AdapterSpec:
        """Makes an adapter answer under its id; returns when a probe through it was answered.

        The same manifest again is answered at once. Another one takes the id over: requests that run finish with what
        they began with. Where room is short the least recently used adapter that nobody uses is evicted. What answered
        under the id still does where it raises PlatformError: INVALID_ARGUMENT for what the engine cannot apply,
        DATA_LOSS for damaged weights, FAILED_PRECONDITION for a failed probe, OVERLOADED with reason FULL for no room.
        """
        ...

    async def adapter_freed(self) -> None:
        """Returns when the last request of some adapter has ended, so that it may be evicted."""
        ...

    async def unload_adapter(self, adapter_id: str) -> None:
        """Hides an adapter from new requests at once; returns when those that use it have ended. Raises NOT_FOUND."""
        ...


class Engine(AdapterHost, Protocol):
    """Runs requests against one model. All methods are called on the event loop; these return at once."""

    @property
    def model(self) -> ModelSpec: ...

    def submit(self, request: GenerationRequest, on_settled: Callable[[Summary], None]) -> TokenStream:
        """Queues a request and returns its stream.

        `on_settled` is called once, on the loop and in the caller's context, when the request has ended in whatever
        way and holds nothing any more. Raises PlatformError where the request cannot run: bad parameters,
        a capability that the engine lacks, a context that overflows, a full queue, a drain.
        """
        ...

    def cancel(self, request_id: str) -> int:
        """Cancels every request with this id at the next step; returns how many there were."""
        ...

    def stats(self) -> EngineStats: ...

    def drain(self) -> None:
        """Refuses new requests from now on; those that are here go on."""
        ...


class OutOfMemory(Exception):
    """A step did not fit into memory. A runner raises it with nothing lost: the step can be planned again."""


class Runner(Protocol):
    """A model behind the batching engine. It may block; only `read_adapter` is called from more than one thread."""

    @property
    def model(self) -> ModelSpec: ...

    @property
    def step_times(self) -> StepTimes | None:
        """How the time of the last step divided; None where the runner does not measure it."""
        ...

    def warm_up(self) -> None:
        """Runs usual shapes once, so that the first request does not pay for what is set up lazily."""
        ...

    def read_adapter(self, files: AdapterFiles) -> AdapterWeights:
        """Makes weights of an adapter's files, for sequences that name them. Touches nothing that a step reads.

        Raises PlatformError(INVALID_ARGUMENT) for what it cannot apply, DATA_LOSS for what cannot be right.
        """
        ...

    def execute(self, step: list[Work]) -> list[Outcome]:
        """Computes the work of one step and samples where it ends a sequence; one outcome for each work, in order.

        Keys and values of token t of a sequence lie in slot table[t // block_size] * block_size + t % block_size, and
        those of its drafts in the slots behind. A token is sampled at the last token, and at each draft for as long
        as the tokens sampled before equal the drafts.
        Raises OutOfMemory; anything else that it raises ends the process.
        """
        ...
