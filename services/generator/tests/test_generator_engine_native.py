"""The native engine: the contract on a tiny random model, and the kernels against the torch runner."""

from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path

import lora_files
import numpy as np
import pytest
import tiny_llama
from engine_suite import EngineSuite, MakeAdapter
from safetensors.numpy import load_file, save_file

from chassis.errors import Code, PlatformError
from generator.backends import native_runner, torch_runner
from generator.backends.native_runner import NativeRunner
from generator.backends.native_runner.library import BUILDS_DIR, Draw, load_library
from generator.backends.native_runner.runner import Activations
from generator.backends.native_runner.weights import load_pack, load_shape, matrix_sizes
from generator.backends.toy import ByteTokenizer
from generator.core import sampling
from generator.core.batching import BatchingEngine
from generator.core.blocks import BlockManager
from generator.core.requests import GenerationRequest, SamplingParams
from generator.core.scheduler import SchedulerLimits
from generator.core.sequences import Outcome, Sequence, Work
from modelstore.packing import pack_model, pack_name, unpack_matrix

OPTIONS = native_runner.RunnerOptions(
    max_model_len=256, kv_cache_bytes=1 << 20, num_threads=2, max_step_tokens=256, max_sequences=64
)
RNG = np.random.default_rng(3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny_llama.write(tmp_path_factory.mktemp("tiny"), tiny_llama.NATIVE_CONFIG)
    pack_model(folder, folder / pack_name("int4"), "int4")
    return folder


@pytest.fixture(scope="module", params=["mixed", "int16"])
def runner(folder: Path, request: pytest.FixtureRequest) -> Iterator[NativeRunner]:
    options = replace(OPTIONS, activations=request.param)
    runner = native_runner.make_runner(folder, options, model_id="tiny", version="0" * 12)
    runner.warm_up()
    yield runner
    runner.close()


class TestTinyNativeEngine(EngineSuite):
    # mixed reads a prompt's tokens with 8 bits in places, and those that it sampled with 15; random weights
    # show it more than those of a real model.
    SCORE_TOLERANCE = 0.3

    @pytest.fixture
    def make_adapter(self) -> MakeAdapter:
        return lambda adapter_id, seed: lora_files.files(adapter_id, tiny_llama.NATIVE_CONFIG, seed)

    @pytest.fixture
    async def engine(self, runner: NativeRunner) -> AsyncIterator[BatchingEngine]:
        blocks = BlockManager(runner.num_blocks, runner.block_size)
        engine = BatchingEngine(runner, ByteTokenizer(), blocks, SchedulerLimits(max_mixed_prefill_tokens=32))
        engine.start()
        yield engine
        await engine.close()


def _sequence(tokens: list[int], first_block: int, **fields: object) -> Sequence:
    sequence = Sequence(GenerationRequest("r", tuple(tokens), SamplingParams(temperature=0.0), **fields), 0, 0, 0, 8)  # type: ignore[arg-type]
    sequence.table = [first_block + i for i in range(-(-(len(tokens) + 8) // 16))]
    return sequence


def _scores(outcome: Outcome) -> list[float]:
    return [score.logprob for score in outcome.prompt_logprobs]


@pytest.mark.parametrize(
    ("activations", "mean", "most"), [("int8", 0.15, 0.8), ("mixed", 0.1, 0.5), ("int16", 0.005, 0.03)]
)
def test_log_probabilities_are_those_of_the_unpacked_weights_in_float32(
    folder: Path, tmp_path: Path, activations: Activations, mean: float, most: float
) -> None:
    """Rounded activations are all that may differ: the torch runner gets the very weights that the kernels read."""
    shape = load_shape(folder)
    pack = load_pack(folder / pack_name("int4"), shape)
    dense = load_file(folder / "model.safetensors")
    dense["model.embed_tokens.weight"] = unpack_matrix(pack.arrays["embedding"], "int8", shape.vocab_size)
    names = {"output": "self_attn.o_proj", "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj"}
    for layer in range(shape.num_layers):
        at = f"model.layers.{layer}."
        for name, leaf in names.items():
            rows = matrix_sizes(shape)[name][0]
            dense[f"{at}{leaf}.weight"] = unpack_matrix(pack.arrays[f"layers.{layer}.{name}"], "int4", rows)
        qkv = unpack_matrix(pack.arrays[f"layers.{layer}.qkv"], "int4", matrix_sizes(shape)["qkv"][0])
        sizes = (192, 64, 64)
        for name, rows in zip("qkv", np.split(qkv, np.cumsum(sizes)[:2]), strict=True):
            dense[f"{at}self_attn.{name}_proj.weight"] = np.ascontiguousarray(rows)
    save_file(dense, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    plain = torch_runner.runner.RunnerOptions(
        max_model_len=256, kv_cache_bytes=1 << 20, block_size=16, num_threads=1, dtype="fp32"
    )
    reference = torch_runner.make_runner(tmp_path, plain, model_id="t", version="0" * 12)
    options = replace(OPTIONS, activations=activations)
    native = native_runner.make_runner(folder, options, model_id="t", version="0" * 12)
    tokens = RNG.integers(0, 256, 70).tolist()
    works = [Work(_sequence(tokens, 0, prompt_logprobs=0), 70) for _ in range(2)]
    (ours,), (theirs,) = native.execute(works[:1]), reference.execute(works[1:])
    native.close()
    difference = np.abs(np.array(_scores(ours)) - np.array(_scores(theirs)))
    assert len(difference) == 69
    assert difference.mean() < mean and difference.max() < most


def test_a_token_is_computed_bit_for_bit_alike_in_every_batch(runner: NativeRunner) -> None:
    """Whole, in chunks, beside others, and over blocks elsewhere: what caching and speculation rely on."""
    tokens = RNG.integers(0, 256, 60).tolist()
    (whole,) = runner.execute([Work(_sequence(tokens, 0, prompt_logprobs=0), 60)])
    chunked = _sequence(tokens, 10, prompt_logprobs=0)
    scores: list[float] = []
    for number, size in enumerate((1, 16, 7, 36)):
        others = [Work(_sequence(RNG.integers(0, 256, 9 + i).tolist(), 20 + 2 * i), 9 + i) for i in range(number)]
        outcome = runner.execute([*others, Work(chunked, size)])[-1]
        chunked.num_computed += size
        scores += _scores(outcome)
        chunked.prompt_logprobs.extend(outcome.prompt_logprobs)
    assert scores == _scores(whole)
    assert outcome.tokens == whole.tokens


def test_the_number_of_threads_changes_no_bit(folder: Path) -> None:
    tokens = RNG.integers(0, 256, 50).tolist()
    answers = []
    for num_threads in (1, 3):
        options = replace(OPTIONS, num_threads=num_threads)
        native = native_runner.make_runner(folder, options, model_id="t", version="0" * 12)
        (outcome,) = native.execute([Work(_sequence(tokens, 0, prompt_logprobs=0), 50)])
        native.close()
        answers.append(_scores(outcome))
    assert answers[0] == answers[1]


def test_drafts_are_kept_up_to_the_first_wrong_one(runner: NativeRunner) -> None:
    tokens = RNG.integers(0, 256, 20).tolist()
    plain = _sequence(tokens, 0)
    greedy: list[int] = []
    for _ in range(4):
        outcome = runner.execute([Work(plain, len(plain.token_ids) - plain.num_computed)])[0]
        plain.num_computed = len(plain.token_ids)
        greedy.append(outcome.tokens[0].token_id)
        plain.token_ids.append(greedy[-1])
    drafted = _sequence(tokens, 8)
    wrong = (greedy[2] + 1) % 256
    (outcome,) = runner.execute([Work(drafted, 20, (greedy[0], greedy[1], wrong))])
    assert [token.token_id for token in outcome.tokens] == greedy[:3]


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=0.7),
        SamplingParams(temperature=1.3, top_p=0.9),
        SamplingParams(temperature=1.0, top_k=5),
        SamplingParams(temperature=0.9, top_k=40, top_p=0.5),
        SamplingParams(temperature=1.0, min_p=0.1),
        SamplingParams(temperature=0.01, top_p=0.95),
        SamplingParams(temperature=2.0, top_p=0.999),
    ],
)
def test_drawing_is_that_of_the_numpy_sampler(runner: NativeRunner, params: SamplingParams) -> None:
    logits = (RNG.standard_normal((200, tiny_llama.NATIVE_CONFIG["vocab_size"])) * 3).astype(np.float32)
    logits[:, 7] = -np.inf
    rows = [sampling.Row(Sequence(GenerationRequest("r", (1,), params), 0, 0, seed, 8)) for seed in range(200)]
    draws = [
        Draw(
            logits=values.ctypes.data,
            temperature=params.temperature,
            top_p=params.top_p,
            min_p=params.min_p,
            top_k=params.top_k,
            uniform=sampling.uniform(row.sequence.seed, 0, 0),
        )
        for values, row in zip(logits, rows, strict=True)
    ]
    ours = runner._native.draw(draws).tolist()
    assert 7 not in ours
    # The two exponentials differ in the last bit, so a draw on the edge of two tokens may fall to the other.
    assert sum(a != b for a, b in zip(ours, sampling.draw(logits.copy(), rows), strict=True)) <= 1


def test_both_builds_give_the_same_log_probabilities(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the processor can run of them: integers are exact, and sums are taken in one order."""
    tokens = RNG.integers(0, 256, 40).tolist()
    answers = []
    for build in ("avx512", "avx2"):
        library = BUILDS_DIR / f"libpressroom-{build}.so"
        if not library.is_file():
            continue
        alone = folder / build
        alone.mkdir()
        (alone / library.name).write_bytes(library.read_bytes())
        try:
            loaded = load_library(alone)
        except PlatformError:
            continue
        monkeypatch.setattr("generator.backends.native_runner.model.load_library", lambda found=loaded: found)
        native = native_runner.make_runner(folder, OPTIONS, model_id="t", version="0" * 12)
        (outcome,) = native.execute([Work(_sequence(tokens, 0, prompt_logprobs=0), 40)])
        native.close()
        answers.append(_scores(outcome))
    assert answers and all(answer == pytest.approx(answers[0], abs=1e-4) for answer in answers)


@pytest.mark.parametrize("damage", ["truncated", "2^63 bytes of header", "another shape", "no pack"])
def test_damaged_weights_are_an_error_and_no_crash(folder: Path, tmp_path: Path, damage: str) -> None:
    for name in ("config.json", pack_name("int4")):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    pack = tmp_path / pack_name("int4")
    match damage:
        case "truncated":
            pack.write_bytes(pack.read_bytes()[:-100])
        case "2^63 bytes of header":
            pack.write_bytes((2**63).to_bytes(8, "little") + pack.read_bytes()[8:])
        case "another shape":
            text = (tmp_path / "config.json").read_text().replace('"intermediate_size": 96', '"intermediate_size": 128')
            (tmp_path / "config.json").write_text(text)
        case "no pack":
            pack.unlink()
    with pytest.raises(PlatformError) as caught:
        native_runner.make_runner(tmp_path, OPTIONS, model_id="t", version="0" * 12)
    assert caught.value.code is (Code.FAILED_PRECONDITION if damage == "no pack" else Code.DATA_LOSS)
