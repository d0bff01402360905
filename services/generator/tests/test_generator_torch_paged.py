"""The torch runner's way on a GPU, on the CPU: paged decoding, fixed batch sizes, picking where the logits lie.

What a GPU adds is the capture of the same code and the Triton kernel; the kernel's arithmetic is tested in Triton's
interpreter where Triton is installed.
"""

import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import lora_files
import numpy as np
import pytest
import tiny_llama
import torch
from engine_suite import EngineSuite, MakeAdapter, ask
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from chassis.errors import Code, PlatformError
from generator.backends.torch_runner import RunnerOptions, TorchRunner, make_runner, pick
from generator.backends.torch_runner.decode import DecodeBuckets, bucket_sizes
from generator.backends.torch_runner.devices import pick_device, pick_dtype
from generator.backends.torch_runner.paged import attend_plainly
from generator.backends.torch_runner.random_model import SHAPES, make_random, num_weights
from generator.backends.toy import ByteTokenizer
from generator.core import sampling
from generator.core.batching import BatchingEngine
from generator.core.blocks import BlockManager
from generator.core.engine import OutOfMemory
from generator.core.requests import SamplingParams
from generator.core.scheduler import SchedulerLimits
from generator.core.sequences import Sequence, Work

GATHERED = RunnerOptions(max_model_len=256, kv_cache_bytes=1 << 20, block_size=8, num_threads=1, dtype="fp32")
PAGED = replace(GATHERED, decode="paged", max_sequences=8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama.write(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def runner(folder: Path) -> TorchRunner:
    runner = make_runner(folder, PAGED, model_id="tiny", version="0" * 12)
    runner.warm_up()
    return runner


class TestPagedTorchEngine(EngineSuite):
    REPEAT_TOLERANCE = 1e-4  # a matrix product of five rows rounds otherwise than one of a single row

    @pytest.fixture
    def make_adapter(self) -> MakeAdapter:
        return lambda adapter_id, seed: lora_files.files(adapter_id, tiny_llama.CONFIG, seed)

    @pytest.fixture
    async def engine(self, runner: TorchRunner) -> AsyncIterator[BatchingEngine]:
        blocks = BlockManager(runner.num_blocks, runner.block_size)
        engine = BatchingEngine(runner, ByteTokenizer(), blocks, SchedulerLimits(max_mixed_prefill_tokens=32))
        engine.start()
        yield engine
        await engine.close()


def _decoding(runner: TorchRunner, num: int, sampling_params: SamplingParams, **fields: object) -> list[Work]:
    """Works of one token each over prompts of different lengths that were computed in blocks out of order."""
    works = []
    for number in range(num):
        prompt = tuple((5 * number + 3 * i) % 250 for i in range(3 + 7 * number))
        sequence = Sequence(ask(prompt, sampling=sampling_params, **fields), 0, number, number, 5)
        sequence.table = [(11 * (number * 8 + i)) % 97 for i in range(-(-len(prompt) // runner.block_size))]
        if len(prompt) > 1:
            runner.execute([Work(sequence, len(prompt) - 1)])
        sequence.num_computed = len(prompt) - 1
        works.append(Work(sequence, 1))
    return works


@pytest.mark.parametrize("num", [1, 2, 3, 5, 8, 9])
def test_a_padded_batch_equals_the_plain_path(folder: Path, runner: TorchRunner, num: int) -> None:
    """fp32 on both sides: 1e-4 on log probabilities. 9 is more than the largest bucket: it runs unpadded."""
    plain = make_runner(folder, GATHERED, model_id="tiny", version="0" * 12)
    found, expected = (
        r.execute(_decoding(r, num, SamplingParams(temperature=0.0), logprobs=3)) for r in (runner, plain)
    )
    assert [o.tokens[0].token_id for o in found] == [o.tokens[0].token_id for o in expected]
    for one, other in zip(found, expected, strict=True):
        assert one.tokens[0].logprob is not None and other.tokens[0].logprob is not None
        assert one.tokens[0].logprob.logprob == pytest.approx(other.tokens[0].logprob.logprob, abs=1e-4)


def test_padding_writes_into_no_block_of_anybody(runner: TorchRunner) -> None:
    runner._llama._cache.zero_()  # or what tests before wrote would be written again, unseen
    works = _decoding(runner, 5, SamplingParams(temperature=0.0))
    caches = runner._llama._cache.clone()
    runner.execute(works)
    changed = (runner._llama._cache != caches).any(dim=-1).any(dim=0)  # [2 * H_kv * S]
    slots = set((changed.nonzero()[:, 0] % (runner._llama.num_blocks * runner.block_size)).tolist())
    own = {w.sequence.table[(w.end - 1) // 8] * 8 + (w.end - 1) % 8 for w in works}
    spare = set(range(runner.num_blocks * 8, (runner.num_blocks + 1) * 8))
    assert own <= slots and slots - own <= spare


def test_a_step_after_a_bigger_one_sees_none_of_its_rows(runner: TorchRunner) -> None:
    works = _decoding(runner, 8, SamplingParams(temperature=0.0), logprobs=0)
    alone = runner.execute(works[:3])
    runner.execute(works)
    assert runner.execute(works[:3]) == alone


def test_only_plain_decoding_goes_through_the_buckets(runner: TorchRunner) -> None:
    buckets = runner._buckets
    assert isinstance(buckets, DecodeBuckets) and bucket_sizes(8) == [1, 2, 4, 8] and bucket_sizes(5)[-1] == 8
    works = _decoding(runner, 3, SamplingParams(temperature=0.0))
    assert buckets.fits(works) and not buckets.fits([*works, *works, *works])
    assert not buckets.fits([works[0], Work(works[1].sequence, 1, drafts=(5,))])
    tuned = works[2].sequence
    tuned.adapter = runner.read_adapter(lora_files.files("tiny:a", tiny_llama.CONFIG, 1))
    assert not buckets.fits(works)


def test_attention_out_of_the_cache_equals_attention_over_a_copy() -> None:
    """Lengths within a block, at its end and past it; float64 by the formula, 1e-5."""
    torch.manual_seed(3)
    num_kv_heads, group, size, block_size, num_blocks = 2, 3, 8, 4, 40
    cache = torch.randn(2 * num_kv_heads * num_blocks * block_size, size)
    query = torch.randn(4, num_kv_heads * group, size)
    lengths, tables = torch.tensor([1, 4, 5, 23], dtype=torch.int32), torch.randperm(40)[:24].view(4, 6).int()
    found = attend_plainly(query, cache, tables, lengths, block_size, num_blocks * block_size)
    heads = cache.double().view(2, num_kv_heads, num_blocks, block_size, size)
    for row, length in enumerate(lengths.tolist()):
        for head in range(num_kv_heads * group):
            keys, values = (
                heads[part, head // group, tables[row].long()].reshape(-1, size)[:length] for part in (0, 1)
            )
            weights = (keys @ query[row, head].double() / size**0.5).softmax(0)
            assert found[row, head].double().numpy() == pytest.approx((weights @ values).numpy(), abs=1e-5)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="the CPU build of torch comes without Triton")
def test_the_triton_kernel_equals_the_plain_one_in_its_interpreter() -> None:
    """In a process of its own: the interpreter is chosen at Triton's import. float32 and float16, 1e-5 and 2e-3."""
    script = Path(__file__).with_name("triton_interpreted.py")
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


def test_picking_on_the_device_equals_picking_on_the_host() -> None:
    random = np.random.default_rng(7)
    logits = (random.standard_normal((40, 300)) * 3).astype(np.float32)
    kinds = (SamplingParams(temperature=0.0), SamplingParams(temperature=0.3), SamplingParams(temperature=1.7))
    rows = [sampling.Row(Sequence(ask(sampling=kinds[i % 3]), 0, 0, 1000 + i, 5)) for i in range(40)]
    assert all(pick.is_plain(row) for row in rows)
    assert pick.pick(torch.from_numpy(logits.copy()), rows) == sampling.sample(logits.copy(), rows)


@pytest.mark.parametrize(
    "fields",
    [
        {"sampling": SamplingParams(top_p=0.9)},
        {"sampling": SamplingParams(top_k=5)},
        {"sampling": SamplingParams(min_p=0.1)},
        {"sampling": SamplingParams(temperature=0.0, logit_bias={5: 1.0})},
        {"sampling": SamplingParams(temperature=0.0, repetition_penalty=1.1)},
        {"logprobs": 0},
    ],
)
def test_what_needs_more_than_its_logits_is_picked_on_the_host(fields: dict[str, object]) -> None:
    assert not pick.is_plain(sampling.Row(Sequence(ask(**fields), 0, 0, 1, 5)))


def test_a_tiny_temperature_is_greedy_on_the_device_too() -> None:
    logits = torch.randn(3, 50)
    rows = [sampling.Row(Sequence(ask(sampling=SamplingParams(temperature=1e-6)), 0, 0, i, 5)) for i in range(3)]
    assert pick.pick(logits.clone(), rows) == logits.argmax(1).tolist()


def test_a_gpus_out_of_memory_is_the_engines(runner: TorchRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(runner._llama, "forward", fail)
    works = _decoding_one()
    with pytest.raises(OutOfMemory):
        runner.execute(works)


def _decoding_one() -> list[Work]:
    sequence = Sequence(ask((1,)), 0, 0, 0, 5)
    sequence.table = [0]
    return [Work(sequence, 1)]


def test_a_gpu_that_is_not_there_is_said() -> None:
    assert pick_device("cpu").type == "cpu" and pick_dtype("auto", torch.device("cuda")) is torch.bfloat16
    if not torch.cuda.is_available():
        assert pick_device("auto").type == "cpu"
        with pytest.raises(PlatformError) as raised:
            pick_device("cuda")
        assert raised.value.code is Code.FAILED_PRECONDITION and "GENERATOR_DEVICE" in raised.value.message


def test_a_random_model_runs_and_the_shapes_are_of_their_names() -> None:
    small = replace(SHAPES["1b"], hidden_size=64, intermediate_size=96, num_layers=2, vocab_size=300, num_heads=4,
                    num_kv_heads=2, head_dim=16)  # fmt: skip
    runner = make_random(small, replace(PAGED, dtype="bf16"))
    runner.warm_up()
    (outcome,) = runner.execute(_decoding_one())
    assert 0 <= outcome.tokens[0].token_id < 300
    assert 1.2e9 < num_weights(SHAPES["1b"]) < 1.6e9 and 6.5e9 < num_weights(SHAPES["7b"]) < 7.0e9


# More shapes of Llama, held to transformers.

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def _write_shards(folder: Path) -> None:
    """Splits the one file of a folder in two with an index, as big models come."""
    whole = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(whole)
    halves = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, mine in halves.items():
        save_file({name: whole[name] for name in mine}, folder / file, metadata={"format": "pt"})
    weight_map = {name: file for file, mine in halves.items() for name in mine}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.mark.parametrize(("is_tied", "is_split"), [(False, False), (True, True), (False, True)])
def test_scaled_rope_an_untied_head_and_shards_equal_transformers(
    tmp_path: Path, is_tied: bool, is_split: bool
) -> None:
    """fp32 on both sides over 150 tokens, past the original context of 32: 1e-3 on log probabilities."""
    config = tiny_llama.CONFIG | {"rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": is_tied}
    tiny_llama.write(tmp_path, config | {"architectures": ["LlamaForCausalLM"]})
    if not is_tied:
        tensors = load_file(tmp_path / "model.safetensors")
        tensors["lm_head.weight"] = torch.randn(257, 48, generator=torch.Generator().manual_seed(9))
        save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    if is_split:
        _write_shards(tmp_path)
    prompt = [(11 * i) % 250 for i in range(150)]
    reference = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    with torch.inference_mode():
        logprobs = reference(torch.tensor([prompt])).logits[0].log_softmax(-1)
    expected = logprobs[:-1].gather(1, torch.tensor(prompt[1:])[:, None])[:, 0].tolist()
    runner = make_runner(tmp_path, GATHERED, model_id="tiny", version="0" * 12)
    sequence = Sequence(ask(tuple(prompt), prompt_logprobs=0), 0, 0, 0, 1)
    sequence.table = list(range(20))
    (outcome,) = runner.execute([Work(sequence, 150)])
    assert [score.logprob for score in outcome.prompt_logprobs] == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("damage", ["no shard", "cut shard", "exabytes", "missing tensor", "outside", "no index"])
def test_damaged_shards_are_told_at_once(tmp_path: Path, damage: str) -> None:
    _write_shards(tiny_llama.write(tmp_path))
    shard, index = tmp_path / "model-00002-of-00002.safetensors", tmp_path / "model.safetensors.index.json"
    raw = json.loads(index.read_text())
    match damage:
        case "no shard":
            shard.unlink()
        case "cut shard":
            shard.write_bytes(shard.read_bytes()[:-500])
        case "exabytes":
            shard.write_bytes((2**63 - 1).to_bytes(8, "little") + shard.read_bytes()[8:])
        case "missing tensor":
            raw["weight_map"].pop("model.norm.weight")
        case "outside":
            raw["weight_map"]["model.norm.weight"] = "../model.safetensors"
        case "no index":
            index.unlink()
    if damage in ("missing tensor", "outside"):
        index.write_text(json.dumps(raw))
    began_s = time.monotonic()
    with pytest.raises(PlatformError) as raised:
        make_runner(tmp_path, GATHERED, model_id="tiny", version="0" * 12)
    assert raised.value.code is Code.DATA_LOSS and time.monotonic() - began_s < 1.0
