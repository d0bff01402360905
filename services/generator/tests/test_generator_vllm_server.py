"""The engine suite against a real vLLM on the CPU, in .venv-vllm: make test-vllm. Skipped where that is not there.

A tiny random model in float32, so that a minute is enough and what must be equal is; and the real model for its text.
"""

import asyncio
import contextlib
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import lora_files
import pytest
import tiny_llama
from engine_suite import PROMPTS, EngineSuite, MakeAdapter, ask, collect
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from generator.backends.hf_tokenizer import HfTokenizer
from generator.backends.toy import ByteTokenizer
from generator.backends.vllm_engine import VllmClient, VllmEngine, VllmOptions, make_model
from generator.core.adapters import AdapterFiles
from generator.core.engine import Engine
from generator.core.events import FinishReason
from generator.core.requests import StopParams
from generator.core.text import Vocabulary
from testkit import eventually, free_port
from testkit.sources import ROOT

PYTHON = ROOT / ".venv-vllm" / "bin" / "python"
START_S = 240.0
CONFIG: dict[str, Any] = tiny_llama.CONFIG | {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "torch_dtype": "float32",
}

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not PYTHON.exists(), reason=".venv-vllm is not there: make vllm-env (3.3 GB)"),
]

ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "2",
}
Serve = Callable[..., contextlib.AbstractContextManager[str]]


