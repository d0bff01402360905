"""The vllm engine against a stand-in that speaks vLLM's shapes: the contract, and a vLLM that goes, comes and lies."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path

import lora_files
import pytest
import tiny_llama
from engine_suite import PROMPTS, EngineSuite, MakeAdapter, ask, collect
from vllm_standin import StandIn, serving

from chassis.errors import Code, PlatformError
from generator.backends.toy import EOS, VOCAB_SIZE, ByteTokenizer
from generator.backends.vllm_engine import VllmClient, VllmEngine, VllmOptions, make_model, wire
from generator.backends.vllm_engine.model import CAPABILITIES
from generator.core.events import Delta, FinishReason
from generator.core.requests import GenerationRequest, ModelSpec, SamplingParams, StopParams
from generator.core.sequences import Sequence
from testkit import eventually, free_port

MODEL = ModelSpec("toy", "1" * 12, VOCAB_SIZE, 4096, frozenset({EOS}), capabilities=CAPABILITIES)
LOOK_S = 0.02

Start = Callable[..., VllmEngine]


@pytest.fixture
def make_adapter() -> MakeAdapter:
    return lambda adapter_id, seed: lora_files.files(adapter_id, tiny_llama.CONFIG, seed)


@pytest.fixture
async def standin() -> AsyncIterator[StandIn]:
    async with serving(StandIn()) as standin:
        yield standin


@pytest.fixture
async def start() -> AsyncIterator[Start]:
    """Starts engines for a URL; they may become ready or not."""
    engines: list[VllmEngine] = []
    watches = []

    def make(url: str, key: str | None = None, silence_s: float = 30.0, **options: object) -> VllmEngine:
        client = VllmClient(url, key, silence_s)
        fields = VllmOptions(look_s=LOOK_S)
        engine = VllmEngine(client, MODEL, ByteTokenizer(), replace(fields, **options))  # type: ignore[arg-type]
        engine.start()
        engines.append(engine)
        watches.append(asyncio.create_task(engine.watch()))
        return engine

    yield make
    for engine in engines:
        await engine.close()
    async with asyncio.timeout(10):
        await asyncio.gather(*watches)


@pytest.fixture
async def engine(standin: StandIn, start: Start) -> VllmEngine:
    engine = start(standin.url)
    await eventually(lambda: engine.is_ready)
    return engine


@pytest.fixture
async def tuning_engine(standin: StandIn, start: Start, tmp_path: Path) -> VllmEngine:
    engine = start(standin.url, adapter_dir=tmp_path / "adapters")
    await eventually(lambda: engine.is_ready)
    return engine


class TestVllmEngine(EngineSuite):
    """Without adapters: asking for them is refused."""

    STATS_LAG = True

    @pytest.fixture
    async def engine(self, engine: VllmEngine) -> VllmEngine:
        return engine

    @pytest.fixture
    def make_adapter(self, make_adapter: MakeAdapter) -> MakeAdapter:
        return make_adapter


class TestVllmEngineWithAdapters(EngineSuite):
    """Without the log probabilities of prompts: asking for them is refused."""

    STATS_LAG = True

    @pytest.fixture
    async def engine(self, tuning_engine: VllmEngine) -> VllmEngine:
        return tuning_engine

    @pytest.fixture
    def make_adapter(self, make_adapter: MakeAdapter) -> MakeAdapter:
        return make_adapter


async def _refusal(engine: VllmEngine, request: GenerationRequest | None = None) -> PlatformError:
    with pytest.raises(PlatformError) as raised:
        await collect(engine, request or ask())
    return raised.value


async def test_the_context_is_no_longer_than_that_of_vllm(engine: VllmEngine) -> None:
    assert engine.model.context_length == 256
    assert (await _refusal(engine, ask((5,) * 300))).code is Code.OUT_OF_RANGE


async def test_what_vllm_is_asked_leaves_nothing_to_a_models_own_defaults(engine: VllmEngine, standin: StandIn) -> None:
    sampling = SamplingParams(0.7, 0.9, 40, 0.05, 0.1, 0.2, 1.1, {65: -5.0}, seed=2**64 - 1)
    stop = StopParams(max_tokens=5, min_tokens=2, stop_token_ids=(7,))
    await collect(engine, ask(sampling=sampling, stop=stop, cache_salt="tenant-a", logprobs=2, n=2))
    asked = standin.bodies[-2:]
    seeds = {body.pop("seed") for body in asked}
    assert len(seeds) == 2 and all(0 <= seed < 2**63 for seed in seeds)
    assert asked[0] == asked[1] == {
        "model": standin.name, "prompt": list(PROMPTS[0]), "return_token_ids": True, "cache_salt": "tenant-a",
        "max_tokens": 5, "min_tokens": 2, "temperature": 0.7, "top_p": 0.9, "top_k": 40, "min_p": 0.05,
        "frequency_penalty": 0.1, "presence_penalty": 0.2, "repetition_penalty": 1.1, "logit_bias": {"65": -5.0},
        "stop_token_ids": [7, EOS], "ignore_eos": False, "logprobs": 2, "return_tokens_as_token_ids": True,
        "stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    }  # fmt: skip


async def test_a_stop_string_is_found_here_and_ends_the_work_there(engine: VllmEngine, standin: StandIn) -> None:
    text = (await collect(engine, ask(most=60))).texts[0]
    stop = text[20:23]
    got = await collect(engine, ask(stop=StopParams(max_tokens=200, stop=(stop,), ignore_eos=True)))
    at = text.index(stop)
    assert got.texts[0] == text[:at] and got.reasons[0] is FinishReason.STOP
    assert got.summary is not None and got.summary.num_completion == at + len(stop)  # bytes are tokens
    await eventually(lambda: standin.blocks.num_used == 0)


async def test_a_cancel_before_the_first_step_is_told(engine: VllmEngine) -> None:
    settled: list[object] = []
    stream = engine.submit(ask(), settled.append)
    stream.cancel()
    events = [event async for event in stream]
    assert not any(isinstance(event, Delta) for event in events) and engine.stats().waiting_sequences == 0
    await eventually(lambda: settled)


async def test_a_full_queue_refuses(standin: StandIn, start: Start) -> None:
    engine = start(standin.url, max_waiting=2)
    await eventually(lambda: engine.is_ready)
    standin.is_silent = True
    streams = [engine.submit(ask(), lambda _: None) for _ in range(2)]
    assert engine.stats().waiting_sequences == 2
    assert (await _refusal(engine)).code is Code.OVERLOADED
    for stream in streams:
        stream.cancel()


async def test_a_deadline_is_kept_while_vllm_says_nothing(engine: VllmEngine, standin: StandIn) -> None:
    standin.is_silent = True
    got = await collect(engine, ask(deadline_unix_s=time.time() + 0.3))
    assert got.reasons[0] is FinishReason.DEADLINE
    await eventually(lambda: standin.blocks.num_used == 0)


async def test_silence_without_a_deadline_ends_too(standin: StandIn, start: Start) -> None:
    engine = start(standin.url, silence_s=0.3)
    await eventually(lambda: engine.is_ready)
    standin.is_silent = True
    assert (await _refusal(engine)).code is Code.UNAVAILABLE


async def test_without_a_folder_that_both_see_there_are_no_adapters(
    standin: StandIn, start: Start, make_adapter: MakeAdapter
) -> None:
    engine = start(standin.url)
    await eventually(lambda: engine.is_ready)
    assert "lora" not in engine.model.capabilities
    with pytest.raises(PlatformError) as raised:
        await engine.load_adapter(make_adapter("toy:a", 1))
    assert raised.value.code is Code.UNIMPLEMENTED and "GENERATOR_VLLM_ADAPTER_DIR" in raised.value.message


# A vLLM that goes, comes and lies.


async def test_without_vllm_it_is_not_ready_and_refuses(start: Start) -> None:
    engine = start(f"http://127.0.0.1:{free_port()}")
    await asyncio.sleep(5 * LOOK_S)
    assert not engine.is_ready
    error = await _refusal(engine)
    assert error.code is Code.UNAVAILABLE and error.retryable


async def test_a_vllm_that_comes_back_gets_its_adapters_again(
    start: Start, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    port = free_port()
    engine = start(f"http://127.0.0.1:{port}", adapter_dir=tmp_path / "adapters")
    async with serving(StandIn(), port) as first:
        await eventually(lambda: engine.is_ready)
        files = make_adapter("toy:a", 1)
        await engine.load_adapter(files)
        expected = await collect(engine, ask(adapter="toy:a"))
        assert list(first.adapters) == [f"toy:a@{files.spec.version}"]
        stream = engine.submit(ask(most=200), lambda _: None)
        running = aiter(stream)
        await anext(running)
        first.breaks_after = 0
    with pytest.raises(PlatformError) as raised:
        _ = [event async for event in running]
    assert raised.value.code is Code.UNAVAILABLE and raised.value.retryable
    await eventually(lambda: not engine.is_ready)
    async with serving(StandIn(), port):
        await eventually(lambda: engine.is_ready)
        assert (await collect(engine, ask(adapter="toy:a"))).tokens == expected.tokens


async def test_an_engine_that_died_behind_its_server_is_not_ready(engine: VllmEngine, standin: StandIn) -> None:
    standin.is_healthy = False
    await eventually(lambda: not engine.is_ready)
    standin.is_healthy = True
    await eventually(lambda: engine.is_ready)


async def test_a_stream_that_breaks_off_is_an_error_and_not_an_end(engine: VllmEngine, standin: StandIn) -> None:
    standin.breaks_after = 4
    assert (await _refusal(engine)).code is Code.UNAVAILABLE
    await eventually(lambda: standin.blocks.num_used == 0)


async def test_an_abort_on_vllms_side_is_an_error(engine: VllmEngine, standin: StandIn) -> None:
    standin.finish = "abort"
    assert (await _refusal(engine)).code is Code.UNAVAILABLE


async def test_a_bound_of_vllms_own_is_the_length(engine: VllmEngine, standin: StandIn) -> None:
    standin.finish = "length"
    got = await collect(engine, ask(most=40))
    assert got.reasons[0] is FinishReason.LENGTH and got.summary is not None and got.summary.num_completion == 1


async def test_tokens_that_were_counted_but_not_sent_are_an_error(engine: VllmEngine, standin: StandIn) -> None:
    standin.miscounts = True
    assert (await _refusal(engine)).code is Code.INTERNAL


async def test_a_server_that_returns_no_token_ids_is_not_used(standin: StandIn, start: Start) -> None:
    standin.returns_token_ids = False
    engine = start(standin.url)
    await asyncio.sleep(5 * LOOK_S)
    assert not engine.is_ready and "token ids" in (await _refusal(engine)).message


async def test_another_model_is_not_used(standin: StandIn, start: Start) -> None:
    engine = start(standin.url, model_name="other")
    await asyncio.sleep(5 * LOOK_S)
    assert not engine.is_ready and "GENERATOR_VLLM_MODEL" in (await _refusal(engine)).message


async def test_the_key_is_sent_and_a_wrong_one_is_our_fault(standin: StandIn, start: Start) -> None:
    standin.api_key = "right"
    engine, other = start(standin.url, "right"), start(standin.url, "wrong")
    await eventually(lambda: engine.is_ready)
    error = await _refusal(other)
    assert not other.is_ready and error.code is Code.UNAVAILABLE and "right" not in error.message


async def test_weights_that_nobody_uses_leave_vllm_and_the_folder(
    tuning_engine: VllmEngine, standin: StandIn, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    old, new = make_adapter("toy:a", 1), make_adapter("toy:a", 2)
    await tuning_engine.load_adapter(old)
    await tuning_engine.load_adapter(new)
    await eventually(lambda: list(standin.adapters) == [f"toy:a@{new.spec.version}"])
    await tuning_engine.unload_adapter("toy:a")
    assert standin.adapters == {} and list((tmp_path / "adapters").iterdir()) == []


@pytest.mark.parametrize(
    ("message", "code"),
    [
        ({"error": {"message": "Grammar error", "code": 400}}, Code.INVALID_ARGUMENT),
        ({"error": {"message": "out of memory", "code": 500}}, Code.UNAVAILABLE),
        ({"error": "Unauthorized", "code": 401}, Code.UNAVAILABLE),
        ({"choices": [{"index": 0}]}, Code.INTERNAL),
        ({"choices": [{"token_ids": ["x"], "logprobs": None}]}, Code.INTERNAL),
        ({"choices": "none"}, Code.INTERNAL),
        ({}, Code.INTERNAL),
    ],
)
def test_a_strange_event_is_an_error_with_its_code(message: dict[str, object], code: Code) -> None:
    with pytest.raises(PlatformError) as raised:
        wire.read_chunk(message, ask())
    assert raised.value.code is code


def test_missing_log_probabilities_are_not_passed_over() -> None:
    with pytest.raises(PlatformError):
        wire.read_chunk({"choices": [{"token_ids": [1], "logprobs": None}]}, ask(logprobs=1))


def test_seeds_of_completions_differ_and_fit() -> None:
    seeds = [wire.seed_of(seed, index) for seed in (0, 1, 2**63, 2**64 - 1) for index in range(16)]
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert len({wire.seed_of(5, index) for index in range(16)}) == 16


def test_a_salt_longer_than_vllm_takes_is_folded_and_stays_its_own() -> None:
    sequences = [Sequence(ask(cache_salt="x" * 2000 + end), 0, 0, 0, 5) for end in "ab"]
    first, second = (wire.completion_body("m", sequence, MODEL)["cache_salt"] for sequence in sequences)
    assert first != second and len(first) <= 1024


def test_a_folder_tells_vocabulary_ends_and_context(tmp_path: Path) -> None:
    tiny_llama.write(tmp_path)
    model = make_model(tmp_path, "tiny", "1" * 12, 1_000_000)
    assert (model.vocab_size, model.context_length, model.eos_token_ids) == (VOCAB_SIZE, 512, {EOS})
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(PlatformError) as raised:
        make_model(tmp_path, "tiny", "1" * 12, 4096)
    assert raised.value.code is Code.DATA_LOSS
