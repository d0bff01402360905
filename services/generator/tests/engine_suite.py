"""What every engine must do: toy, torch, native and vLLM's inherit it.

Most of it is the mandatory core. A test that begins with `require` is of a capability: it is skipped where the engine
does not declare that one, after it was seen that asking for it is UNIMPLEMENTED before any work starts.
"""

import asyncio
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace

import pytest

from chassis.errors import Code, PlatformError
from generator.core.adapters import AdapterFiles
from generator.core.engine import Engine
from generator.core.events import Delta, Done, Event, Finished, FinishReason, Started, Summary
from generator.core.grammar import Grammar
from generator.core.requests import GenerationRequest, SamplingParams, StopParams
from generator.core.sequences import TokenLogprob
from generator.core.stream import TokenStream
from testkit import eventually

GREEDY = SamplingParams(temperature=0.0)
PROMPTS = ((72, 101, 108, 108, 111), (97,) * 40, tuple(range(33, 120)), (120, 121), (10, 20, 30, 40))


@dataclass
class Collected:
    """A request's stream, read to its end."""

    events: list[Event] = field(default_factory=list)
    texts: dict[int, str] = field(default_factory=lambda: defaultdict(str))
    tokens: dict[int, list[int]] = field(default_factory=lambda: defaultdict(list))
    logprobs: dict[int, list[TokenLogprob]] = field(default_factory=lambda: defaultdict(list))
    reasons: dict[int, FinishReason] = field(default_factory=dict)
    settled: list[Summary] = field(default_factory=list)
    started: Started | None = None
    summary: Summary | None = None

    def take(self, event: Event) -> None:
        self.events.append(event)
        match event:
            case Started():
                self.started = event
            case Delta():
                self.texts[event.index] += event.text
                self.tokens[event.index] += event.token_ids
                self.logprobs[event.index] += event.logprobs
            case Finished():
                self.reasons[event.index] = event.reason
            case Done():
                self.summary = event.summary


def ask(prompt: tuple[int, ...] = PROMPTS[0], most: int = 12, **fields: object) -> GenerationRequest:
    """A greedy request that runs to its length, unless told otherwise."""
    stop = fields.pop("stop", StopParams(max_tokens=most, ignore_eos=True))
    return replace(GenerationRequest("r", prompt, GREEDY, stop), **fields)  # type: ignore[arg-type]


async def collect(engine: Engine, request: GenerationRequest) -> Collected:
    """Runs a request to its end."""
    collected = Collected()
    async for event in engine.submit(request, collected.settled.append):
        collected.take(event)
    await eventually(lambda: collected.settled)
    return collected


async def _start(engine: Engine, request: GenerationRequest) -> tuple[TokenStream, AsyncIterator[Event], Collected]:
    """Submits a request and reads until its first delta."""
    collected = Collected()
    stream = engine.submit(request, collected.settled.append)
    events = aiter(stream)
    while not isinstance(event := await anext(events), Delta):
        collected.take(event)
    collected.take(event)
    return stream, events, collected


def require(engine: Engine, capability: str, request: GenerationRequest) -> None:
    """Skips a test of what the engine does not declare; `request` asks for it, and must be refused then."""
    if capability in engine.model.capabilities:
        return
    with pytest.raises(PlatformError) as raised:
        engine.submit(request, lambda _: None)
    assert raised.value.code is Code.UNIMPLEMENTED and raised.value.param == capability
    pytest.skip(f"the engine does not declare {capability}, and refuses it")


async def require_lora(engine: Engine, files: AdapterFiles) -> None:
    """Skips a test of adapters where the engine does not declare them; loading one must be refused then."""
    if "lora" in engine.model.capabilities:
        return
    with pytest.raises(PlatformError) as raised:
        await engine.load_adapter(files)
    assert raised.value.code is Code.UNIMPLEMENTED
    pytest.skip("the engine does not declare lora, and refuses it")


MakeAdapter = Callable[[str, int], AdapterFiles]  # id and a seed for its weights