@pytest.fixture(scope="module")
def serve(tmp_path_factory: pytest.TempPathFactory) -> Serve:
    """Runs a vLLM server for as long as its context is open; gives its URL when it answers."""
    folder = tmp_path_factory.mktemp("vllm")

    @contextlib.contextmanager
    def run(model: Path, *arguments: str) -> Iterator[str]:
        port = free_port()
        log = folder / f"{port}.log"
        command = [str(PYTHON), "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
        command += ["--host", "127.0.0.1", "--port", str(port), "--enforce-eager", "--enable-prompt-tokens-details"]
        with log.open("wb") as out:
            process = subprocess.Popen(
                [*command, *arguments], stdout=out, stderr=out, env=os.environ | ENVIRONMENT, start_new_session=True
            )
        try:
            _wait_for(f"http://127.0.0.1:{port}", process, log)
            yield f"http://127.0.0.1:{port}"
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(60)

    return run


def _wait_for(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    until = time.monotonic() + START_S
    while time.monotonic() < until:
        assert process.poll() is None, log.read_text()[-3000:]
        try:
            if httpx.get(f"{url}/health", timeout=2).status_code == 200:
                return
        except httpx.HTTPError:
            time.sleep(0.5)
    raise AssertionError(f"vLLM did not start within {START_S} s:\n{log.read_text()[-3000:]}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a tokenizer over bytes, which vLLM asks for."""
    folder = tiny_llama.write(tmp_path_factory.mktemp("tiny"), CONFIG)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: number for number, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    content = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<end>", "model_max_length": 512}
    (folder / "tokenizer_config.json").write_text(json.dumps(content))
    return folder


@contextlib.asynccontextmanager
async def _engine(
    url: str, folder: Path, vocabulary: Vocabulary, adapter_dir: Path | None = None
) -> AsyncIterator[VllmEngine]:
    """An engine that has found its vLLM."""
    model = make_model(folder, "tiny", "0" * 12, 4096)
    options = VllmOptions(adapter_dir=adapter_dir, look_s=0.1)
    engine = VllmEngine(VllmClient(url, None, 60.0), model, vocabulary, options)
    engine.start()
    watching = asyncio.create_task(engine.watch())
    try:
        await eventually(lambda: engine.is_ready, 30)
        yield engine
        for adapter in engine.adapters():  # the server is that of the next test too
            await engine.unload_adapter(adapter.id)
    finally:
        await engine.close()
        await watching


TINY = ["--served-model-name", "tiny", "--dtype", "float32", "--max-model-len", "256", "--max-num-seqs", "64"]
LORA = ["--enable-lora", "--max-loras", "4", "--max-cpu-loras", "16", "--max-lora-rank", "8"]


class RealVllmSuite(EngineSuite):
    STATS_LAG = True

    async def blocks_are_seen_in_use(self, engine: Engine) -> None:
        """A tiny request may end before vLLM's metrics tell of it: test_blocks_in_use_are_heard_of asks many."""


class TestRealVllm(RealVllmSuite):
    """Adapters are not declared, and refused."""

    @pytest.fixture(scope="class")
    @classmethod
    def url(cls, serve: Serve, folder: Path) -> Iterator[str]:
        with serve(folder, *TINY) as url:
            yield url

    @pytest.fixture
    def make_adapter(self) -> MakeAdapter:
        return _adapter

    @pytest.fixture
    async def engine(self, url: str, folder: Path) -> AsyncIterator[VllmEngine]:
        async with _engine(url, folder, ByteTokenizer()) as engine:
            yield engine

    async def test_a_stop_string_stops_vllm_too(self, engine: VllmEngine) -> None:
        text = (await collect(engine, ask(most=60))).texts[0]
        stop = text[12:15]
        got = await collect(engine, ask(stop=StopParams(max_tokens=200, stop=(stop,), ignore_eos=True)))
        assert got.texts[0] == text[: text.index(stop)] and got.reasons[0] is FinishReason.STOP
        await self.no_block_is_used(engine)

    async def test_blocks_in_use_are_heard_of(self, engine: VllmEngine) -> None:
        """One request after the other, until a look at vLLM's metrics falls into one."""

        async def heard() -> bool:
            stream = engine.submit(ask(most=240), lambda _: None)
            seen = [engine.stats().blocks_used > 0 async for _ in stream]
            return any(seen)

        await eventually(heard, 120)
        await self.no_block_is_used(engine)

    async def test_a_prefix_is_cached_for_its_tenant_alone(self, engine: VllmEngine) -> None:
        prompt = tuple((11 * i) % 250 for i in range(200))

        async def num_cached(salt: str) -> int:
            summary = (await collect(engine, ask(prompt, 2, cache_salt=salt))).summary
            assert summary is not None
            return summary.num_cached

        assert await num_cached("a") == 0 and await num_cached("a") >= 128 and await num_cached("b") == 0


class TestRealVllmWithAdapters(RealVllmSuite):
    """Log probabilities of prompts are not declared, and refused: vllm_engine/model.py says why."""

    @pytest.fixture(scope="class")
    @classmethod
    def url(cls, serve: Serve, folder: Path) -> Iterator[str]:
        with serve(folder, *TINY, *LORA) as url:
            yield url

    @pytest.fixture
    def make_adapter(self) -> MakeAdapter:
        return _adapter

    @pytest.fixture
    async def engine(self, url: str, folder: Path, tmp_path: Path) -> AsyncIterator[VllmEngine]:
        async with _engine(url, folder, ByteTokenizer(), tmp_path / "adapters") as engine:
            yield engine

    @pytest.mark.xfail(
        strict=True,
        reason="vLLM 0.32 on the CPU gives rows of the base beside adapters the weights of its last LoRA slot",
    )
    async def test_base_and_adapters_together_equal_one_by_one(
        self, engine: VllmEngine, make_adapter: MakeAdapter
    ) -> None:
        for seed in range(4):  # fill every slot
            files = make_adapter(f"tiny:{seed}", seed)
            await engine.load_adapter(files)
            await collect(engine, ask(most=2, adapter=files.spec.id))
        await super().test_base_and_adapters_together_equal_one_by_one(engine, make_adapter)

    async def test_adapters_together_equal_one_by_one(self, engine: VllmEngine, make_adapter: MakeAdapter) -> None:
        for seed, name in enumerate("abc"):
            await engine.load_adapter(make_adapter(f"tiny:{name}", seed))
        requests = [ask(p, 12, adapter=f"tiny:{'abc'[i % 3]}") for i, p in enumerate(PROMPTS)]
        alone = [(await collect(engine, request)).tokens[0] for request in requests]
        together = await asyncio.gather(*(collect(engine, request) for request in requests))
        assert [t.tokens[0] for t in together] == alone


async def test_the_real_model_answers_in_whole_characters(serve: Serve, model_store: Path, tmp_path: Path) -> None:
    folder = tmp_path / "smollm2-135m-instruct"
    folder.mkdir()
    for path in (model_store / folder.name).iterdir():
        if not path.match("model.int*.safetensors"):  # vLLM would take our packed weights for a part of the model's
            (folder / path.name).symlink_to(path)
    tokenizer = HfTokenizer.load(folder)
    with serve(folder, "--max-model-len", "1024", "--max-num-seqs", "8") as url:
        async with _engine(url, folder, tokenizer) as engine:
            prompt = tuple(tokenizer.encode("Count: one, two, three, four, five,"))
            got = await collect(engine, ask(prompt, 12))
            assert re.match(r"\s*six, seven", got.texts[0]), got.texts[0]
            assert got.summary is not None and got.summary.num_completion == 12


def _adapter(adapter_id: str, seed: int) -> AdapterFiles:
    """vLLM wants to be told which modules there are, as peft does."""
    config = lora_files.config_json(target_modules=list(lora_files.MODULES))
    return replace(lora_files.files(adapter_id, CONFIG, seed), config=config)
