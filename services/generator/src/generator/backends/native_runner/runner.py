"""Runs a step of the batching engine on our own kernels: int4 or int8 weights, no framework at run time."""

import time
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from chassis.errors import Code, PlatformError
from generator.backends.llama_config import LlamaConfig
from generator.backends.native_runner.library import Draw
from generator.backends.native_runner.lora import NativeAdapter, read_adapter
from generator.backends.native_runner.model import BLOCK_SIZE, Limits, NativeModel, StepArrays
from generator.backends.native_runner.weights import find_pack, load_pack, load_shape
from generator.core import sampling
from generator.core.adapters import AdapterFiles
from generator.core.requests import GenerationRequest, ModelSpec, SamplingParams
from generator.core.sampling import Floats, Row
from generator.core.sequences import Outcome, Sampled, Sequence, TokenLogprob, Work
from generator.core.steps import StepTimes

CAPABILITIES = frozenset(
    {"chat", "logprobs", "prompt_logprobs", "seed", "n", "stop", "logit_bias", "penalties", "lora"}
)
Activations = Literal["int8", "mixed", "int16"]

# Which matrices read activations of 15 bits in place of 8 (PrConfig numbers them), at nearly twice the work: those
# of a prompt's tokens, and those of the tokens that are sampled from. mixed has about the exactness of int16, since
# attention averages what is noisy in a prompt, and two thirds of its time for a prompt.
_ALL = 1 | 2 | 4 | 8 | 16
WIDE_PARTS: dict[Activations, tuple[int, int]] = {"int8": (0, 0), "mixed": (1 | 2 | 16, _ALL), "int16": (_ALL, _ALL)}


@dataclass(frozen=True, slots=True)
class RunnerOptions:
    """How to run a model. `kv_cache_bytes` bounds keys and values, the other bounds are those of one step."""

    max_model_len: int
    kv_cache_bytes: int
    num_threads: int
    max_step_tokens: int
    max_sequences: int
    weights: Literal["auto", "int4", "int8"] = "auto"
    activations: Activations = "mixed"


