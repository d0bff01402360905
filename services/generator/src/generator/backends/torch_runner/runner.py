"""Runs a step of the batching engine on a Llama model in torch, on the CPU."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from generator.backends.torch_runner.batch import BatchLayout
from generator.backends.torch_runner.llama import Llama
from generator.backends.torch_runner.lora import LoraWeights, read_lora
from generator.backends.torch_runner.weights import LlamaConfig, load_weights
from generator.core import sampling
from generator.core.adapters import AdapterFiles
from generator.core.engine import OutOfMemory
from generator.core.requests import GenerationRequest, ModelSpec, SamplingParams
from generator.core.sequences import Outcome, Sampled, Sequence, TokenLogprob, Work
from generator.core.steps import StepTimes

CAPABILITIES = frozenset(
    {"chat", "logprobs", "prompt_logprobs", "seed", "n", "stop", "logit_bias", "penalties", "lora"}
)
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
_SCORE_ROWS = 64  # prompt rows whose logits are held at once: 64 x 49,152 floats are 12 MB
_WARM_UP_SEQUENCES = 8
_WARM_UP_TOKENS = 64


@dataclass(frozen=True, slots=True)
class RunnerOptions:
    """How to run a model. `kv_cache_bytes` bounds keys and values; dtype "auto" asks the processor."""

    max_model_len: int
    kv_cache_bytes: int
    block_size: int
    num_threads: int
    dtype: Literal["auto", "bf16", "fp32"] = "auto"


class TorchRunner:
    """See core.engine.Runner. `num_blocks` says how many KV blocks its memory has."""

    def __init__(self, llama: Llama, model: ModelSpec, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._llama = llama
        self._model = model
        self._step_times: StepTimes | None = None
        config = llama.config
        self._layout = BatchLayout(
            num_slots=num_blocks * block_size,
            block_size=block_size,
            num_kv_heads=config.num_kv_heads,
            queries_per_kv=config.num_heads // config.num_kv_heads,
            dtype=llama.dtype,
        )

    @property
    def model(self) -> ModelSpec:
        return self._model

    @property
    def step_times(self) -> StepTimes | None:
        return self._step_times

    @property
    def dtype_name(self) -> str:
        return next(name for name, dtype in DTYPES.items() if dtype is self._llama.dtype)

    def warm_up(self) -> None:
        """See Runner.warm_up: one prompt, then a batch of decodes over it."""
        request = GenerationRequest("warm-up", tuple([0] * (_WARM_UP_TOKENS - 1)), SamplingParams(temperature=0.0))
        num_blocks = min(-(-_WARM_UP_TOKENS // self.block_size), self.num_blocks)
        batch = [Sequence(request, i, 0, 0, 1) for i in range(_WARM_UP_SEQUENCES)]
        for sequence in batch:
            sequence.table = list(range(num_blocks))  # they may share: nobody reads what comes of it
        self.execute([Work(batch[0], len(request.prompt_ids))])
        for sequence in batch:
            sequence.num_computed = len(request.prompt_ids) - 1
        self.execute([Work(sequence, 1) for sequence in batch])

    def read_adapter(self, files: AdapterFiles) -> LoraWeights:
        """See Runner.read_adapter."""
        return read_lora(files, self._llama.config)

    def execute(self, step: list[Work]) -> list[Outcome]:
        """See Runner.execute."""
        ordered = self._layout.order(step)
        started_s = time.perf_counter()
        try:
            with torch.inference_mode():
                hidden = self._llama.forward(self._layout.lay_out(ordered))
                computed_s = time.perf_counter()
                scores = self._score_prompts(ordered, hidden)
                sampled = self._sample(ordered, hidden)
                self._step_times = StepTimes(computed_s - started_s, time.perf_counter() - computed_s)
        except (MemoryError, RuntimeError) as error:
            if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
                raise OutOfMemory(str(error)) from error
            raise
        return [Outcome(tuple(sampled.get(id(work), ())), tuple(scores.get(id(work), ()))) for work in step]

    def _sample(self, ordered: list[Work], hidden: Tensor) -> dict[int, list[Sampled]]:
        """Samples for the works that end their sequence; logits are computed for their last tokens and drafts only."""
        rows: list[sampling.Row] = []
        places: list[int] = []
        end = 0
        for work in ordered:
            end += work.num_positions
            found = sampling.rows_of(work)
            rows += found
            places += range(end - len(found), end)
        if not rows:
            return {}
        logits = self._llama.logits(hidden[torch.tensor(places)]).numpy()
        asking = [i for i, row in enumerate(rows) if row.sequence.request.logprobs is not None]
        raw = logits[asking]  # a copy, taken before penalties change the rows
        tokens = [Sampled(token_id) for token_id in sampling.sample(logits, rows)]
        for place, i in enumerate(asking):
            num_top = rows[i].sequence.request.logprobs or 0
            (logprob,) = sampling.logprobs(raw[place : place + 1], [tokens[i].token_id], num_top)
            tokens[i] = Sampled(tokens[i].token_id, logprob)
        sampled: dict[int, list[Sampled]] = {}
        for work in ordered:
            mine, tokens = tokens[: len(sampling.rows_of(work))], tokens[len(sampling.rows_of(work)) :]
            if mine:
                sampled[id(work)] = mine[: sampling.num_accepted(work.drafts, [token.token_id for token in mine])]
        return sampled

    def _score_prompts(self, ordered: list[Work], hidden: Tensor) -> dict[int, list[TokenLogprob]]:
        scores: dict[int, list[TokenLogprob]] = {}
        row = 0
        for work in ordered:
            sequence, scored = work.sequence, work.scored
            for start in range(scored.start, scored.stop, _SCORE_ROWS):
                end = min(start + _SCORE_ROWS, scored.stop)
                offset = row - sequence.num_computed
                logits = self._llama.logits(hidden[offset + start : offset + end]).numpy()
                targets = sequence.token_ids[start + 1 : end + 1]
                found = sampling.logprobs(logits, targets, sequence.request.prompt_logprobs or 0)
                scores.setdefault(id(work), []).extend(found)
            row += work.num_positions
        return scores


def make_runner(
    folder: Path, options: RunnerOptions, *, model_id: str, version: str, created_unix_s: int = 0
) -> TorchRunner:
    """Loads a model that was verified before. Blocks for seconds. Raises PlatformError."""
    torch.set_num_threads(options.num_threads)
    config = LlamaConfig.load(folder)
    dtype = _pick_dtype() if options.dtype == "auto" else DTYPES[options.dtype]
    context_length = min(options.max_model_len, config.context_length)
    bytes_per_slot = 2 * config.num_layers * config.num_kv_heads * config.head_dim * dtype.itemsize
    num_blocks = options.kv_cache_bytes // (bytes_per_slot * options.block_size)
    weights = load_weights(folder / "model.safetensors", config, dtype)
    llama = Llama(config, weights, num_blocks * options.block_size, context_length)
    model = ModelSpec(
        id=model_id,
        version=version,
        vocab_size=config.vocab_size,
        context_length=context_length,
        eos_token_ids=config.eos_token_ids,
        created_unix_s=created_unix_s,
        capabilities=CAPABILITIES,
    )
    return TorchRunner(llama, model, num_blocks, options.block_size)


def _pick_dtype() -> torch.dtype:
    """bf16 where the processor multiplies it natively; elsewhere it would be emulated, at twice the time."""
    capabilities = torch.cpu.get_capabilities()
    native = capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") or capabilities.get("bf16")
    return torch.bfloat16 if native else torch.float32
