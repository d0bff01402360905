"""What a model costs and how well it reads: `python -m generator.measure --model-dir DIR --engine native|torch`.

Runs one runner by itself, without service, scheduler or batch, and prints one line of JSON. The perplexity is that of
measure_text.txt beside this module (or of --text), in pieces of 1,024 tokens that do not see each other; their first
tokens are not predicted. Lower is better; only figures of one text and one tokenizer compare.
"""

import argparse
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

from chassis.errors import PlatformError
from generator.core.engine import Runner
from generator.core.requests import GenerationRequest, SamplingParams, StopParams
from generator.core.sequences import Outcome, Sequence, Work
from modelstore import Manifest

TEXT = Path(__file__).with_name("measure_text.txt")
_PIECE_TOKENS = 1024
_STEP_TOKENS = 128
_PREFILL_TOKENS = 512
_DECODE_TOKENS = 64


def measure(runner: Runner, token_ids: list[int], block_size: int) -> dict[str, float]:
    """Returns tokens, perplexity, prefill_tokens_per_s and decode_tokens_per_s. Blocks for seconds to minutes."""
    piece = min(_PIECE_TOKENS, runner.model.context_length)
    logprobs: list[float] = []
    for start in range(0, len(token_ids) - 1, piece):
        sequence = _sequence(token_ids[start : start + piece], block_size, prompt_logprobs=0)
        for outcome in _compute(runner, sequence):
            logprobs += [scored.logprob for scored in outcome.prompt_logprobs]
    prompt = (token_ids * math.ceil(_PREFILL_TOKENS / len(token_ids)))[: min(_PREFILL_TOKENS, piece - _DECODE_TOKENS)]
    sequence = _sequence(prompt, block_size, max_new_tokens=_DECODE_TOKENS)
    started_s = time.perf_counter()
    first = _compute(runner, sequence)[-1]
    prefilled_s = time.perf_counter()
    sequence.token_ids.append(first.tokens[0].token_id)
    for _ in range(_DECODE_TOKENS - 1):
        (outcome,) = _compute(runner, sequence)
        sequence.token_ids.append(outcome.tokens[0].token_id)
    decoded_s = time.perf_counter()
    return {
        "tokens": len(logprobs),
        "perplexity": math.exp(-sum(logprobs) / len(logprobs)),
        "prefill_tokens_per_s": len(prompt) / (prefilled_s - started_s),
        "decode_tokens_per_s": (_DECODE_TOKENS - 1) / (decoded_s - prefilled_s),
    }


def _sequence(
    token_ids: list[int], block_size: int, *, prompt_logprobs: int | None = None, max_new_tokens: int = 0
) -> Sequence:
    stop = StopParams(max_tokens=max_new_tokens, ignore_eos=True)
    request = GenerationRequest(
        "measure", tuple(token_ids), SamplingParams(temperature=0.0), stop, prompt_logprobs=prompt_logprobs
    )
    sequence = Sequence(request, 0, 0, 0, max_new_tokens)
    sequence.table = list(range(math.ceil((len(token_ids) + max_new_tokens) / block_size)))
    return sequence


def _compute(runner: Runner, sequence: Sequence) -> list[Outcome]:
    """Computes what a sequence has not computed yet, in the engine's steps."""
    outcomes = []
    while (left := len(sequence.token_ids) - sequence.num_computed) > 0:
        work = Work(sequence, min(left, _STEP_TOKENS))
        (outcome,) = runner.execute([work])
        sequence.num_computed = work.end
        sequence.prompt_logprobs += outcome.prompt_logprobs
        outcomes.append(outcome)
    return outcomes


def load(folder: Path, engine: str, weights: str, num_threads: int) -> tuple[Any, str]:
    """Returns a runner of a verified model, warm, and the name of its weights' form. Raises PlatformError."""
    manifest = Manifest.load(folder)
    manifest.verify()
    named: dict[str, Any] = {
        "model_id": manifest.id,
        "version": manifest.version,
        "created_unix_s": manifest.created_unix_s,
    }
    max_model_len, kv_cache_bytes = _PIECE_TOKENS + _DECODE_TOKENS, 256 * 1024 * 1024
    if engine == "torch":
        from generator.backends.torch_runner import RunnerOptions, make_runner

        dtype: Any = weights if weights in ("bf16", "fp32") else "auto"
        runner: Any = make_runner(folder, RunnerOptions(max_model_len, kv_cache_bytes, 16, num_threads, dtype), **named)
    else:
        from generator.backends import native_runner

        form: Any = weights if weights in ("int4", "int8") else "auto"
        options = native_runner.RunnerOptions(
            max_model_len=max_model_len,
            kv_cache_bytes=kv_cache_bytes,
            num_threads=num_threads,
            max_step_tokens=_STEP_TOKENS,
            max_sequences=8,
            weights=form,
        )
        runner = native_runner.make_runner(folder, options, **named)
    runner.warm_up()
    return runner, runner.dtype_name


def _rss_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="generator.measure", description=__doc__.split("\n")[0])
    parser.add_argument("--model-dir", type=Path, required=True, help="folder of the model, with its manifest")
    parser.add_argument("--engine", choices=("native", "torch"), default="native")
    parser.add_argument("--weights", choices=("auto", "bf16", "fp32", "int4", "int8"), default="auto")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--text", type=Path, default=TEXT, help="a text in UTF-8 in place of the one that is shipped")
    given = parser.parse_args(arguments)
    from generator.backends.hf_tokenizer import HfTokenizer

    try:
        started_s = time.perf_counter()
        runner, weights = load(given.model_dir, given.engine, given.weights, given.threads)
        load_s = time.perf_counter() - started_s
        token_ids = HfTokenizer.load(given.model_dir).encode(given.text.read_text(encoding="utf-8"))
        found = measure(runner, token_ids, runner.block_size)
    except PlatformError as error:
        print(f"error: {error.message}", file=sys.stderr)
        return 1
    told = {"engine": given.engine, "weights": weights, "text": given.text.name, "load_s": load_s}
    print(json.dumps(told | found | {"rss_bytes": _rss_bytes()}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
