import asyncio
from collections.abc import AsyncIterator

import numpy as np
import pytest
from embedder_suite import EncoderSuite, FakeEncoder
from hypothesis import given, settings
from hypothesis import strategies as st

from chassis.errors import Code, PlatformError
from embedder.core import pooling
from embedder.core.batcher import Batcher, BatchLimits
from embedder.core.pooling import Floats
from embedder.core.service import EmbedderCore

LIMITS = BatchLimits(max_texts=4, max_tokens=64, window_s=0.001, max_queued=16)


class TestFakeEncoder(EncoderSuite):
    @pytest.fixture
    def encoder(self) -> FakeEncoder:
        return FakeEncoder()


class Runtime:
    """Counts batches; can be held and can break."""

    def __init__(self, encoder: FakeEncoder) -> None:
        self.encoder = encoder
        self.release = asyncio.Event()
        self.release.set()
        self.broken = False

    async def compute(self, batch: list[list[int]]) -> Floats:
        await self.release.wait()
        if self.broken:
            raise RuntimeError("runtime broke")
        return self.encoder.encode(batch)


@pytest.fixture
async def running() -> AsyncIterator[tuple[Runtime, Batcher, EmbedderCore]]:
    runtime = Runtime(FakeEncoder())
    batcher = Batcher(runtime.compute, LIMITS)
    task = asyncio.create_task(batcher.run())
    yield runtime, batcher, EmbedderCore(runtime.encoder, batcher)
    task.cancel()


async def test_concurrent_callers_share_batches_and_get_their_own_vectors(
    running: tuple[Runtime, Batcher, EmbedderCore],
) -> None:
    runtime, batcher, _ = running
    lists = [[i + 1] * (1 + i % 5) for i in range(12)]
    results = await asyncio.gather(*(batcher.embed([ids]) for ids in lists))
    assert len(runtime.encoder.batches) < 12
    for ids, (computed,) in zip(lists, results, strict=True):
        np.testing.assert_allclose(computed.vector, FakeEncoder().encode([ids])[0], atol=1e-5)


async def test_batches_keep_their_limits(running: tuple[Runtime, Batcher, EmbedderCore]) -> None:
    runtime, batcher, _ = running
    await asyncio.gather(*(batcher.embed([[1] * n]) for n in (30, 1, 2, 29, 3, 31, 1, 1, 1, 2)))
    for batch in runtime.encoder.batches:
        assert len(batch) <= LIMITS.max_texts
        assert len(batch) == 1 or max(map(len, batch)) * len(batch) <= LIMITS.max_tokens


async def test_a_full_queue_refuses_and_recovers(running: tuple[Runtime, Batcher, EmbedderCore]) -> None:
    runtime, batcher, _ = running
    runtime.release.clear()
    held = [asyncio.create_task(batcher.embed([[1]])) for _ in range(16 + 4)]
    await asyncio.sleep(0.02)
    refused = [t for t in held if t.done() and isinstance(t.exception(), PlatformError)]
    assert refused and all(t.exception().code is Code.OVERLOADED for t in refused)  # type: ignore[union-attr]
    runtime.release.set()
    await asyncio.gather(*held, return_exceptions=True)
    assert await batcher.embed([[2]])


async def test_a_caller_that_left_is_not_computed(running: tuple[Runtime, Batcher, EmbedderCore]) -> None:
    runtime, batcher, _ = running
    runtime.release.clear()
    first = asyncio.create_task(batcher.embed([[1]]))
    await asyncio.sleep(0.01)
    leaver = asyncio.create_task(batcher.embed([[777]]))
    await asyncio.sleep(0.01)
    leaver.cancel()
    runtime.release.set()
    await first
    await batcher.embed([[2]])
    assert [777] not in [ids for batch in runtime.encoder.batches for ids in batch]


async def test_a_broken_batch_fails_its_callers_and_the_next_one_works(
    running: tuple[Runtime, Batcher, EmbedderCore],
) -> None:
    runtime, batcher, _ = running
    runtime.broken = True
    with pytest.raises(PlatformError) as caught:
        await batcher.embed([[1]])
    assert caught.value.code is Code.INTERNAL
    runtime.broken = False
    assert await batcher.embed([[1]])


