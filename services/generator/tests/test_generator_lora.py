"""Adapters in the torch runner, on a tiny Llama: beside peft's own forward and merge, mixed, preempted, and broken."""

import asyncio
import json
import struct
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import lora_files
import pytest
import tiny_llama
import torch
from engine_suite import PROMPTS, ask, collect
from safetensors.torch import load_file, save, save_file

from chassis.errors import Code, PlatformError
from generator.backends.lora_files import LoraShape, read_lora
from generator.backends.torch_runner import TorchRunner, make_runner
from generator.backends.torch_runner.runner import RunnerOptions
from generator.backends.toy import ByteTokenizer
from generator.core.adapters import AdapterFiles, AdapterLimits, AdapterWeights
from generator.core.batching import BatchingEngine
from generator.core.blocks import BlockManager
from generator.core.scheduler import SchedulerLimits
from generator.core.sequences import Sequence, Work

OPTIONS = RunnerOptions(max_model_len=256, kv_cache_bytes=1 << 20, block_size=8, num_threads=1, dtype="fp32")
BASE = "tiny"
TOKENS = [(11 * i + 5) % 250 for i in range(45)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama.write(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def runner(folder: Path) -> TorchRunner:
    return make_runner(folder, OPTIONS, model_id=BASE, version="0" * 12)


def _files(name: str, seed: int, **options: Any) -> AdapterFiles:
    return lora_files.files(f"{BASE}:{name}", tiny_llama.CONFIG, seed, **options)


def _sequence(adapter: AdapterWeights | None, tokens: list[int], number: int = 0) -> Sequence:
    sequence = Sequence(ask(tuple(tokens), prompt_logprobs=0, logprobs=0), 0, number, 0, 1, (), adapter)
    sequence.table = list(range(number * 8, number * 8 + 8))
    return sequence


def _scores(runner: TorchRunner, steps: list[list[Work]]) -> None:
    for step in steps:
        for work, outcome in zip(step, runner.execute(step), strict=True):
            work.sequence.prompt_logprobs += outcome.prompt_logprobs
            work.sequence.num_computed = work.end


def _prompt_logprobs(runner: TorchRunner, adapter: AdapterWeights | None) -> list[float]:
    sequence = _sequence(adapter, TOKENS)
    _scores(runner, [[Work(sequence, len(TOKENS))]])
    return [score.logprob for score in sequence.prompt_logprobs]


def _expected(model: Any) -> list[float]:
    with torch.inference_mode():
        logits = model(torch.tensor([TOKENS])).logits[0].log_softmax(-1)
    return [logits[i, token].item() for i, token in enumerate(TOKENS[1:])]


def _transformers_model(folder: Path) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(**{k: v for k, v in tiny_llama.CONFIG.items() if k != "model_type"}))
    model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
    model.tie_weights()
    return model.eval()


def _read_folder(folder: Path) -> AdapterFiles:
    content = (folder / "adapter_model.safetensors").read_bytes()
    spec = lora_files.spec(f"{BASE}:peft", content)
    return AdapterFiles(spec, (folder / "adapter_config.json").read_bytes(), content)


@pytest.mark.integration  # importing peft takes seconds
@pytest.mark.parametrize(
    "options",
    [
        {"r": 4, "lora_alpha": 8, "target_modules": list(lora_files.MODULES)},
        {"r": 3, "lora_alpha": 5, "use_rslora": True, "target_modules": ["k_proj", "up_proj"]},
        {
            "r": 8,
            "lora_alpha": 4,
            "target_modules": ["o_proj", "down_proj"],
            "layers_to_transform": [1],
            "lora_dropout": 0.3,
        },
        {
            "r": 4,
            "lora_alpha": 8,
            "target_modules": list(lora_files.MODULES),
            "rank_pattern": {"k_proj": 2, "^model.layers.1.self_attn.v_proj": 7, "layers.0.mlp.up_proj": 1},
            "alpha_pattern": {"1.mlp.gate_proj": 3, "k_proj": 5},
        },
    ],
    ids=["all modules", "rslora on parts of fused layers", "one layer", "ranks and alphas by module"],
)
def test_on_the_fly_equals_peft_and_the_merged_model(
    folder: Path, runner: TorchRunner, tmp_path: Path, options: dict[str, Any]
) -> None:
    """fp32 on all sides: 1e-3 on log probabilities, which the adapter itself moves by more than 0.1."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(11)
    model = _transformers_model(folder)
    assert _prompt_logprobs(runner, None) == pytest.approx(_expected(model), abs=1e-3)
    tuned = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **options)).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft looks for the base's config on the hub
        tuned.save_pretrained(tmp_path / "adapter")
    expected = _expected(tuned)

    found = _prompt_logprobs(runner, runner.read_adapter(_read_folder(tmp_path / "adapter")))
    assert found == pytest.approx(expected, abs=1e-3)
    assert max(abs(a - b) for a, b in zip(found, _prompt_logprobs(runner, None), strict=True)) > 0.1

    merged = tuned.merge_and_unload()
    names = load_file(folder / "model.safetensors")
    target = tiny_llama.write(tmp_path / "merged")
    save_file({name: merged.state_dict()[name].contiguous() for name in names}, target / "model.safetensors")
    merged_runner = make_runner(target, OPTIONS, model_id=BASE, version="0" * 12)
    assert found == pytest.approx(_prompt_logprobs(merged_runner, None), abs=1e-3)


def test_rows_of_the_base_keep_every_bit_beside_adapters(runner: TorchRunner) -> None:
    """The same step with and without adapters on the other rows: prompts, pieces and decodes."""
    adapters = [runner.read_adapter(_files(name, seed)) for seed, name in enumerate("ab")]

    def base_scores(others: list[AdapterWeights | None]) -> list[float]:
        base, first, second = (_sequence(a, TOKENS, n) for n, a in enumerate([None, *others]))
        steps = [
            [Work(first, 7), Work(base, 20), Work(second, 45)],
            [Work(base, 1), Work(first, 1)],
            [Work(first, 30), Work(base, 24)],
        ]
        _scores(runner, steps)
        return [score.logprob for score in base.prompt_logprobs]

    assert base_scores([*adapters]) == base_scores([None, None])


async def test_preempted_sequences_resume_with_their_own_adapters(runner: TorchRunner) -> None:
    ids = ["", *(f"{BASE}:{name}" for name in "abc")]
    requests = [ask(p, 90, adapter=ids[i % 4]) for i, p in enumerate(PROMPTS)]

    async def answers(num_blocks: int, together: bool) -> tuple[list[list[int]], int]:
        blocks = BlockManager(num_blocks, runner.block_size)
        engine = BatchingEngine(runner, ByteTokenizer(), blocks, SchedulerLimits())
        engine.start()
        for seed, adapter_id in enumerate(ids[1:]):
            await engine.load_adapter(_files(adapter_id.partition(":")[2], seed))
        if together:
            found = await asyncio.gather(*(collect(engine, request) for request in requests))
        else:
            found = [await collect(engine, request) for request in requests]
        num_preemptions = engine.stats().preemptions_total
        await engine.close()
        return [got.tokens[0] for got in found], num_preemptions

    alone, none = await answers(runner.num_blocks, together=False)
    tight, some = await answers(33, together=True)
    assert tight == alone and none == 0 < some


async def test_an_evicted_adapter_answers_the_same_when_it_is_loaded_again(runner: TorchRunner) -> None:
    """Four adapters where two fit, asked for in turn, with and without the prefix cache's help."""
    ids = [f"{BASE}:{name}" for name in "abcd"]
    files = {adapter_id: _files(adapter_id[-1], seed) for seed, adapter_id in enumerate(ids)}
    size_bytes = runner.read_adapter(files[ids[0]]).size_bytes
    blocks = BlockManager(runner.num_blocks, runner.block_size)
    limits = AdapterLimits(max_adapters=8, max_bytes=2 * size_bytes)
    engine = BatchingEngine(runner, ByteTokenizer(), blocks, SchedulerLimits(), limits)
    engine.start()
    answers: dict[str, list[list[int]]] = {adapter_id: [] for adapter_id in ids}
    for _ in range(2):
        for adapter_id in ids:
            await engine.load_adapter(files[adapter_id])
            answers[adapter_id].append((await collect(engine, ask(PROMPTS[2], 20, adapter=adapter_id))).tokens[0])
    stats = engine.stats()
    await engine.close()
    assert all(first == again for first, again in answers.values())
    assert len({tuple(first) for first, _ in answers.values()}) == 4
    assert (stats.loaded_adapters, stats.adapter_bytes, stats.adapter_evictions_total) == (2, 2 * size_bytes, 6)


def test_bf16_stays_near_fp32(folder: Path, runner: TorchRunner) -> None:
    """bf16 has 8 bits: a mean of 0.1 on log probabilities, where the adapter moves them by ten times that."""
    files = _files("a", 1)
    half = make_runner(folder, replace(OPTIONS, dtype="bf16"), model_id=BASE, version="0" * 12)
    exact = _prompt_logprobs(runner, runner.read_adapter(files))
    found = _prompt_logprobs(half, half.read_adapter(files))
    assert sum(abs(a - b) for a, b in zip(found, exact, strict=True)) / len(exact) < 0.1


def test_memory_is_told_and_is_that_of_the_fused_parts(runner: TorchRunner) -> None:
    adapter = runner.read_adapter(_files("a", 1, rank=4, modules=("q_proj", "v_proj")))
    query, kv = 48, 16
    assert adapter.size_bytes == 2 * 4 * (8 * 48 + (query + 2 * kv) * 8)  # 2 layers, floats, A and B


# What is refused.


def _refusal(runner: TorchRunner, files: AdapterFiles) -> PlatformError:
    with pytest.raises(PlatformError) as raised:
        runner.read_adapter(files)
    assert not raised.value.retryable and files.spec.id in raised.value.message
    return raised.value


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "lora_only"}, "lora_only"),
        ({"lora_bias": True}, "lora_bias"),
        ({"peft_type": "IA3"}, "IA3"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"rank_pattern": {"(a+)+$": 8}}, "rank_pattern"),  # an expression that never ends
        ({"alpha_pattern": {"": 8}}, "alpha_pattern"),
        ({"rank_pattern": {"q_proj": 100_000}}, "rank"),
        ({"use_rslora": True, "alpha_pattern": {"q_proj": 8}}, "use_rslora"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
        ({"target_parameters": ["x"]}, "target_parameters"),
        ({"init_lora_weights": "pissa"}, "pissa"),
        ({"init_lora_weights": ["x"]}, "init_lora_weights"),
        ({"something_of_next_year": {"on": 1}}, "something_of_next_year"),
        ({"r": 0}, "rank"),
        ({"r": 100_000}, "rank"),
        ({"r": True}, "rank"),
    ],
)
def test_what_the_runner_cannot_apply_is_refused_by_name(
    runner: TorchRunner, fields: dict[str, Any], word: str
) -> None:
    files = _files("a", 1)
    config = json.dumps(json.loads(files.config) | fields).encode()
    error = _refusal(runner, replace(files, config=config))
    assert error.code is Code.INVALID_ARGUMENT and word in error.message


