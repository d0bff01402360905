"""Runs a step of the batching engine on a Llama model in torch, on the CPU or on a GPU."""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from generator.backends.llama_config import LlamaConfig
from generator.backends.torch_runner import pick
from generator.backends.torch_runner.batch import BatchLayout
from generator.backends.torch_runner.decode import DecodeBuckets
from generator.backends.torch_runner.devices import DTYPES, pick_device, pick_dtype
from generator.backends.torch_runner.llama import Llama
from generator.backends.torch_runner.lora import LoraWeights, read_lora
from generator.backends.torch_runner.weights import LlamaWeights, load_weights
from generator.core import sampling
from generator.core.adapters import AdapterFiles
from generator.core.engine import OutOfMemory
from generator.core.requests import GenerationRequest, ModelSpec, SamplingParams
from generator.core.sequences import Outcome, Sampled, Sequence, TokenLogprob, Work
from generator.core.steps import StepTimes

CAPABILITIES = frozenset(
    {"chat", "logprobs", "prompt_logprobs", "seed", "n", "stop", "logit_bias", "penalties", "lora"}
)
_SCORE_ROWS = 64  # prompt rows whose logits are held at once: 64 x 49,152 floats are 12 MB
_WARM_UP_SEQUENCES = 8
_WARM_UP_TOKENS = 64


