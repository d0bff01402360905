"""What an evaluation needs of the world; backends implement it. All may raise PlatformError."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from evaluator.core.results import Answer, MetricValue, Result, ScoringOrder, TextBits
from evaluator.core.tasks import Generation, Task, Turn


@dataclass(frozen=True, slots=True)
class GraphAnswer:
    """What a model or graph said."""

    text: str
    model_version: str


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A model as the generator knows it: `adapter` is empty for a base."""

    base: str
    adapter: str = ""


@dataclass(frozen=True, slots=True)
class TokenizedText:
    """A text as the generator reads it."""

    token_ids: Sequence[int]
    context_length: int


@dataclass(frozen=True, slots=True)
class TokenScores:
    """Natural log probability of each token of a prompt (NaN for the first), and the bytes of text of the first."""

    logprobs: Sequence[float]
    first_size_bytes: int
    model_version: str


class Graph(Protocol):
    """The served models and graphs, asked as a client would."""

    async def answer(
        self, model: str, turns: Sequence[Turn], generation: Generation, *, seed: int, job_id: str
    ) -> GraphAnswer:
        """Answers one chat for the current tenant, behind everybody who waits for an answer."""
        ...


class Generator(Protocol):
    """The generator, asked directly."""

    async def find(self, model: str) -> ServedModel | None:
        """Returns how the generator knows a model; None where it is no model of it, for example a graph."""
        ...

    async def tokenize(self, model: ServedModel, text: str) -> TokenizedText:
        """Tokenizes a text as it is."""
        ...

    async def token_scores(self, model: ServedModel, token_ids: Sequence[int]) -> TokenScores:
        """Returns how likely each token was after those before it."""
        ...


class Files(Protocol):
    """Uploads of the current tenant."""

    async def read(self, file_id: str, sha256: str) -> bytes:
        """Returns the bytes of a file."""
        ...


class Tasks(Protocol):
    """Where tasks come from."""

    async def named(self, label: str) -> Task:
        """Returns a task of the evaluator by "name" or "name@version"; raises NOT_FOUND with the names there are."""
        ...

    async def read(self, data: bytes) -> Task:
        """Reads a client's own task file; raises INVALID_ARGUMENT that names the field."""
        ...


class Journal(Protocol):
    """What was got so far for one job. What `append` has returned from survives a crash."""

    @property
    def answers(self) -> Mapping[int, Answer]:
        """By the question's index."""
        ...

    @property
    def texts(self) -> Mapping[int, TextBits]:
        """By the text's index."""
        ...

    async def append(self, entry: Answer | TextBits) -> None:
        """Keeps one more."""
        ...


class Journals(Protocol):
    """The journals of all jobs."""

    async def open(self, job_id: str, fingerprint: str) -> Journal:
        """Returns a job's journal; an empty one where what was kept is of another fingerprint."""
        ...

    async def remove(self, job_id: str) -> None:
        """Forgets a job's journal, if there is one."""
        ...


class Results(Protocol):
    """Results of ended evaluations, the newest ones."""

    async def get(self, job_id: str) -> Result | None:
        """Returns a result."""
        ...

    async def put(self, result: Result) -> None:
        """Keeps a result; it is durable when this returns."""
        ...


class Scorer(Protocol):
    """Computes the metrics, away from the event loop and behind all other work."""

    async def score(self, order: ScoringOrder) -> Mapping[str, MetricValue]:
        """Returns the values by name."""
        ...


class Watcher(Protocol):
    """Who follows a job: told how far it is, and asked whether it goes on."""

    def check(self) -> None:
        """Raises where the job is to stop."""
        ...

    async def report(self, done: int, total: int) -> None:
        """Takes note of progress."""
        ...