class NativeRunner:
    """See core.engine.Runner. `num_blocks` says how many KV blocks its memory has."""

    block_size = BLOCK_SIZE

    def __init__(
        self, native: NativeModel, shape: LlamaConfig, model: ModelSpec, limits: Limits, dtype_name: str
    ) -> None:
        self.num_blocks = limits.num_blocks
        self.dtype_name = dtype_name
        self._native = native
        self._shape = shape
        self._model = model
        self._limits = limits
        self._step_times: StepTimes | None = None

    @property
    def model(self) -> ModelSpec:
        return self._model

    @property
    def step_times(self) -> StepTimes | None:
        return self._step_times

    def warm_up(self) -> None:
        """See Runner.warm_up: the largest step, so that all of its memory is there before the first request."""
        num_tokens = min(self._limits.max_tokens, self._limits.context_length)
        request = GenerationRequest("warm-up", (0,) * num_tokens, SamplingParams(temperature=0.0))
        sequence = Sequence(request, 0, 0, 0, 1)
        sequence.table = [0] * (-(-num_tokens // BLOCK_SIZE))  # one block for all: nobody reads what comes of it
        self.execute([Work(sequence, num_tokens)])

    def read_adapter(self, files: AdapterFiles) -> NativeAdapter:
        """See Runner.read_adapter."""
        return read_adapter(files, self._shape)

    def execute(self, step: list[Work]) -> list[Outcome]:
        """See Runner.execute."""
        started_s = time.perf_counter()
        wanted = [_Wanted.of(work) for work in step]
        logits, best = self._native.forward(self._lay_out(step, wanted))
        computed_s = time.perf_counter()
        outcomes = self._read(step, wanted, logits, best)
        self._step_times = StepTimes(computed_s - started_s, time.perf_counter() - computed_s)
        return outcomes

    def close(self) -> None:
        """Ends the kernels' threads."""
        self._native.close()

    def _lay_out(self, step: list[Work], wanted: "list[_Wanted]") -> StepArrays:
        token_ids: list[int] = []
        positions: list[int] = []
        starts, tables, table_starts, rows = [0], list[int](), list[int](), list[int]()
        is_prompt: list[bool] = []
        for work, want in zip(step, wanted, strict=True):
            first, offset = work.sequence.num_computed, len(token_ids) - work.sequence.num_computed
            token_ids += work.token_ids
            positions += range(first, work.reach)
            # What is scored is as exact as what is sampled.
            last_read = 0 if work.sequence.wants_prompt_logprobs else work.sequence.num_prompt - 1
            num_read = max(0, min(work.end, last_read) - first)
            is_prompt += [True] * num_read + [False] * (work.num_positions - num_read)
            starts.append(len(token_ids))
            table_starts.append(len(tables))
            tables += work.sequence.table
            rows += [offset + position for position in want.scored]
            rows += range(offset + work.end - 1, offset + work.end - 1 + len(want.sampled))
        if len(token_ids) > self._limits.max_tokens or len(step) > self._limits.max_sequences:
            raise RuntimeError(f"a step of {len(token_ids)} tokens in {len(step)} sequences is larger than was agreed")
        adapters = [work.sequence.adapter for work in step]
        return StepArrays(
            token_ids=np.array(token_ids, dtype=np.int32),
            positions=np.array(positions, dtype=np.int32),
            starts=np.array(starts, dtype=np.int32),
            tables=np.array(tables, dtype=np.int32),
            table_starts=np.array(table_starts, dtype=np.int32),
            is_prompt=np.array(is_prompt, dtype=np.uint8),
            rows=np.array(rows, dtype=np.int32),
            wants_logits=np.array([flag for want in wanted for flag in want.wants_logits], dtype=np.uint8),
            adapters=np.array([_address(a) for a in adapters], dtype=np.uint64) if any(adapters) else None,
        )

    def _read(
        self,
        step: list[Work],
        wanted: "list[_Wanted]",
        logits: Floats,
        best: "np.ndarray[tuple[int], np.dtype[np.int32]]",
    ) -> list[Outcome]:
        """Makes outcomes of logits: prompt scores first, then one draw for all rows that need one."""
        first, scores, at = 0, list[tuple[TokenLogprob, ...]](), list[int]()
        for work, want in zip(step, wanted, strict=True):
            scores.append(_score_prompt(work, logits[first : first + len(want.scored)]))
            at.append(first + len(want.scored))
            first = at[-1] + len(want.sampled)
        likeliest = best.tolist()
        tokens = [likeliest[place : place + len(want.sampled)] for place, want in zip(at, wanted, strict=True)]
        drawn = [
            (number, offset)
            for number, want in enumerate(wanted)
            if want.needs_logits
            for offset in range(len(want.sampled))
        ]
        raw = {
            (number, offset): logits[at[number] + offset].copy()  # before penalties change the row
            for number, offset in drawn
            if step[number].sequence.request.logprobs is not None
        }
        picked = self._pick(
            [logits[at[number] + offset] for number, offset in drawn],
            [wanted[number].sampled[offset] for number, offset in drawn],
        )
        for (number, offset), token_id in zip(drawn, picked, strict=True):
            tokens[number][offset] = token_id
        outcomes = []
        for number, work in enumerate(step):
            mine = tokens[number]
            if work.drafts:
                mine = mine[: sampling.num_accepted(work.drafts, mine)] if mine else mine
            sampled = tuple(
                Sampled(token_id, _score(raw.get((number, offset)), token_id, work.sequence.request.logprobs))
                for offset, token_id in enumerate(mine)
            )
            outcomes.append(Outcome(sampled, scores[number]))
        return outcomes

    def _pick(self, logits: list[Floats], rows: Seq[Row]) -> list[int]:
        """Returns a token for each row: numpy adjusts the logits, the kernels draw."""
        chosen = [0] * len(rows)
        draws: list[Draw] = []
        places: list[int] = []
        for place, (values, row) in enumerate(zip(logits, rows, strict=True)):
            sampling.adjust(values[None], [row])
            if row.sequence.sampling.is_greedy:
                chosen[place] = int(values.argmax())
            else:
                draws.append(_draw_of(values, row))
                places.append(place)
        if draws:
            for place, token_id in zip(places, self._native.draw(draws).tolist(), strict=True):
                chosen[place] = token_id
        return chosen


@dataclass(frozen=True, slots=True)
class _Wanted:
    """What a step must bring for a work, in the order of its rows: prompt scores, then tokens."""

    scored: range
    sampled: list[Row]
    needs_logits: bool  # whether the likeliest token alone is not enough for `sampled`

    @classmethod
    def of(cls, work: Work) -> "_Wanted":
        rows, request = sampling.rows_of(work), work.sequence.request
        plain = request.sampling.is_greedy and request.logprobs is None
        return cls(work.scored, rows, not plain or any(sampling.is_adjusted(row) for row in rows))

    @property
    def wants_logits(self) -> list[int]:
        return [1] * len(self.scored) + [int(self.needs_logits)] * len(self.sampled)


def make_runner(
    folder: Path, options: RunnerOptions, *, model_id: str, version: str, created_unix_s: int = 0
) -> NativeRunner:
    """Maps a model that was verified before; takes milliseconds.

    Raises PlatformError: FAILED_PRECONDITION where the model or the processor does not fit, DATA_LOSS for damage.
    """
    shape = load_shape(folder)
    path = find_pack(folder, options.weights)
    if path is None:
        message = f"{folder.name} has no packed weights ({options.weights}): pressroom models add makes them"
        raise PlatformError(Code.FAILED_PRECONDITION, message, retryable=False)
    weights = load_pack(path, shape)
    context_length = min(options.max_model_len, shape.context_length)
    block_bytes = 2 * 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim * BLOCK_SIZE
    in_prompts, after = WIDE_PARTS[options.activations]
    limits = Limits(
        max_tokens=options.max_step_tokens,
        max_rows=options.max_step_tokens,
        max_sequences=options.max_sequences,
        num_blocks=options.kv_cache_bytes // block_bytes,
        context_length=context_length,
        num_threads=options.num_threads,
        wide_in_prompts=in_prompts,
        wide_after=after,
    )
    model = ModelSpec(
        id=model_id,
        version=version,
        vocab_size=shape.vocab_size,
        context_length=context_length,
        eos_token_ids=shape.eos_token_ids,
        created_unix_s=created_unix_s,
        capabilities=CAPABILITIES,
    )
    return NativeRunner(NativeModel(shape, weights, limits), shape, model, limits, weights.form)


def _score_prompt(work: Work, logits: Floats) -> tuple[TokenLogprob, ...]:
    if not len(logits):
        return ()
    targets = work.sequence.token_ids[work.scored.start + 1 : work.scored.stop + 1]
    return tuple(sampling.logprobs(logits, targets, work.sequence.request.prompt_logprobs or 0))


def _score(raw: Floats | None, token_id: int, num_top: int | None) -> TokenLogprob | None:
    return None if raw is None else sampling.logprobs(raw[None], [token_id], num_top or 0)[0]


def _draw_of(logits: Floats, row: Row) -> Draw:
    asked = row.sequence.sampling
    return Draw(
        logits=logits.ctypes.data,
        temperature=asked.temperature,
        top_p=asked.top_p,
        min_p=asked.min_p,
        top_k=asked.top_k,
        uniform=sampling.uniform(row.sequence.seed, row.sequence.index, row.position),
    )


def _address(adapter: object) -> int:
    if adapter is None:
        return 0
    assert isinstance(adapter, NativeAdapter)
    return adapter.address
