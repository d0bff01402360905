"""Greedy text of the generator beside transformers, token by token, over real prompts.

The reference reads the dequantised weights of the model store. It is asked with our tokens put before it (teacher
forcing): what it would have said at each place, and by how much, is known from one pass. A prompt's comparison ends
where the two part, since from there on they answer different texts.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench_engine.clients import GrpcClient
from bench_engine.figures import percentile

NEAR_TIE = 0.05


@dataclass(frozen=True, slots=True)
class Comparison:
    """One prompt. parted_at: index of the first token that differs, None for none. margin: the reference's there.

    agreed: places of all (before and after parting) at which the reference, given our text so far, says the same.
    """

    num_tokens: int
    parted_at: int | None
    margin: float | None
    agreed: int


def compare(ours: Sequence[int], logits: NDArray[np.float32]) -> Comparison:
    """ours: tokens; logits: [len(ours), vocabulary] of the reference, row i for what comes at place i."""
    chosen = logits.argmax(axis=1)
    differs = np.flatnonzero(chosen != np.asarray(ours))
    agreed = len(ours) - len(differs)
    if not len(differs):
        return Comparison(len(ours), None, None, agreed)
    at = int(differs[0])
    second, first = np.partition(logits[at], -2)[-2:]
    return Comparison(len(ours), at, float(first - second), agreed)


def read_prompts(path: Path, most: int) -> list[str]:
    """JSON lines with `prompt`, `text` or `turns` (of which the first is taken)."""
    lines = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    return [line.get("prompt") or line.get("text") or line["turns"][0] for line in lines][:most]


class Reference:
    """transformers on the CPU."""

    def __init__(self, folder: Path, dtype: str) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self._torch: Any = torch
        self._model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
        self._tokenizer: Any = AutoTokenizer.from_pretrained(folder)

    def prompt_ids(self, prompt: str) -> list[int]:
        """The same chat by transformers' own template and tokenizer."""
        chat = [{"role": "user", "content": prompt}]
        encoded = self._tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)
        return list(encoded["input_ids"])

    def logits(self, prompt_ids: Sequence[int], ours: Sequence[int]) -> NDArray[np.float32]:
        """What it would say at each place of ours: [len(ours), vocabulary]."""
        ids = self._torch.tensor([[*prompt_ids, *ours[:-1]]])
        with self._torch.inference_mode():
            found = self._model(input_ids=ids).logits[0, len(prompt_ids) - 1 :].float().numpy()
        return np.asarray(found, dtype=np.float32)


async def run(
    client: GrpcClient, folder: Path, prompts: Iterable[str], max_tokens: int, dtype: str
) -> list[Comparison]:
    """Compares all prompts one after another. Raises RuntimeError where the generator fails or reads other tokens."""
    reference, found = Reference(folder, dtype), list[Comparison]()
    for text in prompts:
        prompt_ids = await client.token_ids(text)
        if prompt_ids != reference.prompt_ids(text):
            raise RuntimeError(f"transformers tokenizes this prompt otherwise: {text[:80]!r}")
        answer = await client.generate(client.request(prompt_ids, max_tokens, ignore_eos=False))
        if answer.error or not answer.token_ids:
            raise RuntimeError(f"not answered: {answer.error}")
        found.append(compare(answer.token_ids, reference.logits(prompt_ids, answer.token_ids)))
    return found


def report(found: Sequence[Comparison], what: str) -> str:
    """Counts, in Markdown."""
    parted = [c for c in found if c.parted_at is not None]
    near = [c for c in parted if c.margin is not None and c.margin < NEAR_TIE]
    far = [c.margin for c in parted if c.margin is not None and c.margin >= NEAR_TIE]
    tokens, agreed = sum(c.num_tokens for c in found), sum(c.agreed for c in found)
    same = f"{agreed} of {tokens} tokens ({agreed / tokens:.2%})"
    margins = f"; their margins: p50 {percentile(far, 50):.2f}, most {max(far):.2f}" if far else ""
    return (
        f"- Greedy against {what}: {len(found)} prompts, {tokens} tokens. {len(found) - len(parted)} answers equal to "
        f"the last token, {len(near)} parted where the top two differ by less than {NEAR_TIE} (allowed), {len(far)} "
        f"parted elsewhere{margins}. Given the text so far, {same} agree.\n"
    )
