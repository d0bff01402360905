"""What a request will take, guessed before it runs: tokens, sequences and time. Learned from those that have ended."""

from dataclasses import dataclass

from gateway.core.fanout import MAX_AT_ONCE
from gateway.core.services import Chat, Prompt, Usage
from gateway.core.serving import Ask

_BYTES_A_TOKEN = 4  # English text, about; what is wrong with it is put right at the end
_FIRST_COMPLETION = 128  # tokens, before any is known
_KEPT = 0.95  # of what was learned, at every request: the last twenty count


@dataclass(frozen=True, slots=True)
class Size:
    """Tokens of prompt and completion, and sequences that run at once."""

    tokens: float
    width: int


class Guesses:
    """How long completions are, on the average."""

    def __init__(self) -> None:
        self._completion = float(_FIRST_COMPLETION)  # of one sequence
        self.mean_tokens = float(_FIRST_COMPLETION)  # of a request, prompt and completion

    def guess(self, ask: Ask) -> Size:
        """The size of a request that has not run."""
        if ask.inputs:
            return Size(max(1.0, sum(map(_num_tokens, ask.inputs))), 1)
        tokens = 0.0
        for request in ask.requests:
            most = request.stopping.max_tokens
            completion = self._completion if most is None else min(self._completion, most)
            tokens += _num_tokens(request.prompt) + completion * request.n
        width = min(len(ask.requests), MAX_AT_ONCE) * ask.requests[0].n
        return Size(max(1.0, tokens), width)

    def learn(self, ask: Ask, usage: Usage) -> None:
        """A request has ended by itself and used that."""
        self.mean_tokens += (1 - _KEPT) * (usage.prompt_tokens + usage.completion_tokens - self.mean_tokens)
        num_sequences = sum(request.n for request in ask.requests)
        if num_sequences:
            self._completion += (1 - _KEPT) * (usage.completion_tokens / num_sequences - self._completion)


class Pace:
    """Seconds that a sequence takes for a token, its prompt's included."""

    def __init__(self) -> None:
        self._tokens = 0.0
        self._seconds = 0.0

    def learn(self, tokens: float, seconds: float) -> None:
        """So many tokens took a sequence so long."""
        self._tokens = _KEPT * self._tokens + tokens
        self._seconds = _KEPT * self._seconds + seconds

    def work_s(self, tokens: float) -> float:
        """What so many tokens take a sequence; 0 while nothing is known."""
        return tokens * self._seconds / self._tokens if self._tokens else 0.0


def _num_tokens(prompt: Prompt) -> float:
    match prompt:
        case Chat():
            return sum(_text_tokens(message.content) + 4 for message in prompt.messages)  # 4: a turn's frame
        case str():
            return _text_tokens(prompt)
        case _:
            return len(prompt)


def _text_tokens(text: str) -> float:
    return len(text if text.isascii() else text.encode(errors="replace")) / _BYTES_A_TOKEN
