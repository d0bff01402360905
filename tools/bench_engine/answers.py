"""What is asked and what came back, for every engine alike. Knows no protocol and no engine."""

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

# The vocabulary of the issue's own client: with 60 words and SmolLM2's template a prompt has 95 tokens, on the average.
_PROSE = (
    "the press room keeps a calm hand on the type while ink dries and the proof reader marks each line with care "
    "so that a reader far away may trust what was printed and learn from it without asking who set the page"
)
_WORDS = _PROSE.split()
NUM_WORDS = 60


def prompt(number: int) -> str:
    """The text of a request; the number is its seed."""
    rng = random.Random(number)
    return "Write on about this: " + " ".join(rng.choice(_WORDS) for _ in range(NUM_WORDS))


@dataclass(slots=True)
class Answer:
    """One answer; times are seconds of one clock. stamps: when each piece with text arrived."""

    began_s: float
    stamps: list[float] = field(default_factory=list)
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    error: str = ""

    @property
    def ttft_s(self) -> float | None:
        """From sending to the first content; None where none came."""
        return self.stamps[0] - self.began_s if self.stamps else None

    @property
    def gaps_s(self) -> list[float]:
        """Seconds between one piece and the next."""
        return [after - before for before, after in zip(self.stamps, self.stamps[1:], strict=False)]


@dataclass(frozen=True, slots=True)
class Run:
    """The answers of one closed loop and how long it took."""

    wall_s: float
    answers: tuple[Answer, ...]


Ask = Callable[[str, int], Awaitable[Answer]]


async def closed_loop(ask: Ask, prompts: Sequence[str], max_tokens: int, num_streams: int) -> Run:
    """Keeps num_streams requests under way until all prompts have been asked, each exactly once."""
    left, answers = iter(prompts), list[Answer]()

    async def stream() -> None:
        for text in left:
            answers.append(await ask(text, max_tokens))

    began_s = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for _ in range(num_streams):
            group.create_task(stream())
    return Run(time.perf_counter() - began_s, tuple(answers))