def _huge_header(content: bytes) -> bytes:
    return struct.pack("<Q", 2**63 - 1) + content[8:]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda content: b"",
        lambda content: content[:-100],
        lambda content: b"\x80\x04junk" * 20,  # a pickle
        _huge_header,
    ],
    ids=["empty", "cut", "pickle", "exabytes"],
)
def test_a_tensor_file_that_is_not_whole_is_damage(runner: TorchRunner, spoil: Any) -> None:
    files = _files("a", 1)
    assert _refusal(runner, replace(files, tensors=spoil(files.tensors))).code is Code.DATA_LOSS


@pytest.mark.parametrize("config", [b"", b"{", b"[]", b"\xff", b"[" * 100_000, b'{"peft_type":"LORA","r":4}'])
def test_a_configuration_that_is_none_is_damage(runner: TorchRunner, config: bytes) -> None:
    assert _refusal(runner, replace(_files("a", 1), config=config)).code is Code.DATA_LOSS


@pytest.mark.parametrize(
    "fields", [{"rank_pattern": ["q_proj"]}, {"alpha_pattern": {"q_proj": "8"}}, {"alpha_pattern": {"q_proj": 1e400}}]
)
def test_a_pattern_that_is_none_is_damage(runner: TorchRunner, fields: dict[str, Any]) -> None:
    files = _files("a", 1)
    config = json.dumps(json.loads(files.config) | fields).encode()
    assert _refusal(runner, replace(files, config=config)).code is Code.DATA_LOSS


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_every_floating_type_is_read_exactly_and_the_scale_is_in_b(dtype: torch.dtype) -> None:
    """Powers of two as scale: products are exact, so equal means equal bits."""
    tensors = {name: tensor.to(dtype) for name, tensor in lora_files.tensors(tiny_llama.CONFIG, 1).items()}
    config = lora_files.config_json(4, alpha=8.0)
    shape = LoraShape(num_layers=2, hidden_size=48, inner_size=96, query_size=48, kv_size=16)
    layers = read_lora(AdapterFiles(lora_files.spec(f"{BASE}:a"), config, save(tensors)), shape)
    for number, layer in enumerate(layers):
        for module, parent in lora_files.MODULES.items():
            pair = layer[module.removesuffix("_proj")]
            name = f"base_model.model.model.layers.{number}.{parent}.{module}"
            assert pair.a.dtype == pair.b.dtype == "float32"
            assert (pair.a == tensors[f"{name}.lora_A.weight"].float().numpy()).all()
            assert (pair.b == 2 * tensors[f"{name}.lora_B.weight"].float().numpy()).all()


