"""Two hundred JSON Schemas on the real vocabulary: each is refused as documented, or every text of it validates."""

import asyncio
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine_suite import ask, collect
from json_schema_check import violation
from json_schemas import BY_HAND, NUM_SCHEMAS, all_schemas

from chassis.errors import Code, PlatformError
from generator.backends.hf_tokenizer import HfTokenizer
from generator.backends.llguidance_grammar import LlguidanceCompiler, LlguidanceGrammar, load_tokenizer
from generator.core import sampling
from generator.core.adapters import AdapterFiles, AdapterWeights
from generator.core.batching import BatchingEngine
from generator.core.blocks import BlockManager
from generator.core.events import FinishReason
from generator.core.grammar import Grammar
from generator.core.requests import ModelSpec, SamplingParams, StopParams
from generator.core.scheduler import SchedulerLimits
from generator.core.sequences import Outcome, Sampled, Work

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

EOS = 2
NUM_FREE = 40  # tokens that a walk picks freely before it makes for the end
MOST = 400
_ENDS = (
    '"',
    "}",
    "]",
    "0",
    "1",
    "a",
    "e",
    "true",
    "null",
    "ink",
    "ea",
    "y",
    ":",
    "@",
    ".",
    "-",
)  # some that a pattern waits for


@pytest.fixture(scope="module")
def folder(model_store: Path) -> Path:
    return model_store / "smollm2-135m-instruct"


@pytest.fixture(scope="module")
def compiler(folder: Path) -> Iterator[LlguidanceCompiler]:
    model = ModelSpec("m", "0" * 12, 49152, 2048, frozenset({EOS}))
    compiler = LlguidanceCompiler(load_tokenizer(folder, model), timeout_s=5.0, max_cached=8, num_workers=1)
    yield compiler
    compiler.close()


def _walk(grammar: LlguidanceGrammar, vocabulary: HfTokenizer, seed: int, times_s: list[float]) -> str:
    """Picks among the allowed tokens at random, as no model would; shorter and closing ones once it got long."""
    rng = np.random.default_rng(seed)
    ends = [vocabulary.encode(text)[0] for text in _ENDS]
    matcher, text = grammar.matcher(), b""
    for step in range(MOST):
        if matcher.is_done:
            break
        began_s = time.thread_time()
        words = matcher.mask()
        times_s.append(time.thread_time() - began_s)
        allowed = np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little"))
        assert len(allowed), "nothing may follow"
        if step >= NUM_FREE and EOS in allowed:
            break
        closing = [token for token in ends if token in allowed]
        token = int(rng.choice(allowed))
        if step >= NUM_FREE and closing and rng.random() < 0.8:
            token = closing[0] if rng.random() < 0.7 else int(rng.choice(closing))
        if token == EOS:
            break
        matcher.accept(token)
        text += vocabulary.token_bytes(token)
    else:
        raise AssertionError(f"no end after {MOST} tokens: {text[:500]!r}")
    return text.decode()


@contextmanager
def _named(what: str) -> Iterator[None]:
    try:
        yield
    except (AssertionError, PlatformError) as error:
        error.add_note(what)
        raise


