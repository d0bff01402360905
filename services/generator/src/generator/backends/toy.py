"""A runner without weights for tests and simulations: bytes are its tokens, a hash of the context is its model.

It keeps what it "computed" in slots and reads the whole context back through the block table, so that a scheduler
that mixes up blocks, or skips a token, changes the text; and so does a context that another adapter computed.
"""

import zlib
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np

from chassis.errors import Code, PlatformError
from generator.core import sampling
from generator.core.adapters import AdapterFiles
from generator.core.requests import ModelSpec
from generator.core.sequences import Outcome, Sampled, Sequence, TokenLogprob, Work
from generator.core.text import ChatMessage

EOS = 256
VOCAB_SIZE = 257
_LETTERS = np.frombuffer(b"abcdefghijklmnopqrstuvwxyz ", dtype=np.uint8).astype(np.int64)


class ByteTokenizer:
    """Tokens are UTF-8 bytes; a chat is its turns, one a line."""

    max_token_bytes = 1

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def encode_chat(self, messages: Seq[ChatMessage], tools_json: str) -> list[int]:
        return self.encode("".join(f"{m.role}: {m.content}\n" for m in messages) + "assistant: ")

    def token_bytes(self, token_id: int) -> bytes:
        return b"" if token_id == EOS else bytes([token_id])

    def token_text(self, token_id: int) -> str:
        return "<end>" if token_id == EOS else bytes([token_id]).decode(errors="replace")


@dataclass(frozen=True, slots=True)
class ToyAdapter:
    """An adapter's weights: a number that goes into the hash."""

    salt: int
    size_bytes: int


class ToyRunner:
    """A deterministic model over bytes."""

    def __init__(self, num_blocks: int, block_size: int, context_length: int, model_id: str = "toy") -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._slots = np.full(num_blocks * block_size, -1, dtype=np.int64)
        self._model = ModelSpec(
            id=model_id,
            version="0" * 12,
            vocab_size=VOCAB_SIZE,
            context_length=context_length,
            eos_token_ids=frozenset({EOS}),
            capabilities=frozenset({"logprobs", "prompt_logprobs", "lora"}),
        )

    @property
    def model(self) -> ModelSpec:
        return self._model

    @property
    def step_times(self) -> None:
        """Not measured."""

    def warm_up(self) -> None:
        """Nothing to warm."""

    def read_adapter(self, files: AdapterFiles) -> ToyAdapter:
        """See Runner.read_adapter; a toy adapter is any bytes but none."""
        if not files.tensors:
            raise PlatformError(Code.DATA_LOSS, f"adapter {files.spec.id!r} is empty")
        return ToyAdapter(zlib.crc32(files.tensors) or 1, len(files.tensors))

    def execute(self, step: list[Work]) -> list[Outcome]:
        """See Runner.execute."""
        for work in step:
            start = work.sequence.num_computed
            computed = np.asarray(work.token_ids, dtype=np.int64)
            slots = self._slot_ids(work.sequence, start, work.reach)
            self._slots[slots] = computed + VOCAB_SIZE * _salt(work.sequence)
        return [self._outcome(work) for work in step]

    def _outcome(self, work: Work) -> Outcome:
        sequence, scores = work.sequence, list[TokenLogprob]()
        for position in work.scored:
            logits = self._logits(sequence, position + 1)[None]
            scored = sequence.token_ids[position + 1]
            scores += sampling.logprobs(logits, [scored], sequence.request.prompt_logprobs or 0)
        rows = sampling.rows_of(work)
        if not rows:
            return Outcome(prompt_logprobs=tuple(scores))
        raw = np.stack([self._logits(sequence, work.end + row.offset) for row in rows])
        token_ids = sampling.sample(raw.copy(), rows)
        token_ids = token_ids[: sampling.num_accepted(work.drafts, token_ids)]
        logprobs: list[TokenLogprob | None] = [None] * len(token_ids)
        if sequence.request.logprobs is not None:
            logprobs = [*sampling.logprobs(raw[: len(token_ids)], token_ids, sequence.request.logprobs)]
        tokens = (Sampled(*pair) for pair in zip(token_ids, logprobs, strict=True))
        return Outcome(tuple(tokens), tuple(scores))

    def _logits(self, sequence: Sequence, num_tokens: int) -> sampling.Floats:
        context = self._slots[self._slot_ids(sequence, 0, num_tokens)]
        noise = np.random.default_rng(zlib.crc32(context.tobytes(), _salt(sequence))).standard_normal(
            VOCAB_SIZE, dtype=np.float32
        )
        noise[_LETTERS] += 2.0
        return noise

    def _slot_ids(self, sequence: Sequence, start: int, end: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        positions = np.arange(start, end)
        table = np.asarray(sequence.table, dtype=np.int64)
        return table[positions // self.block_size] * self.block_size + positions % self.block_size


def _salt(sequence: Sequence) -> int:
    if sequence.adapter is None:
        return 0
    assert isinstance(sequence.adapter, ToyAdapter)
    return sequence.adapter.salt