Q = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("change", "code", "word"),
    [
        ({"base_model.model.lm_head.lora_A.weight": torch.zeros(4, 48)}, Code.INVALID_ARGUMENT, "lm_head"),
        ({Q + ".lora_magnitude_vector": torch.zeros(48)}, Code.INVALID_ARGUMENT, "magnitude"),
        ({Q.replace("self_attn", "mlp") + ".lora_A.weight": torch.zeros(4, 48)}, Code.INVALID_ARGUMENT, "mlp.q_proj"),
        ({Q + ".lora_A.weight": torch.zeros(5, 48)}, Code.DATA_LOSS, "(5, 48)"),
        ({Q + ".lora_B.weight": torch.zeros(4, 48)}, Code.DATA_LOSS, "(4, 48)"),
        ({Q + ".lora_B.weight": torch.zeros(48, 4, dtype=torch.int8)}, Code.INVALID_ARGUMENT, "int8"),
        ({Q + ".lora_A.weight": torch.full((4, 48), torch.nan)}, Code.DATA_LOSS, "finite"),
        ({Q + ".lora_B.weight": torch.full((48, 4), torch.inf)}, Code.DATA_LOSS, "finite"),
        ({Q.replace("0", "7") + ".lora_A.weight": torch.zeros(4, 48)}, Code.DATA_LOSS, "layer"),
        ({Q + ".lora_A.weight": None}, Code.DATA_LOSS, "only one"),
    ],
)  # fmt: skip
def test_a_tensor_out_of_place_is_refused(
    runner: TorchRunner, change: dict[str, torch.Tensor | None], code: Code, word: str
) -> None:
    changed = lora_files.tensors(tiny_llama.CONFIG, 1) | change
    content = save({name: tensor for name, tensor in changed.items() if tensor is not None})
    error = _refusal(runner, replace(_files("a", 1), tensors=content))
    assert error.code is code and word in error.message
