#!/usr/bin/env python3
"""What a finetune at low priority costs the chat: time per output token at one stream, alone and beside it.

usage: bench_colocation.py [--pairs N] [--tokens N] [--threads N] [--wait-policy PASSIVE|ACTIVE|none]

A generator process of its own answers; a child under chassis.priority.lower() trains LoRA on the same model. The child
is stopped (SIGSTOP) and goes on (SIGCONT) between answers, so that both sides of a pair meet the same machine. The
ratio is the median of the pairs' ratios. Steps per second of the child show that it did run.
"""

import argparse
import asyncio
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MODEL = "smollm2-135m-instruct"
PROMPT = "Describe how a printing press works, from the type case to the printed sheet. " * 6
STEP_TOKENS = (4, 128)


def train(model_dir: Path, threads: int) -> None:
    """The child: LoRA steps without end, a line on stdout for each."""
    from chassis import priority

    priority.lower()
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=8, target_modules="all-linear"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    tokens = torch.randint(0, model.config.vocab_size, STEP_TOKENS)
    while True:
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print("step", flush=True)


async def answer(stub, num_tokens: int) -> tuple[float, float]:
    """Returns seconds to the first token, and seconds between the tokens after it."""
    from pressroom.generator.v1 import generator_pb2 as pb

    request = pb.GenerateRequest(
        model=MODEL,
        text=PROMPT,
        sampling=pb.SamplingParams(temperature=0),
        stop=pb.StopParams(max_tokens=num_tokens, ignore_eos=True),
    )
    began, times, count = time.perf_counter(), [], 0
    async for message in stub.Generate(request, timeout=600):
        if message.HasField("delta"):
            times.append(time.perf_counter())
        if message.HasField("done"):
            count = message.done.usage.completion_tokens
    return times[0] - began, (times[-1] - times[0]) / (count - 1)


class Steps:
    """Counts the lines of the child without blocking."""

    def __init__(self, child: subprocess.Popen) -> None:
        self._file = child.stdout
        os.set_blocking(self._file.fileno(), False)

    def new(self) -> int:
        return (self._file.read() or b"").count(b"step")


async def measure(address: str, child: subprocess.Popen, pairs: int, num_tokens: int) -> None:
    from pressroom.generator.v1 import generator_pb2_grpc

    from chassis import rpc

    steps = Steps(child)
    while not steps.new():  # it has loaded and trains
        if child.poll() is not None:
            raise SystemExit(f"the child ended with {child.returncode}")
        await asyncio.sleep(0.5)
    rows: list[tuple[float, float, float, float]] = []
    num_steps, beside_s = 0, 0.0
    async with rpc.connect(address) as channel:
        stub = generator_pb2_grpc.GeneratorServiceStub(channel)
        await answer(stub, 8)
        for number in range(pairs):
            found: dict[bool, tuple[float, float]] = {}
            for beside in (False, True) if number % 2 else (True, False):
                child.send_signal(signal.SIGCONT if beside else signal.SIGSTOP)
                await asyncio.sleep(0.3)
                steps.new()
                began = time.perf_counter()
                found[beside] = await answer(stub, num_tokens)
                if beside:
                    num_steps, beside_s = num_steps + steps.new(), beside_s + time.perf_counter() - began
            rows.append((*found[False], *found[True]))
            alone, beside_ms = found[False][1] * 1e3, found[True][1] * 1e3
            print(f"pair {number + 1}: TPOT alone {alone:.1f} ms, beside {beside_ms:.1f} ms, x{beside_ms / alone:.2f}")
        child.send_signal(signal.SIGCONT)
        steps.new()
        await asyncio.sleep(8)
        idle_rate = steps.new() / 8
    ttft, tpot, ttft_beside, tpot_beside = (statistics.median(column) for column in zip(*rows, strict=True))
    ratio = statistics.median(row[3] / row[1] for row in rows)
    print(f"prompt {len(PROMPT)} characters, {num_tokens} tokens out, one stream, {pairs} interleaved pairs, medians")
    print(f"TTFT alone {ttft * 1e3:.0f} ms, beside {ttft_beside * 1e3:.0f} ms")
    print(f"TPOT alone {tpot * 1e3:.1f} ms, beside {tpot_beside * 1e3:.1f} ms: ratio {ratio:.2f}")
    print(f"training: {num_steps / beside_s:.2f} steps/s beside the chat, {idle_rate:.2f} without it")
    if not idle_rate:
        print("the child made no step even without the chat: others hold the cores, and this ratio proves nothing")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1), help="of chat and training each")
    parser.add_argument("--wait-policy", default="PASSIVE", help="OMP_WAIT_POLICY of the generator; none: unset")
    home = Path(os.environ.get("PRESSROOM_HOME", ROOT / ".pressroom"))
    parser.add_argument("--store", type=Path, default=home / "models")
    parser.add_argument("--train", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.train:
        train(options.store / MODEL, options.threads)
    return run(options)


def run(options: argparse.Namespace) -> int:
    from testkit.processes import ServiceProcess

    common = os.environ | {"OMP_NUM_THREADS": str(options.threads), "HF_HUB_OFFLINE": "1"}
    argv = [sys.executable, __file__, "--train", "--threads", str(options.threads), "--store", str(options.store)]
    os.environ |= common
    os.environ.pop("OMP_WAIT_POLICY", None)
    if options.wait_policy != "none":
        os.environ["OMP_WAIT_POLICY"] = options.wait_policy
    settings = {"MODEL_DIR": options.store / MODEL, "NATS_URL": "nats://127.0.0.1:1", "NUM_THREADS": options.threads}
    process = ServiceProcess("generator", settings)
    child = None
    try:
        process.start()
        child_env = common | {"OMP_WAIT_POLICY": "PASSIVE"}
        child = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=child_env)
        asyncio.run(measure(process.address, child, options.pairs, options.tokens))
    finally:
        if child is not None:
            child.kill()
            child.wait()
        process.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