async def test_texts_of_a_request_that_failed_are_not_computed() -> None:
    computed: list[list[int]] = []

    async def compute(batch: list[list[int]]) -> Floats:
        computed.extend(batch)
        await asyncio.sleep(0)  # as a thread does: the loop goes on meanwhile
        if len(computed) == 4:
            raise RuntimeError("runtime broke")
        return np.zeros((len(batch), 16), dtype=np.float32)

    batcher = Batcher(compute, LIMITS)
    task = asyncio.create_task(batcher.run())
    with pytest.raises(PlatformError):
        await batcher.embed([[9]] * 12)  # three batches, of which the first breaks
    await batcher.embed([[2]])
    assert computed == [[9]] * 4 + [[2]] and batcher.depth == 0
    task.cancel()


async def test_a_request_larger_than_a_batch_gets_its_vectors_in_order(
    running: tuple[Runtime, Batcher, EmbedderCore],
) -> None:
    lists = [[i + 1] * (1 + 7 * i % 11) for i in range(15)]
    vectors = [one.vector for one in await running[1].embed(lists)]
    np.testing.assert_allclose(vectors, FakeEncoder().encode(lists), atol=1e-5)


async def test_each_vector_tells_the_run_that_gave_it(running: tuple[Runtime, Batcher, EmbedderCore]) -> None:
    batcher = running[1]
    runs = [one.run for one in await batcher.embed([[1]] * 6)]
    assert sorted(run.num_texts for run in set(runs)) == [2, 4] and len(runs) == 6
    assert all(run.started_ns <= run.ended_ns for run in runs)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=16))
@settings(max_examples=30, deadline=None)
def test_every_text_is_computed_exactly_once(lengths: list[int]) -> None:
    async def go() -> list[list[int]]:
        runtime = Runtime(FakeEncoder())
        batcher = Batcher(runtime.compute, BatchLimits(4, 64, 0, 64))
        task = asyncio.create_task(batcher.run())
        await batcher.embed([[i + 1] * n for i, n in enumerate(lengths)])
        task.cancel()
        return [ids for batch in runtime.encoder.batches for ids in batch]

    computed = asyncio.run(go())
    assert sorted(ids[0] for ids in computed) == list(range(1, len(lengths) + 1))


@pytest.mark.parametrize(
    ("value", "code", "words"),
    [
        ("", Code.INVALID_ARGUMENT, "empty"),
        (" \n", Code.INVALID_ARGUMENT, "empty"),
        ("w " * 31, Code.OUT_OF_RANGE, "33 tokens; fake reads at most 32"),
        ([], Code.INVALID_ARGUMENT, "empty"),
        ([5000], Code.INVALID_ARGUMENT, "4999"),
        ([1] * 31, Code.OUT_OF_RANGE, "33 tokens"),
    ],
)
def test_bad_input_is_refused_with_the_numbers(value: str | list[int], code: Code, words: str) -> None:
    encoder = FakeEncoder()
    core = EmbedderCore(encoder, Batcher(Runtime.compute, LIMITS))  # type: ignore[arg-type]
    with pytest.raises(PlatformError, match=words) as caught:
        core.token_ids(value, 3, truncate=False)
    assert caught.value.code is code and caught.value.param == "input" and "input 3" in caught.value.message


def test_truncation_keeps_what_the_encoder_reads() -> None:
    core = EmbedderCore(FakeEncoder(), Batcher(Runtime.compute, LIMITS))  # type: ignore[arg-type]
    assert len(core.token_ids("w " * 100, 0, truncate=True)) == 30


async def test_dimensions_are_cut_and_normalised_again(running: tuple[Runtime, Batcher, EmbedderCore]) -> None:
    core = running[2]
    (cut,) = await core.embed([[1, 2]], dimensions=4)
    assert cut.vector.shape == (4,) and abs(float(np.linalg.norm(cut.vector)) - 1) < 1e-5 and cut.num_tokens == 4
    with pytest.raises(PlatformError, match="dimensions is 17; fake has 16"):
        await core.embed([[1]], dimensions=17)


def test_mean_pooling_ignores_padding() -> None:
    hidden = np.array([[[1, 1], [3, 3], [99, 99]]], dtype=np.float32)
    np.testing.assert_allclose(pooling.mean_pool(hidden, np.array([[1, 1, 0]])), [[2, 2]])