class EngineSuite:
    """Contract tests. A subclass provides the fixtures `engine`, one that is started, of a context of 256 or more, and
    `make_adapter`, which makes files that change what it says."""

    NUM_CANCELS = 20
    REPEAT_TOLERANCE = 0.0  # of log probabilities, between two runs of one request with nothing beside it
    SCORE_TOLERANCE = 2e-3  # of log probabilities, between tokens that were sampled and the same ones as a prompt
    NUM_LONG = 200  # tokens of a request that is still running when something else is done
    STATS_LAG = False  # whether blocks are counted elsewhere and heard of later

    async def blocks_are_seen_in_use(self, engine: Engine) -> None:
        """What runs is heard to hold blocks."""
        await eventually(lambda: engine.stats().blocks_used > 0)

    async def no_block_is_used(self, engine: Engine) -> None:
        """Blocks of what has ended are free: at once, or as soon as one can hear of it."""
        if self.STATS_LAG:
            await eventually(lambda: engine.stats().blocks_used == 0)
        assert engine.stats().blocks_used == 0
        assert (engine.stats().running_sequences, engine.stats().waiting_sequences) == (0, 0)

    async def test_events_come_in_order_and_usage_is_exact(self, engine: Engine) -> None:
        got = await collect(engine, ask(most=9))
        assert isinstance(got.events[0], Started) and isinstance(got.events[-1], Done)
        assert got.started is not None and got.started.num_prompt == len(PROMPTS[0])
        assert got.reasons == {0: FinishReason.LENGTH} and len(got.tokens[0]) == 9
        assert got.summary is not None and got.settled == [got.summary]
        assert (got.summary.num_prompt, got.summary.num_completion) == (len(PROMPTS[0]), 9)
        assert got.summary.ttft_s is not None and got.summary.tpot_s is not None
        await self.no_block_is_used(engine)

    async def test_together_equals_one_by_one(self, engine: Engine) -> None:
        alone = [(await collect(engine, ask(p, 16))).tokens[0] for p in PROMPTS]
        together = await asyncio.gather(*(collect(engine, ask(p, 16)) for p in PROMPTS))
        assert [t.tokens[0] for t in together] == alone

    async def test_a_seed_gives_the_same_tokens_whatever_else_runs(self, engine: Engine) -> None:
        seeded = ask(most=16, sampling=SamplingParams(temperature=1.0, top_p=0.95, seed=7))
        alone = await collect(engine, seeded)
        others = [ask(p, 24, sampling=SamplingParams(temperature=1.3)) for p in PROMPTS]
        again, *_ = await asyncio.gather(*(collect(engine, r) for r in (seeded, *others)))
        assert again.tokens[0] == alone.tokens[0]

    async def test_without_a_seed_texts_differ(self, engine: Engine) -> None:
        hot = ask(most=24, sampling=SamplingParams(temperature=2.0))
        assert (await collect(engine, hot)).tokens[0] != (await collect(engine, hot)).tokens[0]

    async def test_n_completions_differ_and_are_all_counted(self, engine: Engine) -> None:
        got = await collect(engine, ask(most=10, n=3, sampling=SamplingParams(temperature=1.5, seed=3)))
        assert set(got.reasons) == {0, 1, 2} and got.summary is not None
        assert got.summary.num_completion == 30 and got.summary.num_prompt == len(PROMPTS[0])
        assert len({tuple(tokens) for tokens in got.tokens.values()}) == 3

    async def test_the_context_ends_a_completion(self, engine: Engine) -> None:
        length = engine.model.context_length
        got = await collect(engine, ask((5,) * (length - 3), stop=StopParams(ignore_eos=True)))
        assert got.reasons[0] is FinishReason.LENGTH and len(got.tokens[0]) == 3

    async def test_a_stop_id_ends_and_counts(self, engine: Engine) -> None:
        tokens = (await collect(engine, ask(most=8))).tokens[0]
        got = await collect(engine, ask(stop=StopParams(max_tokens=8, stop_token_ids=(tokens[3],), ignore_eos=True)))
        first = tokens.index(tokens[3])
        assert got.reasons[0] is FinishReason.STOP and got.tokens[0] == tokens[:first]
        assert got.summary is not None and got.summary.num_completion == first + 1

    async def test_logprobs_are_of_the_raw_distribution(self, engine: Engine) -> None:
        require(engine, "logprobs", ask(logprobs=3))
        got = await collect(engine, ask(most=6, logprobs=3, sampling=replace(GREEDY, logit_bias={65: -50.0})))
        assert [lp.token_id for lp in got.logprobs[0]] == got.tokens[0]
        for logprob in got.logprobs[0]:
            assert logprob.logprob <= 0 and len(logprob.top) == 3
            assert logprob.top[0][1] >= logprob.top[1][1] >= logprob.top[2][1]

    async def test_prompt_logprobs_agree_with_those_of_sampling(self, engine: Engine) -> None:
        require(engine, "prompt_logprobs", ask(prompt_logprobs=2))
        sampled = await collect(engine, ask(most=8, logprobs=0))
        whole = (*PROMPTS[0], *sampled.tokens[0])
        scored = await collect(engine, ask(whole, prompt_logprobs=2, stop=StopParams(max_tokens=0)))
        assert scored.started is not None and scored.summary is not None
        found = scored.started.prompt_logprobs
        assert [lp.token_id for lp in found] == list(whole[1:]) and all(len(lp.top) == 2 for lp in found)
        expected = [lp.logprob for lp in sampled.logprobs[0]]
        assert [lp.logprob for lp in found[-8:]] == pytest.approx(expected, abs=self.SCORE_TOLERANCE)
        assert scored.summary.num_completion == 0 and scored.reasons[0] is FinishReason.LENGTH

    async def test_a_long_prompt_in_pieces_equals_itself_alone(self, engine: Engine) -> None:
        require(engine, "prompt_logprobs", ask(prompt_logprobs=0))
        long = tuple((7 * i) % 250 for i in range(220))
        alone = await collect(engine, ask(long, 8, prompt_logprobs=0))
        stream, events, _ = await _start(engine, ask(most=200))  # others decode: the prompt goes in pieces
        pieces = await collect(engine, ask(long, 8, prompt_logprobs=0))
        stream.cancel()
        _ = [event async for event in events]
        assert pieces.tokens[0] == alone.tokens[0]
        assert alone.started is not None and pieces.started is not None
        found = [lp.logprob for lp in pieces.started.prompt_logprobs]
        assert found == pytest.approx([lp.logprob for lp in alone.started.prompt_logprobs], abs=2e-3)

    async def test_a_cancel_frees_blocks_and_spares_the_others(self, engine: Engine) -> None:
        other = asyncio.create_task(collect(engine, ask(PROMPTS[1], 24)))
        stream, events, got = await _start(engine, ask(most=240))
        if self.STATS_LAG:
            await self.blocks_are_seen_in_use(engine)
        else:
            assert engine.stats().blocks_used > 0
        stream.cancel()
        async for event in events:
            got.take(event)
        assert got.reasons[0] is FinishReason.CANCELLED
        await eventually(lambda: got.settled)
        assert 0 < got.settled[0].num_completion < 240
        assert (await other).reasons[0] is FinishReason.LENGTH
        await self.no_block_is_used(engine)

    async def test_a_cancel_by_id_reaches_the_request(self, engine: Engine) -> None:
        _, events, got = await _start(engine, ask(most=240, request_id="mine"))
        assert engine.cancel("other") == 0 and engine.cancel("mine") == 1
        async for event in events:
            got.take(event)
        assert got.reasons[0] is FinishReason.CANCELLED

    async def test_a_deadline_ends_a_request(self, engine: Engine) -> None:
        past = await collect(engine, ask(deadline_unix_s=time.time() - 1))
        assert past.reasons[0] is FinishReason.DEADLINE and past.summary is not None
        assert past.summary.num_completion == 0

    async def test_many_cancels_leave_no_block_behind(self, engine: Engine) -> None:
        streams = [engine.submit(ask(p, 60), lambda _: None) for p in PROMPTS * (self.NUM_CANCELS // len(PROMPTS))]
        for number, stream in enumerate(streams):
            if number % 3:
                stream.cancel()
        for stream in streams:
            _ = [event async for event in stream]
        await self.no_block_is_used(engine)

    async def test_what_cannot_run_is_refused_at_once(self, engine: Engine) -> None:
        for request, code in (
            (ask((5,) * (engine.model.context_length + 1)), Code.OUT_OF_RANGE),
            (ask((engine.model.vocab_size,)), Code.INVALID_ARGUMENT),
            (ask(adapter="none"), Code.NOT_FOUND),
        ):
            with pytest.raises(PlatformError) as raised:
                engine.submit(request, lambda _: None)
            assert raised.value.code is code

    async def test_a_drain_refuses_new_requests_and_ends_the_old(self, engine: Engine) -> None:
        _, events, got = await _start(engine, ask(most=30))
        engine.drain()
        with pytest.raises(PlatformError) as raised:
            engine.submit(ask(), lambda _: None)
        assert raised.value.code is Code.UNAVAILABLE
        async for event in events:
            got.take(event)
        assert got.reasons[0] is FinishReason.LENGTH and len(got.tokens[0]) == 30

    async def test_a_grammar_is_refused_where_it_is_not_declared(self, engine: Engine) -> None:
        if "grammar" not in engine.model.capabilities:
            with pytest.raises(PlatformError) as raised:
                engine.submit(ask(grammar=Grammar("regex", "a+")), lambda _: None)
            assert raised.value.code is Code.UNIMPLEMENTED

    # Adapters.

    async def test_an_adapter_answers_beside_the_base_and_leaves_it_alone(
        self, engine: Engine, make_adapter: MakeAdapter
    ) -> None:
        await require_lora(engine, make_adapter(f"{engine.model.id}:a", 1))
        base = await collect(engine, ask(most=16, logprobs=0))
        assert engine.adapters() == ()
        files = make_adapter(f"{engine.model.id}:a", 1)
        assert await engine.load_adapter(files) == files.spec and engine.adapters() == (files.spec,)
        tuned = await collect(engine, ask(most=16, adapter=files.spec.id))
        assert tuned.tokens[0] != base.tokens[0]
        assert tuned.started is not None and tuned.started.model_version == files.spec.version
        again = await collect(engine, ask(most=16, logprobs=0))
        assert again.tokens == base.tokens
        expected = [score.logprob for score in base.logprobs[0]]
        assert [score.logprob for score in again.logprobs[0]] == pytest.approx(
            expected, rel=0, abs=self.REPEAT_TOLERANCE
        )
        assert again.started is not None and again.started.model_version == engine.model.version

    async def test_base_and_adapters_together_equal_one_by_one(self, engine: Engine, make_adapter: MakeAdapter) -> None:
        await require_lora(engine, make_adapter(f"{engine.model.id}:a", 1))
        ids = ["", *(f"{engine.model.id}:{name}" for name in "abc")]
        for seed, adapter_id in enumerate(ids[1:]):
            await engine.load_adapter(make_adapter(adapter_id, seed))
        requests = [ask(p, 12, adapter=ids[i % 4], logprobs=0) for i, p in enumerate(PROMPTS)]
        alone = [await collect(engine, request) for request in requests]
        together = await asyncio.gather(*(collect(engine, request) for request in requests))
        assert [t.tokens[0] for t in together] == [a.tokens[0] for a in alone]
        for one, other in zip(together, alone, strict=True):
            expected = [score.logprob for score in other.logprobs[0]]
            assert [score.logprob for score in one.logprobs[0]] == pytest.approx(expected, abs=2e-3)

    async def test_prompt_logprobs_are_the_adapters_own(self, engine: Engine, make_adapter: MakeAdapter) -> None:
        require(engine, "prompt_logprobs", ask(prompt_logprobs=0))
        await require_lora(engine, make_adapter(f"{engine.model.id}:a", 1))
        files = make_adapter(f"{engine.model.id}:a", 1)
        await engine.load_adapter(files)
        sampled = await collect(engine, ask(most=8, logprobs=0, adapter=files.spec.id))
        whole = (*PROMPTS[0], *sampled.tokens[0])
        request = ask(whole, prompt_logprobs=0, stop=StopParams(max_tokens=0))
        scored, base = await collect(engine, replace(request, adapter=files.spec.id)), await collect(engine, request)
        assert scored.started is not None and base.started is not None
        found = [score.logprob for score in scored.started.prompt_logprobs]
        assert found[-8:] == pytest.approx([score.logprob for score in sampled.logprobs[0]], abs=self.SCORE_TOLERANCE)
        assert found != pytest.approx([score.logprob for score in base.started.prompt_logprobs], abs=2e-3)

    async def test_the_same_adapter_again_is_answered_at_once(self, engine: Engine, make_adapter: MakeAdapter) -> None:
        await require_lora(engine, make_adapter(f"{engine.model.id}:a", 1))
        files = make_adapter(f"{engine.model.id}:a", 1)
        await engine.load_adapter(files)
        tokens = engine.stats().completion_tokens_total
        assert await engine.load_adapter(files) == files.spec
        assert engine.stats().completion_tokens_total == tokens  # no second probe

    async def test_a_new_version_takes_over_and_what_runs_keeps_the_old(
        self, engine: Engine, make_adapter: MakeAdapter
    ) -> None:
        await require_lora(engine, make_adapter(f"{engine.model.id}:a", 1))
        old, new = make_adapter(f"{engine.model.id}:a", 1), make_adapter(f"{engine.model.id}:a", 2)
        await engine.load_adapter(old)
        request = ask(most=self.NUM_LONG, adapter=old.spec.id)
        expected = await collect(engine, request)
        _, events, running = await _start(engine, request)
        await engine.load_adapter(new)
        after = await collect(engine, replace(request, stop=StopParams(max_tokens=16, ignore_eos=True)))
        async for event in events:
            running.take(event)
        assert running.tokens == expected.tokens
        assert running.started is not None and running.started.model_version == old.spec.version
        assert after.started is not None and after.started.model_version == new.spec.version
        assert after.tokens[0] != expected.tokens[0][:16] and engine.adapters() == (new.spec,)

    async def test_an_unload_waits_for_what_runs_and_refuses_what_comes(
        self, engine: Engine, make_adapter: MakeAdapter
    ) -> None:
        await require_lora(engine, make_adapter(f"{engine.model.id}:a", 1))
        files = make_adapter(f"{engine.model.id}:a", 1)
        await engine.load_adapter(files)
        _, events, running = await _start(engine, ask(most=self.NUM_LONG, adapter=files.spec.id))
        unloading = asyncio.create_task(engine.unload_adapter(files.spec.id))
        await asyncio.sleep(0)
        with pytest.raises(PlatformError) as raised:
            engine.submit(ask(adapter=files.spec.id), lambda _: None)
        assert raised.value.code is Code.NOT_FOUND and not unloading.done()
        async for event in events:
            running.take(event)
        await unloading
        assert running.reasons[0] is FinishReason.LENGTH and len(running.tokens[0]) == self.NUM_LONG
        with pytest.raises(PlatformError) as raised:
            await engine.unload_adapter(files.spec.id)
        assert raised.value.code is Code.NOT_FOUND

    async def test_a_damaged_adapter_changes_nothing(self, engine: Engine, make_adapter: MakeAdapter) -> None:
        await require_lora(engine, make_adapter(f"{engine.model.id}:a", 1))
        good = make_adapter(f"{engine.model.id}:a", 1)
        await engine.load_adapter(good)
        worse = make_adapter(f"{engine.model.id}:a", 2)
        with pytest.raises(PlatformError) as raised:
            await engine.load_adapter(replace(worse, tensors=b""))
        assert raised.value.code is Code.DATA_LOSS and not raised.value.retryable
        assert engine.adapters() == (good.spec,)
        assert (await collect(engine, ask(adapter=good.spec.id))).reasons[0] is FinishReason.LENGTH
