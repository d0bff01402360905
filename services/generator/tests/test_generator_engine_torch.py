"""The torch engine on a tiny random model: the contract, the forward pass against plain formulas, broken files."""

import json
from collections.abc import AsyncIterator
from pathlib import Path

import lora_files
import pytest
import tiny_llama
import torch
from engine_suite import EngineSuite, MakeAdapter, ask
from safetensors.torch import load_file

from chassis.errors import Code, PlatformError
from generator.backends.torch_runner import TorchRunner, make_runner
from generator.backends.torch_runner.runner import RunnerOptions
from generator.backends.toy import ByteTokenizer
from generator.core.batching import BatchingEngine
from generator.core.blocks import BlockManager
from generator.core.engine import OutOfMemory
from generator.core.scheduler import SchedulerLimits
from generator.core.sequences import Sequence, Work

OPTIONS = RunnerOptions(max_model_len=256, kv_cache_bytes=1 << 20, block_size=8, num_threads=1, dtype="fp32")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama.write(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def runner(folder: Path) -> TorchRunner:
    runner = make_runner(folder, OPTIONS, model_id="tiny", version="0" * 12)
    runner.warm_up()
    return runner


class TestTinyTorchEngine(EngineSuite):
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


def _reference(folder: Path, tokens: list[int]) -> torch.Tensor:
    """Log probabilities [T, V] by the formulas of the Llama paper, one head at a time, with no cache."""
    weights = {name: tensor.double() for name, tensor in load_file(folder / "model.safetensors").items()}
    size, num = 8, len(tokens)
    angles = torch.outer(torch.arange(num).double(), 10000.0 ** -(torch.arange(0, size, 2).double() / size))
    turn = torch.polar(torch.ones_like(angles), angles)

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weights[name]

    def rotate(x: torch.Tensor) -> torch.Tensor:
        turned = torch.complex(x[:, : size // 2], x[:, size // 2 :]) * turn
        return torch.cat([turned.real, turned.imag], dim=-1)

    x = weights["model.embed_tokens.weight"][tokens]
    for layer in range(2):
        at = f"model.layers.{layer}."
        h = norm(x, at + "input_layernorm.weight")
        q, k, v = (h @ weights[f"{at}self_attn.{n}_proj.weight"].T for n in "qkv")
        heads = []
        for head in range(6):
            mine, shared = slice(head * size, (head + 1) * size), slice(head // 3 * size, (head // 3 + 1) * size)
            scores = rotate(q[:, mine]) @ rotate(k[:, shared]).T / size**0.5
            scores = scores.masked_fill(torch.ones(num, num).triu(1).bool(), float("-inf"))
            heads.append(scores.softmax(-1) @ v[:, shared])
        x = x + torch.cat(heads, dim=-1) @ weights[at + "self_attn.o_proj.weight"].T
        h = norm(x, at + "post_attention_layernorm.weight")
        gate = torch.nn.functional.silu(h @ weights[at + "mlp.gate_proj.weight"].T)
        x = x + (gate * (h @ weights[at + "mlp.up_proj.weight"].T)) @ weights[at + "mlp.down_proj.weight"].T
    return (norm(x, "model.norm.weight") @ weights["model.embed_tokens.weight"].T).log_softmax(-1)


def test_paged_and_piecewise_equals_the_plain_formulas(folder: Path, runner: TorchRunner) -> None:
    """fp32 against float64: 1e-3 on log probabilities. Blocks lie out of order, pieces cut across them."""
    lists = [[(11 * i) % 250 for i in range(45)], [(3 * i + 1) % 250 for i in range(19)]]
    sequences = []
    for number, tokens in enumerate(lists):
        sequence = Sequence(ask(tuple(tokens), prompt_logprobs=0), 0, number, 0, 1)
        sequence.table = [20 - number, 3 + number, 40 - number, 8 + number, 30 - number, 60 + number]
        sequences.append(sequence)
    for pieces in ((10, 19), (1, 0), (20, 0), (14, 0)):
        step = [Work(s, n) for s, n in zip(sequences, pieces, strict=True) if n]
        for work, outcome in zip(step, runner.execute(step), strict=True):
            work.sequence.prompt_logprobs += outcome.prompt_logprobs
            work.sequence.num_computed = work.end
    for tokens, sequence in zip(lists, sequences, strict=True):
        expected = _reference(folder, tokens)[:-1].gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]
        found = [score.logprob for score in sequence.prompt_logprobs]
        assert found == pytest.approx(expected.tolist(), abs=1e-3)


def test_outcomes_come_in_the_order_of_the_step(runner: TorchRunner) -> None:
    requests = [ask((1, 2, 3)), ask((9,)), ask((4, 5, 6, 7))]

    def work(number: int) -> Work:
        sequence = Sequence(requests[number], 0, number, 0, 5)
        sequence.table = [number]
        return Work(sequence, len(requests[number].prompt_ids))

    alone = [runner.execute([work(number)])[0].tokens for number in range(3)]
    assert [o.tokens for o in runner.execute([work(n) for n in range(3)])] == alone
    assert [o.tokens for o in runner.execute([work(n) for n in (2, 0, 1)])] == [alone[n] for n in (2, 0, 1)]


def test_a_failed_allocation_is_out_of_memory(runner: TorchRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> torch.Tensor:
        return torch.empty(1 << 60)  # torch's own error for memory that the machine has not got

    monkeypatch.setattr(runner._llama, "forward", fail)
    sequence = Sequence(ask(), 0, 0, 0, 5)
    sequence.table = [0]
    with pytest.raises(OutOfMemory):
        runner.execute([Work(sequence, 5)])


def test_bf16_runs(folder: Path) -> None:
    options = RunnerOptions(max_model_len=128, kv_cache_bytes=1 << 19, block_size=8, num_threads=1, dtype="bf16")
    make_runner(folder, options, model_id="tiny", version="0" * 12).warm_up()


def _refusal(folder: Path) -> PlatformError:
    with pytest.raises(PlatformError) as raised:
        make_runner(folder, OPTIONS, model_id="tiny", version="0" * 12)
    return raised.value


def test_a_truncated_weights_file_is_refused(tmp_path: Path) -> None:
    path = tiny_llama.write(tmp_path) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    assert _refusal(tmp_path).code is Code.DATA_LOSS


def test_a_header_that_claims_exabytes_is_refused(tmp_path: Path) -> None:
    path = tiny_llama.write(tmp_path) / "model.safetensors"
    path.write_bytes((2**63 - 1).to_bytes(8, "little") + path.read_bytes()[8:])
    assert _refusal(tmp_path).code is Code.DATA_LOSS


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"hidden_size": 96}, Code.DATA_LOSS),
        ({"num_hidden_layers": 3}, Code.DATA_LOSS),
        ({"model_type": "gpt2"}, Code.FAILED_PRECONDITION),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1.0}}, Code.FAILED_PRECONDITION),
    ],
)
def test_a_config_that_does_not_fit_is_refused(tmp_path: Path, change: dict[str, object], code: Code) -> None:
    tiny_llama.write(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(tiny_llama.CONFIG | change))
    assert _refusal(tmp_path).code is code
