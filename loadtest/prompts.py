"""What is asked: texts of a wanted number of tokens, and questions about the sample collection. All written for this.

Words are drawn anew for each request, from its first word on: equal beginnings would come out of the prefix cache, and
the test would measure that.
"""

import json
import random
from functools import cache
from pathlib import Path

# Each is one token of SmolLM2 when a space stands before it: as many words as tokens.
_VOCABULARY = """
letter morning river garden winter market station window paper bridge summer teacher kitchen village doctor forest
machine library mountain season journey question answer history music number story picture reader writer weather
water evening street corner neighbor clock table engine color pattern system network memory light shadow silver
golden quiet careful small large early late again between during because without before after inside outside often
always never sometimes together almost perhaps however carries follows brings keeps finds makes gives holds turns
leaves returns opens closes crosses reaches counts builds
"""
_WORDS = _VOCABULARY.split()
_TASK = ". Tell a story with these words."
_TASK_TOKENS = 8
TEMPLATE_TOKENS = 30  # what SmolLM2's chat template adds: its own system message and the marks of the turns
_QUESTIONS = Path(__file__).with_name("questions.jsonl")


def text_of(num_tokens: int, seed: int) -> str:
    """A prompt that counts num_tokens with the chat template around it, or the fewest possible."""
    rng = random.Random(seed)
    num_words = max(1, num_tokens - TEMPLATE_TOKENS - _TASK_TOKENS)
    return " " + " ".join(rng.choice(_WORDS) for _ in range(num_words)) + _TASK


@cache
def questions() -> tuple[str, ...]:
    """The questions about what `make up` ingests."""
    with _QUESTIONS.open(encoding="utf-8") as file:
        return tuple(json.loads(line)["text"] for line in file)


def question(seed: int) -> str:
    """One of them."""
    return random.Random(seed).choice(questions())
