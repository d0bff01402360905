"""A sequence: one completion in the making, as the scheduler and a runner see it, and what a runner answers."""

from dataclasses import dataclass, field

from generator.core.adapters import AdapterWeights
from generator.core.grammar import TokenMatcher
from generator.core.requests import GenerationRequest, SamplingParams
from generator.core.speculation import PromptLookup

MAX_OVERTAKEN = 32


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log probability of one token before temperature and penalties; `top` has (token, logprob), best first."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(slots=True, eq=False)
class Sequence:
    """One of a request's n completions.

    `token_ids` holds prompt and completion; keys and values of the first `num_computed` lie in the blocks of `table`,
    of which the first `num_sealed` may be shared. After a preemption both are 0 and the tokens stay: computing them
    anew, or finding them in the prefix cache, gives the same state.
    """

    request: GenerationRequest
    index: int
    arrival: int  # order of arrival over the engine's life
    seed: int
    max_new_tokens: int
    suppressed_ids: tuple[int, ...] = ()  # may not be sampled before min_tokens
    adapter: AdapterWeights | None = field(default=None, repr=False)  # None is the base; never changes
    token_ids: list[int] = field(default_factory=list, repr=False)
    matcher: TokenMatcher | None = field(default=None, repr=False)  # of a grammar; knows the tokens taken so far
    lookup: PromptLookup | None = field(default=None, repr=False)  # None: no drafts
    num_prompt: int = 0
    num_computed: int = 0
    table: list[int] = field(default_factory=list)
    cache_root: bytes = field(default=b"", repr=False)  # tenant and adapter: see core/prefixes.py
    block_keys: list[bytes] = field(default_factory=list, repr=False)
    num_sealed: int = 0
    is_long: bool = False  # so much was missing when it was admitted that it must be read in small pieces
    num_cached: int = 0  # tokens of the prompt that were found in the cache when it was admitted first
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list, repr=False)
    num_preemptions: int = 0
    num_overtaken: int = 0  # how often a later one was let past this one, which is in the background

    def __post_init__(self) -> None:
        self.token_ids = list(self.request.prompt_ids)
        self.num_prompt = len(self.token_ids)

    @property
    def num_new(self) -> int:
        """Completion tokens sampled so far."""
        return len(self.token_ids) - self.num_prompt

    @property
    def is_suppressing(self) -> bool:
        """Whether it must not end yet, so that its next token hangs on its position."""
        return bool(self.suppressed_ids) and self.num_new < self.request.stop.min_tokens

    @property
    def sampling(self) -> SamplingParams:
        return self.request.sampling

    @property
    def is_background(self) -> bool:
        """Nobody waits for it: it takes what the others leave."""
        return self.request.priority < 0

    @property
    def yields(self) -> bool:
        """Whether all others go first; one in the background does not let them past for ever."""
        return self.is_background and self.num_overtaken < MAX_OVERTAKEN

    @property
    def order(self) -> tuple[int, int, int]:
        """Sorts by who goes first: higher priority, earlier arrival, lower index."""
        priority = self.request.priority if self.yields or not self.is_background else 0
        return (-priority, self.arrival, self.index)

    @property
    def wants_prompt_logprobs(self) -> bool:
        return self.request.prompt_logprobs is not None and self.index == 0

    @property
    def num_reusable(self) -> int:
        """Tokens that need not be computed if they are cached: all but the last, and none whose logits are missing."""
        most = len(self.token_ids) - 1
        is_scored = not self.wants_prompt_logprobs or len(self.prompt_logprobs) >= self.num_prompt - 1
        return most if is_scored else min(most, len(self.prompt_logprobs))


@dataclass(frozen=True, slots=True)
class Work:
    """What one step does for a sequence: compute its next `num_tokens` tokens, and the drafts behind its last token.

    Drafts are guesses of what will be sampled. Each of them that was right spares a step, and the others cost no more
    than their rows: keys and values of a wrong one are overwritten later. Only a work that samples has any.
    """

    sequence: Sequence
    num_tokens: int
    drafts: tuple[int, ...] = ()

    @property
    def end(self) -> int:
        """Number of the sequence's own tokens whose keys and values exist after the step."""
        return self.sequence.num_computed + self.num_tokens

    @property
    def is_decode(self) -> bool:
        """Whether it computes the token that was sampled last and nothing else of the sequence's own."""
        return self.num_tokens == 1 and self.sequence.num_new > 0 and self.end == len(self.sequence.token_ids)

    @property
    def num_positions(self) -> int:
        """Positions that the step computes, the drafts included."""
        return self.num_tokens + len(self.drafts)

    @property
    def reach(self) -> int:
        """One past the last position that the step writes: the drafts lie behind `end`."""
        return self.end + len(self.drafts)

    @property
    def token_ids(self) -> list[int]:
        """The tokens at the step's positions."""
        return [*self.sequence.token_ids[self.sequence.num_computed : self.end], *self.drafts]

    @property
    def samples(self) -> bool:
        """Whether the step reaches the sequence's last token, so that the next one can be sampled."""
        return self.end == len(self.sequence.token_ids) and self.sequence.max_new_tokens > 0

    @property
    def scored(self) -> range:
        """Positions of this step whose logits give prompt log probabilities that are still missing.

        Position p scores the prompt's token p + 1. What was scored before a preemption is not scored again.
        """
        sequence = self.sequence
        if not sequence.wants_prompt_logprobs:
            return range(0)
        first = max(sequence.num_computed, len(sequence.prompt_logprobs))
        return range(first, max(first, min(self.end, sequence.num_prompt - 1)))


@dataclass(frozen=True, slots=True)
class Sampled:
    """A token that was picked, and its log probability where the request asks for one."""

    token_id: int
    logprob: TokenLogprob | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a step brought for one Work: tokens if it `samples`, log probabilities for its `scored` positions.

    The first token follows the sequence's own last one; another follows each draft for as long as all before were
    right. So there are 1 to 1 + len(drafts).
    """

    tokens: tuple[Sampled, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
