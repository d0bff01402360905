"""Log probabilities in OpenAI's two shapes."""

import math
from collections.abc import Sequence

from gateway.core.services import TokenLogprob, TopLogprob


def finite(logprob: float) -> float:
    """JSON has no infinities: -9999.0 stands for a probability of nothing, as OpenAI does."""
    return logprob if math.isfinite(logprob) else -9999.0


def chat_logprobs(tokens: Sequence[TokenLogprob]) -> dict[str, object]:
    """The shape of chat completions."""
    return {"content": token_logprobs(tokens), "refusal": None}


def token_logprobs(tokens: Sequence[TokenLogprob]) -> list[dict[str, object]]:
    """The tokens, each with its alternatives."""
    return [_token(token) | {"top_logprobs": [_token(top) for top in token.top]} for token in tokens]


def _token(token: TokenLogprob | TopLogprob) -> dict[str, object]:
    return {"token": token.text, "logprob": finite(token.logprob), "bytes": list(token.token_bytes)}


class CompletionLogprobs:
    """The shape of completions, which counts the characters before each token."""

    def __init__(self, num_alternatives: int) -> None:
        self._num_alternatives = num_alternatives
        self._offset = 0

    def take(self, tokens: Sequence[TokenLogprob]) -> dict[str, list[object]]:
        """The lists for the next tokens. A token without a probability (the first of a prompt) has null."""
        shape: dict[str, list[object]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for token in tokens:
            known = not math.isnan(token.logprob)
            shape["tokens"].append(token.text)
            shape["token_logprobs"].append(finite(token.logprob) if known else None)
            shape["top_logprobs"].append(self._top(token) if known else None)
            shape["text_offset"].append(self._offset)
            self._offset += len(token.text)
        return shape

    def _top(self, token: TokenLogprob) -> dict[str, float]:
        best = {top.text: finite(top.logprob) for top in reversed(token.top[: self._num_alternatives])}
        return best | {token.text: finite(token.logprob)}
