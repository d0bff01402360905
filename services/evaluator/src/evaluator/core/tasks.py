"""What a task is: questions with references, texts to be predicted, and the metrics that score them.

Knows nothing of files: backends/yaml_tasks.py reads them.
"""

import hashlib
from dataclasses import dataclass

# Metrics that compare an answer with the references of its question; a ROUGE is reported as three values.
ANSWER_METRICS = ("exact_match", "f1", "rouge1", "rougeL", "bleu")
# Metrics of how well a model predicts a text.
TEXT_METRICS = ("bits_per_byte",)
KNOWN_METRICS = tuple(sorted(ANSWER_METRICS + TEXT_METRICS))


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn of a chat: role is "system", "user" or "assistant"."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Sample:
    """One question, and the answers that are right."""

    turns: tuple[Turn, ...]
    references: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Generation:
    """How answers are generated; temperature 0 is greedy."""

    max_tokens: int = 64
    temperature: float = 0.0
    stop: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Task:
    """A task file's content, checked."""

    name: str
    version: str
    metrics: tuple[str, ...]
    samples: tuple[Sample, ...] = ()
    texts: tuple[str, ...] = ()
    generation: Generation = Generation()
    description: str = ""

    @property
    def label(self) -> str:
        """Its name with its version, as a client may name it."""
        return f"{self.name}@{self.version}"

    def fingerprint(self, model: str) -> str:
        """A digest of everything that the answers of a model depend on (hex)."""
        return hashlib.sha256(repr((model, self)).encode(errors="surrogatepass")).hexdigest()
