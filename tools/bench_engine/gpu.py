"""The torch engine beside transformers' own continuous batching, on one device, at shapes made of random weights.

No model of these sizes can be fetched, and speed does not depend on what the weights say. Random text is no text: the
figures are tokens per second and times alone. On the CPU (`--shape tiny`) it checks the path, not the speed.
"""

import argparse
import asyncio
import contextlib
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench_engine import figures, machine, peers, speed
from bench_engine.answers import Answer, Run
from bench_engine.clients import GrpcClient
from bench_engine.engines import Engine, EngineError, Served

TORCH, TRANSFORMERS = "Pressroom, torch engine, gRPC", "transformers, continuous batching, in process"
# Vocabulary and tokenizer are SmolLM2's, so that every sampled id is a text; the rest is the shape of known models.
SHAPES: dict[str, dict[str, int]] = {
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    | {"num_key_value_heads": 2, "head_dim": 16},
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32}
    | {"num_key_value_heads": 8, "head_dim": 64},
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
    | {"num_key_value_heads": 32, "head_dim": 128},
}
_COPIED = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
_KV_TOKENS_PER_STREAM = 320  # 95 + 64 and their blocks, twice
_PROBE_BYTES, _NUM_PROBES = 2**30, 8
_START_TIMEOUT_S, _ANSWER_TIMEOUT_S = 600.0, 60.0


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Options of the command."""
    command.add_argument("--shape", choices=SHAPES, default="1b")
    command.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    command.add_argument("--streams", default="1,8,64,256", help="levels of concurrency")
    command.add_argument("--rounds", type=int, default=3)
    command.add_argument("--tokens", type=int, default=64, help="of each answer")
    command.add_argument("--store", type=Path, default=peers.ROOT / ".pressroom" / "models", help="for the tokenizer")
    command.add_argument("--out", type=Path, help="folder of results")
    command.add_argument("--alone", action="store_true", help="ours alone, without transformers")


def write_model(folder: Path, shape: str, like: Path) -> int:
    """Fills a folder with a Llama of random bf16 weights; returns their bytes. like: whose tokenizer and config."""
    import torch
    from safetensors.torch import save_file

    from modelstore.manifest import write_manifest

    folder.mkdir(parents=True)
    for name in _COPIED:
        shutil.copy(like / name, folder / name)
    config = json.loads((like / "config.json").read_text()) | SHAPES[shape]
    config |= {"tie_word_embeddings": shape != "7b", "max_position_embeddings": 4096, "bos_token_id": 1}
    (folder / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(7)
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    query = config["num_attention_heads"] * config["head_dim"]
    kv = config["num_key_value_heads"] * config["head_dim"]

    def random(rows: int, columns: int) -> Any:
        return (torch.randn(rows, columns, generator=generator) / columns**0.5).to(torch.bfloat16)

    ones = torch.ones(hidden, dtype=torch.bfloat16)
    tensors = {"model.embed_tokens.weight": random(config["vocab_size"], hidden), "model.norm.weight": ones}
    if not config["tie_word_embeddings"]:
        tensors["lm_head.weight"] = random(config["vocab_size"], hidden)
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        tensors |= {
            f"{at}self_attn.q_proj.weight": random(query, hidden),
            f"{at}self_attn.k_proj.weight": random(kv, hidden),
            f"{at}self_attn.v_proj.weight": random(kv, hidden),
            f"{at}self_attn.o_proj.weight": random(hidden, query),
            f"{at}mlp.gate_proj.weight": random(inner, hidden),
            f"{at}mlp.up_proj.weight": random(inner, hidden),
            f"{at}mlp.down_proj.weight": random(hidden, inner),
            f"{at}input_layernorm.weight": ones.clone(),
            f"{at}post_attention_layernorm.weight": ones.clone(),
        }
    size_bytes = int(sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()))
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    write_manifest(
        folder,
        model_id=f"random-{shape}",
        kind="llm",
        created_unix_s=int(time.time()),
        source={"made": "random weights, for a benchmark"},
        config={"context_length": config["max_position_embeddings"]},
    )
    return size_bytes


def kv_cache_mb(shape: str, num_streams: int) -> int:
    """Memory for keys and values of that many streams, in MiB of bf16."""
    found = SHAPES[shape]
    token_bytes = 2 * 2 * found["num_hidden_layers"] * found["num_key_value_heads"] * found["head_dim"]
    return max(64, token_bytes * _KV_TOKENS_PER_STREAM * num_streams // 2**20 + 1)


def copied_bytes_per_s(device: str) -> float:
    """What the device moves at most, measured: a copy of 1 GiB reads and writes it. Median of eight."""
    import torch

    source = torch.zeros(_PROBE_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def seconds() -> float:
        began_s = time.perf_counter()
        target.copy_(source)
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began_s

    seconds()
    return 2 * _PROBE_BYTES / statistics.median(seconds() for _ in range(_NUM_PROBES))


class TransformersBatching:
    """generate_batch's manager, streaming, in this process; its own thread computes, another one of ours reads."""

    def __init__(self, folder: Path, device: str) -> None:
        self.name = TRANSFORMERS
        self.pids: tuple[int, ...] = ()
        self._folder, self._device = folder, device
        self._model: Any = None
        self._tokenizer: Any = None
        self._manager: Any = None
        self._exit = contextlib.ExitStack()
        self._next_id = 0

    async def start(self) -> float | None:
        began_s = time.perf_counter()
        await asyncio.to_thread(self._load)
        return time.perf_counter() - began_s

    def _load(self) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

        self._tokenizer = AutoTokenizer.from_pretrained(self._folder)
        model: Any = AutoModelForCausalLM.from_pretrained(
            self._folder, dtype=torch.bfloat16, attn_implementation="sdpa"
        )
        self._model = model.to(self._device)
        make_config: Any = GenerationConfig
        generation = make_config(do_sample=False, eos_token_id=-1, pad_token_id=0, max_new_tokens=64)
        # Open until close(): each opening costs seconds, which no served engine would pay for a level.
        batching = self._model.continuous_batching_context_manager(generation_config=generation)
        self._manager = self._exit.enter_context(batching)

    async def run(self, prompts: Sequence[str], max_tokens: int, num_streams: int) -> Run:
        chats = ([{"role": "user", "content": prompt}] for prompt in prompts)
        ids = [
            list(self._tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"])
            for chat in chats
        ]
        return await asyncio.to_thread(self._loop, ids, max_tokens, num_streams)

    def _loop(self, prompts: list[list[int]], max_tokens: int, num_streams: int) -> Run:
        pending, live, done = list(reversed(prompts)), dict[str, Answer](), list[Answer]()

        def fill() -> None:
            while pending and len(live) < num_streams:
                ids, name = pending.pop(), f"bench-{self._next_id}"
                self._next_id += 1
                live[name] = Answer(time.perf_counter(), prompt_tokens=len(ids))
                self._manager.add_request(ids, name, max_new_tokens=max_tokens, streaming=True, eos_token_id=-1)

        began_s = time.perf_counter()
        fill()
        while live:
            output = self._manager.get_result(timeout=_ANSWER_TIMEOUT_S)
            if output is None:
                raise EngineError(f"transformers' continuous batching gave nothing for {_ANSWER_TIMEOUT_S:.0f} s")
            answer = live[output.request_id]
            answer.error = output.error or ""
            if len(output.generated_tokens) > answer.completion_tokens:
                answer.stamps.append(time.perf_counter())
                answer.completion_tokens = len(output.generated_tokens)
            if output.is_finished():
                done.append(live.pop(output.request_id))
                fill()
        return Run(time.perf_counter() - began_s, tuple(done))

    def freeze(self, frozen: bool) -> None:
        """It has no process of its own, and does nothing when it is not asked."""

    async def close(self) -> None:
        if self._model is not None:
            await asyncio.to_thread(self._exit.close)
            self._model = self._manager = None


async def measure(options: argparse.Namespace, folder: Path) -> str:
    """Both engines in turns; returns Markdown."""
    from testkit.processes import ServiceProcess

    streams = tuple(int(number) for number in options.streams.split(","))
    plan = speed.Plan(streams, options.rounds, options.tokens)
    with tempfile.TemporaryDirectory(prefix="pressroom-bench-") as scratch:
        model = Path(scratch) / f"random-{options.shape}"
        size_bytes = await asyncio.to_thread(write_model, model, options.shape, options.store / peers.MODEL)
        peak = await asyncio.to_thread(copied_bytes_per_s, options.device)
        settings = {
            "ENGINE": "torch",
            "DEVICE": options.device,
            "MODEL_DIR": model,
            "NATS_URL": "nats://127.0.0.1:1",
            "KV_CACHE_MB": kv_cache_mb(options.shape, max(streams)),
            "MAX_RUNNING": max(streams),
            "MAX_WAITING": max(256, max(streams)),
            "MAX_STEP_TOKENS": 2048 if options.device == "cuda" else 128,
            "MAX_MIXED_PREFILL_TOKENS": 2048 if options.device == "cuda" else 64,
        }
        process = ServiceProcess("generator", settings)
        process.start_timeout_s = _START_TIMEOUT_S
        began_s = time.perf_counter()
        try:
            await asyncio.to_thread(process.start)
            ready_s = time.perf_counter() - began_s
            ours = Served(TORCH, GrpcClient(process.address, model.name), (), ready_s)
            engines: list[Engine] = [ours] if options.alone else [ours, TransformersBatching(model, options.device)]
            results = speed.Results(folder / f"gpu-{options.shape}.json")
            results.notes.append(f"{machine.describe()}; {device_name(options.device)}; {' '.join(sys.argv[1:])}")
            failed = await speed.measure(engines, plan, results, lambda line: print(line, file=sys.stderr, flush=True))
        finally:
            await asyncio.to_thread(process.close)
    one = figures.medians(results.levels).get((TORCH, 1))
    share = (
        ""
        if one is None
        else (
            f"- At 1 stream {one.tokens_per_s * size_bytes / 1e9:.1f} GB/s of weights are read, "
            f"{one.tokens_per_s * size_bytes / peak:.0%} of the {peak / 1e9:.0f} GB/s that a copy reaches (aim: 60%)\n"
        )
    )
    text = speed.report(results, plan, TORCH, "", [TRANSFORMERS]) + share
    return text + "".join(f"- {name} failed: {why}\n" for name, why in failed.items())


def device_name(device: str) -> str:
    """What the figures were measured on."""
    import torch

    return str(torch.cuda.get_device_name()) if device == "cuda" else "cpu"


def main(options: argparse.Namespace) -> int:
    """Returns the exit status."""
    import torch

    if options.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device: nothing is measured; --device cpu --shape tiny checks the path", file=sys.stderr)
        return 3
    folder = options.out or speed.results_folder(peers.ROOT / ".pressroom")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        text = asyncio.run(measure(options, folder))
    except EngineError as error:
        print(f"bench_engine: {error}", file=sys.stderr)
        return 1
    (folder / f"gpu-{options.shape}.md").write_text(text)
    print(text)
    return 1 if "failed" in text or "FAILED" in text else 0