@dataclass(frozen=True, slots=True)
class RunnerOptions:
    """How to run a model.

    `kv_cache_bytes` bounds keys and values on the CPU; on a GPU they get `gpu_memory_share` of what is free beside the
    weights. dtype "auto" is bf16 on a GPU, and asks the processor on a CPU. decode "auto" is paged on a GPU: attention
    out of the cache as it lies, in batches of a few fixed sizes up to `max_sequences`.
    """

    max_model_len: int
    kv_cache_bytes: int
    block_size: int
    num_threads: int
    dtype: Literal["auto", "bf16", "fp32"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    decode: Literal["auto", "gathered", "paged"] = "auto"
    max_sequences: int = 32
    gpu_memory_share: float = 0.85


class TorchRunner:
    """See core.engine.Runner. `num_blocks` says how many KV blocks its memory has."""

    def __init__(self, llama: Llama, model: ModelSpec, max_sequences: int = 0) -> None:
        """max_sequences: of a paged decoding step; 0 gathers keys and values, as is best on a CPU."""
        is_paged = max_sequences > 0
        self.num_blocks = llama.num_blocks - is_paged  # the last is the padding's
        self.block_size = llama.block_size
        self._llama = llama
        self._model = model
        self._step_times: StepTimes | None = None
        config = llama.config
        self._layout = BatchLayout(
            num_slots=llama.num_blocks * llama.block_size,
            block_size=llama.block_size,
            num_kv_heads=config.num_kv_heads,
            queries_per_kv=config.num_heads // config.num_kv_heads,
            dtype=llama.dtype,
            is_paged=is_paged,
        )
        self._max_sequences = max_sequences
        self._buckets: DecodeBuckets | None = None

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
        """See Runner.warm_up: one prompt, then a batch of decodes over it. On a GPU decoding steps are captured."""
        if self._max_sequences and self._buckets is None:
            with torch.inference_mode(), _memory_errors():
                self._buckets = DecodeBuckets(
                    self._llama, self._layout, self._max_sequences, self._model.context_length, self.num_blocks
                )
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
        return read_lora(files, self._llama.config, self._llama.device)

    def execute(self, step: list[Work]) -> list[Outcome]:
        """See Runner.execute."""
        started_s = time.perf_counter()
        with torch.inference_mode(), _memory_errors():
            scores: dict[int, list[TokenLogprob]] = {}
            if self._buckets is not None and self._buckets.fits(step):
                logits = self._buckets.run(step)
                computed_s = time.perf_counter()
                sampled = self._sample(step, logits)
            else:
                ordered = self._layout.order(step)
                hidden = self._llama.forward(self._layout.lay_out(ordered).to(self._llama.device))
                computed_s = time.perf_counter()
                scores = self._score_prompts(ordered, hidden)
                sampled = self._sample(ordered, self._last_logits(ordered, hidden))
        self._step_times = StepTimes(computed_s - started_s, time.perf_counter() - computed_s)
        return [Outcome(tuple(sampled.get(id(work), ())), tuple(scores.get(id(work), ()))) for work in step]

    def _last_logits(self, ordered: list[Work], hidden: Tensor) -> Tensor | None:
        """Returns the logits of what is sampled, the rows of all works one behind the other; None where nothing is."""
        places: list[int] = []
        end = 0
        for work in ordered:
            end += work.num_positions
            places += range(end - len(sampling.rows_of(work)), end)
        return self._llama.logits(hidden[torch.tensor(places, device=hidden.device)]) if places else None

    def _sample(self, ordered: list[Work], logits: Tensor | None) -> dict[int, list[Sampled]]:
        """Samples for the works that end their sequence."""
        rows = [row for work in ordered for row in sampling.rows_of(work)]
        if logits is None:
            return {}
        tokens = self._pick(logits, rows)
        sampled: dict[int, list[Sampled]] = {}
        for work in ordered:
            mine, tokens = tokens[: len(sampling.rows_of(work))], tokens[len(sampling.rows_of(work)) :]
            if mine:
                sampled[id(work)] = mine[: sampling.num_accepted(work.drafts, [token.token_id for token in mine])]
        return sampled

    def _pick(self, logits: Tensor, rows: list[sampling.Row]) -> list[Sampled]:
        """Picks on the device what can be picked there; only the other rows are copied to the host."""
        plain = [place for place, row in enumerate(rows) if self._max_sequences and pick.is_plain(row)]
        others = [place for place in range(len(rows)) if place not in set(plain)]
        tokens: dict[int, Sampled] = {}
        if plain:
            chosen = logits if not others else logits[torch.tensor(plain, device=logits.device)]
            found = pick.pick(chosen, [rows[place] for place in plain])
            tokens.update((place, Sampled(token_id)) for place, token_id in zip(plain, found, strict=True))
        if others:
            chosen = logits if not plain else logits[torch.tensor(others, device=logits.device)]
            # Copied in any case: numpy may overwrite it, and a bucket's buffer is the next step's.
            on_host = chosen.cpu().numpy() if chosen is not logits or logits.is_cuda else chosen.clone().numpy()
            found_here = _pick_on_host(on_host, [rows[place] for place in others])
            tokens.update(zip(others, found_here, strict=True))
        return [tokens[place] for place in range(len(rows))]

    def _score_prompts(self, ordered: list[Work], hidden: Tensor) -> dict[int, list[TokenLogprob]]:
        scores: dict[int, list[TokenLogprob]] = {}
        row = 0
        for work in ordered:
            sequence, scored = work.sequence, work.scored
            for start in range(scored.start, scored.stop, _SCORE_ROWS):
                end = min(start + _SCORE_ROWS, scored.stop)
                offset = row - sequence.num_computed
                logits = self._llama.logits(hidden[offset + start : offset + end]).cpu().numpy()
                targets = sequence.token_ids[start + 1 : end + 1]
                found = sampling.logprobs(logits, targets, sequence.request.prompt_logprobs or 0)
                scores.setdefault(id(work), []).extend(found)
            row += work.num_positions
        return scores


def _pick_on_host(logits: sampling.Floats, rows: list[sampling.Row]) -> list[Sampled]:
    asking = [i for i, row in enumerate(rows) if row.sequence.request.logprobs is not None]
    raw = logits[asking]  # a copy, taken before penalties change the rows
    tokens = [Sampled(token_id) for token_id in sampling.sample(logits, rows)]
    for place, i in enumerate(asking):
        num_top = rows[i].sequence.request.logprobs or 0
        (logprob,) = sampling.logprobs(raw[place : place + 1], [tokens[i].token_id], num_top)
        tokens[i] = Sampled(tokens[i].token_id, logprob)
    return tokens


@contextlib.contextmanager
def _memory_errors() -> Iterator[None]:
    """Errors of memory, the host's and the GPU's, as the engine's own."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error):
            raise OutOfMemory(str(error)) from error
        raise


def make_runner(
    folder: Path, options: RunnerOptions, *, model_id: str, version: str, created_unix_s: int = 0
) -> TorchRunner:
    """Loads a model that was verified before. Blocks for seconds. Raises PlatformError."""
    config = LlamaConfig.load(folder)
    device = pick_device(options.device)
    weights = load_weights(folder, config, pick_dtype(options.dtype, device), device)
    return assemble(config, weights, options, model_id=model_id, version=version, created_unix_s=created_unix_s)


def assemble(
    config: LlamaConfig,
    weights: LlamaWeights,
    options: RunnerOptions,
    *,
    model_id: str,
    version: str,
    created_unix_s: int = 0,
) -> TorchRunner:
    """Makes a runner of weights that lie where they shall be computed with; takes the memory for keys and values."""
    torch.set_num_threads(options.num_threads)
    dtype, device = weights.embedding.dtype, weights.embedding.device
    context_length = min(options.max_model_len, config.context_length)
    bytes_per_block = 2 * config.num_layers * config.num_kv_heads * config.head_dim * dtype.itemsize
    bytes_per_block *= options.block_size
    kv_bytes = options.kv_cache_bytes
    if device.type == "cuda":
        kv_bytes = int(torch.cuda.mem_get_info(device)[0] * options.gpu_memory_share)
    is_paged = options.decode == "paged" or (options.decode == "auto" and device.type == "cuda")
    num_blocks = kv_bytes // bytes_per_block + is_paged
    with _memory_errors():
        llama = Llama(config, weights, num_blocks, options.block_size, context_length)
    model = ModelSpec(
        id=model_id,
        version=version,
        vocab_size=config.vocab_size,
        context_length=context_length,
        eos_token_ids=config.eos_token_ids,
        created_unix_s=created_unix_s,
        capabilities=CAPABILITIES,
    )
    return TorchRunner(llama, model, options.max_sequences if is_paged else 0)