def test_each_of_200_schemas_is_refused_as_documented_or_every_text_of_it_validates(
    compiler: LlguidanceCompiler, folder: Path
) -> None:
    vocabulary = HfTokenizer.load(folder)
    schemas, refused, times_s = all_schemas(), list[Any](), list[float]()
    assert len(schemas) == NUM_SCHEMAS
    for number, schema in enumerate(schemas):
        try:
            grammar = compiler.compile(Grammar("json_schema", json.dumps(schema)))
        except PlatformError as error:
            assert (error.code, error.param) == (Code.INVALID_ARGUMENT, "grammar")
            assert error.reason in ("invalid_grammar", "grammar_too_complex")
            refused.append((number, error.message))
            continue
        for seed in range(2 if number < len(BY_HAND) else 1):
            with _named(f"schema {number} {json.dumps(schema)}"):
                text = _walk(grammar, vocabulary, 1000 * number + seed, times_s)
            value = json.loads(text, parse_float=Decimal)
            broken = violation(value, schema, schema)
            assert broken is None, f"schema {number} {json.dumps(schema)}: {text}: {broken}"
    print(
        f"{NUM_SCHEMAS - len(refused)} schemas hold, {len(refused)} are refused; {len(times_s)} masks: "
        f"mean {np.mean(times_s) * 1e6:.0f} us, p99 {np.quantile(times_s, 0.99) * 1e6:.0f} us"
    )
    # What is expected to be refused, and hardly anything else.
    by_hand = [number for number, _ in refused if number < len(BY_HAND)]
    assert by_hand == list(range(40, len(BY_HAND))), refused
    assert len(refused) - len(by_hand) <= 10, refused
    assert np.mean(times_s) < 0.001


@pytest.mark.parametrize("seed", range(5))
def test_json_mode_gives_an_object_whatever_is_drawn(compiler: LlguidanceCompiler, folder: Path, seed: int) -> None:
    grammar = compiler.compile(Grammar("json_object"))
    assert isinstance(json.loads(_walk(grammar, HfTokenizer.load(folder), seed, [])), dict)


class _NoiseRunner:
    """A model of the real vocabulary whose logits are noise, and lean to the end of a text that got long."""

    def __init__(self, model: ModelSpec, ends: list[int]) -> None:
        self.model, self.step_times = model, None
        self._ends = ends

    def warm_up(self) -> None:
        """Nothing to warm."""

    def read_adapter(self, files: AdapterFiles) -> AdapterWeights:
        raise NotImplementedError

    def execute(self, step: list[Work]) -> list[Outcome]:
        rows = [row for work in step for row in sampling.rows_of(work)]
        logits = np.zeros((len(rows), self.model.vocab_size), dtype=np.float32)
        for values, row in zip(logits, rows, strict=True):
            values[:] = np.random.default_rng(len(row.sequence.token_ids)).standard_normal(len(values))
            if row.position > NUM_FREE:
                values[self._ends] += 5.0
                values[[EOS, self._ends[0]]] += 3.0
        tokens = iter(sampling.sample(logits, rows) if rows else [])
        return [Outcome(tuple(Sampled(next(tokens)) for _ in sampling.rows_of(work))) for work in step]


async def test_a_batch_of_schemas_holds_in_the_engine(compiler: LlguidanceCompiler, folder: Path) -> None:
    vocabulary = HfTokenizer.load(folder)
    model = ModelSpec("m", "0" * 12, 49152, 2048, frozenset({EOS}))
    runner = _NoiseRunner(model, [vocabulary.encode(text)[0] for text in _ENDS])
    blocks = BlockManager(400, 16)
    engine = BatchingEngine(runner, vocabulary, blocks, SchedulerLimits(max_running=8), grammars=compiler)
    engine.start()
    schemas = [schema for schema in all_schemas()[56:] if "pattern" not in json.dumps(schema)][:24]

    async def answer(number: int, schema: dict[str, Any]) -> tuple[str, FinishReason]:
        grammar = Grammar("json_schema", json.dumps(schema))
        drawn = SamplingParams(temperature=1.0, seed=number)
        fields: Any = {"grammar": grammar, "compiled": compiler.compile(grammar), "sampling": drawn}
        got = await collect(engine, ask(stop=StopParams(max_tokens=1500), **fields))
        return got.texts[0], got.reasons[0]

    for schema, (text, reason) in zip(
        schemas, await asyncio.gather(*(answer(*pair) for pair in enumerate(schemas))), strict=True
    ):
        assert reason is FinishReason.STOP, text[-200:]
        assert violation(json.loads(text, parse_float=Decimal), schema, schema) is None
    assert engine.stats().blocks_used == 0
    await engine.close()
