"""A gateway and a generator in memory: they answer as told, and can be away, slow, or another version."""

import asyncio
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from chassis import context
from chassis.errors import Code, PlatformError
from evaluator.core.ports import GraphAnswer, ServedModel, TokenizedText, TokenScores
from evaluator.core.results import MetricValue, ScoringOrder
from evaluator.core.scoring import score
from evaluator.core.tasks import Generation, Task, Turn

AWAY = PlatformError(Code.UNAVAILABLE, "away")

TASK = """
name: capitals
version: "2"
description: Where governments sit.
metrics: [exact_match, f1, rouge1, bleu, bits_per_byte]
system: Be brief.
generation: {max_tokens: 8, stop: ["\\n"]}
samples:
  - {prompt: France?, references: [Paris]}
  - {prompt: Japan?, references: [Tokyo, Tokio]}
  - {prompt: Peru?, references: [Lima]}
  - {prompt: Chad?, references: ["N'Djamena"]}
texts: [A city is where the streets are., A capital is where the taxes go.]
"""
ANSWERS = {"France?": "Paris.", "Japan?": "Tokyo", "Peru?": "It is Lima", "Chad?": "no idea"}


@dataclass
class FakeGraph:
    """The gateway's GraphService; `before` runs in front of each answer and may wait or raise."""

    answers: Mapping[str, str] = field(default_factory=lambda: ANSWERS)
    version: str = "v1"
    asked: list[str] = field(default_factory=list)
    generations: list[Generation] = field(default_factory=list)
    seeds: dict[str, int] = field(default_factory=dict)
    num_running: int = 0
    most_running: int = 0
    before: Callable[[str], None] = lambda question: None
    hold: asyncio.Event | None = None

    async def answer(
        self, model: str, turns: Sequence[Turn], generation: Generation, *, seed: int, job_id: str
    ) -> GraphAnswer:
        assert context.current().tenant == "acme"
        question = turns[-1].content
        self.before(question)
        self.num_running += 1
        self.most_running = max(self.most_running, self.num_running)
        try:
            await (self.hold.wait() if self.hold else asyncio.sleep(0.001))
        finally:
            self.num_running -= 1
        self.asked.append(question)
        self.generations.append(generation)
        self.seeds[question] = seed
        return GraphAnswer(self.answers.get(question, "hello"), self.version)


@dataclass
class FakeGenerator:
    """A model over bytes for which every byte but the first costs `bits` bits."""

    models: Mapping[str, ServedModel] = field(default_factory=lambda: {"small": ServedModel("small")})
    context_length: int = 64
    bits: float = 2.0
    version: str = "v1"
    asked: list[tuple[ServedModel, int]] = field(default_factory=list)
    before: Callable[[], None] = lambda: None

    async def find(self, model: str) -> ServedModel | None:
        self.before()
        return self.models.get(model)

    async def tokenize(self, model: ServedModel, text: str) -> TokenizedText:
        return TokenizedText(tuple(text.encode()), self.context_length)

    async def token_scores(self, model: ServedModel, token_ids: Sequence[int]) -> TokenScores:
        self.before()
        self.asked.append((model, len(token_ids)))
        return TokenScores([math.nan] + [-self.bits * math.log(2)] * (len(token_ids) - 1), 1, self.version)


class FakeFiles:
    """Uploads by id."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}

    async def read(self, file_id: str, sha256: str) -> bytes:
        if file_id not in self.files:
            raise PlatformError(Code.NOT_FOUND, "no such file", param="file_id")
        return self.files[file_id]


class InProcessScorer:
    """Scores without a child process; `before` may wait."""

    def __init__(self) -> None:
        self.num_scored = 0
        self.hold: asyncio.Event | None = None

    async def score(self, order: ScoringOrder) -> Mapping[str, MetricValue]:
        if self.hold is not None:
            await self.hold.wait()
        self.num_scored += 1
        return score(order)


class FakeTasks:
    """One task by name, and the real reader for uploads."""

    def __init__(self, task: Task, read: Callable[[bytes], Task]) -> None:
        self.task = task
        self._read = read

    async def named(self, label: str) -> Task:
        if label not in (self.task.name, self.task.label):
            raise PlatformError(Code.NOT_FOUND, f"task: there is no task {label!r}", param="task")
        return self.task

    async def read(self, data: bytes) -> Task:
        return self._read(data)
