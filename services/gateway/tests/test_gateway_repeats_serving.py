"""Repeats on the way to a model: what is shared and kept, with whom, and what the account says of it."""

import asyncio
from contextlib import aclosing
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chassis.errors import Code, PlatformError
from gateway.core.account import Account, Wish
from gateway.core.graph import Answering, Deadline, Fallbacks, GraphRequest, Grounding
from gateway.core.policy import Policy
from gateway.core.ports import Principal
from gateway.core.repeats import HEADER, UNTOLD, Repeats, key_of
from gateway.core.services import (
    Chat,
    Delta,
    Done,
    Finished,
    Grammar,
    Message,
    Sampling,
    Started,
    Stopping,
    ToolCalls,
    Usage,
)
from gateway.core.serving import Ask, Serving
from testkit import eventually

GREEDY = Sampling(temperature=0.0)


def request(text="say it", *, tenant="acme", sampling=GREEDY, **fields):
    return GraphRequest(Chat((Message("user", text),)), tenant, sampling=sampling, **fields)


def ask_of(*requests, principal=None, wish=Wish.UNSAID, timeout_s=30.0):
    requests = requests or (request(),)
    principal = principal or Principal("one", requests[0].tenant)
    account = Account("r", "t", "", "/v1/chat/completions", principal, cache_wish=wish)
    return Ask(principal, account, Deadline.after(timeout_s), "m", requests=requests)


class FakeGraph:
    """Answers with words; `may_begin` holds it before everything, `gate` before each word; `error` ends it."""

    name = "m"
    identity = "m declared so"
    fallbacks = Fallbacks()
    uses_generator = True

    def __init__(self):
        self.num_runs = self.num_stopped = 0
        self.version = "v1"
        self.words = ["a", "b", "c"]
        self.reason = "stop"
        self.gate: asyncio.Semaphore | None = None
        self.may_begin = asyncio.Event()
        self.may_begin.set()
        self.error: Exception | None = None
        self.grounding = None

    async def run(self, request, deadline):
        self.num_runs += 1
        is_whole = False
        try:
            await self.may_begin.wait()
            if self.grounding:
                yield self.grounding
            yield Started(5, self.version)
            for word in self.words:
                if self.gate is not None:
                    await self.gate.acquire()
                yield Delta(0, word, 1)
            if self.error is not None:
                raise self.error
            yield Finished(0, self.reason)
            yield Done(Usage(5, len(self.words), 2))
            is_whole = True
        finally:
            self.num_stopped += not is_whole


class FakeVersions:
    """Says the graph's version."""

    def __init__(self, graph):
        self.graph = graph
        self.is_known = self.is_told = True

    async def version(self, graph):
        await asyncio.sleep(0)
        if not self.is_told:
            return UNTOLD
        return self.graph.version if self.is_known else None


class FakeCache:
    def __init__(self):
        self.entries = {}

    async def get(self, key):
        await asyncio.sleep(0)
        return self.entries.get(key)

    async def put(self, key, entry):
        self.entries[key] = entry


class Stages:
    """Counts who holds; refuses those whose key is `refused`."""

    def __init__(self):
        self.holding = 0
        self.num_held = 0
        self.refused: str | None = None
        self.most_tokens: int | None = None  # what is left for a request that names no end

    def hold(self, ask):
        return _Held(self, ask)


class _Held:
    def __init__(self, stages, ask):
        self.stages, self.ask = stages, ask

    async def __aenter__(self):
        await asyncio.sleep(0)
        if self.ask.principal.key_id == self.stages.refused:
            raise PlatformError(Code.RATE_LIMITED, "too many tokens")
        if self.stages.most_tokens is not None:
            stopping = Stopping(max_tokens=self.stages.most_tokens)
            self.ask.requests = tuple(replace(one, stopping=stopping) for one in self.ask.requests)
        self.stages.holding += 1
        self.stages.num_held += 1

    async def __aexit__(self, *_):
        self.stages.holding -= 1


class World:
    def __init__(self):
        self.graph = FakeGraph()
        self.versions = FakeVersions(self.graph)
        self.cache = FakeCache()
        self.stages = Stages()
        self.repeats = Repeats(self.versions, self.cache)
        self.serving = Serving(None, (self.stages,), repeats=self.repeats)

    async def answer(self, ask):
        async with aclosing(self.serving.run(ask, self.graph)) as events:
            return [event async for event in events]

    def start(self, ask):
        return asyncio.create_task(self.answer(ask))

    async def at_rest(self):
        await self.repeats.close()
        assert self.stages.holding == 0 and not self.repeats.running


@pytest.fixture
def world():
    return World()


def text_of(events):
    return "".join(event.text for event in events if isinstance(event, Delta))


def usage_of(ask):
    usage = ask.account.record(200)
    return usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens


class TestCache:
    async def test_second_answer_is_the_first_ones_events_marked_as_cached_and_uses_nothing(self, world):
        first, second = ask_of(wish=Wish.ON), ask_of(wish=Wish.ON)
        fresh = await world.answer(first)
        await world.at_rest()
        repeated = await world.answer(second)
        assert world.graph.num_runs == 1 and world.stages.num_held == 1
        assert repeated[:-1] == fresh[:-1]
        assert repeated[-1] == Done(Usage(5, 3, 5))  # all of the prompt was cached
        assert (first.account.answer_headers[HEADER], second.account.answer_headers[HEADER]) == ("miss", "hit")
        assert (usage_of(first), usage_of(second)) == ((5, 3, 2), (0, 0, 0))
        record = second.account.record(200)
        assert (record.repeat, record.repeated_prompt_tokens, record.repeated_completion_tokens) == ("hit", 5, 3)
        assert record.finish_reason == "stop"

    @pytest.mark.parametrize("where", ["policy", "tenant_policy"])
    async def test_policy_of_key_or_tenant_opts_in(self, world, where):
        principal = replace(Principal("one", "acme"), **{where: Policy(caches=True)})
        for _ in range(2):
            await world.answer(ask_of(principal=principal))
            await world.at_rest()
        assert world.graph.num_runs == 1

    async def test_nothing_is_kept_or_said_without_opting_in(self, world):
        asks = ask_of(), ask_of()
        for ask in asks:
            await world.answer(ask)
            await world.at_rest()
        assert world.graph.num_runs == 2 and not world.cache.entries
        assert all(HEADER not in ask.account.answer_headers for ask in asks)

    @pytest.mark.parametrize(
        ("sampling", "num_runs"),
        [(Sampling(), 2), (Sampling(temperature=0.7), 2), (Sampling(temperature=0.7, seed=0), 1), (GREEDY, 1)],
    )
    async def test_policy_caches_what_is_no_matter_of_chance(self, world, sampling, num_runs):
        principal = Principal("one", "acme", policy=Policy(caches=True))
        for _ in range(2):
            await world.answer(ask_of(request(sampling=sampling), principal=principal))
            await world.at_rest()
        assert world.graph.num_runs == num_runs

    async def test_header_caches_even_what_is_a_matter_of_chance(self, world):
        for _ in range(2):
            await world.answer(ask_of(request(sampling=Sampling(temperature=0.7)), wish=Wish.ON))
            await world.at_rest()
        assert world.graph.num_runs == 1

    async def test_off_neither_reads_nor_keeps(self, world):
        principal = Principal("one", "acme", policy=Policy(caches=True))
        for wish in (Wish.OFF, Wish.ON, Wish.OFF):
            await world.answer(ask_of(principal=principal, wish=wish))
            await world.at_rest()
        assert world.graph.num_runs == 3

    async def test_refresh_runs_anew_and_keeps(self, world):
        await world.answer(ask_of(wish=Wish.ON))
        world.graph.words = ["new"]
        await world.answer(ask_of(wish=Wish.REFRESH))
        await world.at_rest()
        assert text_of(await world.answer(ask_of(wish=Wish.ON))) == "new"
        assert world.graph.num_runs == 2

    async def test_another_version_of_the_model_never_serves_old_answers(self, world):
        await world.answer(ask_of(wish=Wish.ON))
        await world.at_rest()
        world.graph.version, world.graph.words = "v2", ["new"]
        assert text_of(await world.answer(ask_of(wish=Wish.ON))) == "new"
        await world.at_rest()
        assert text_of(await world.answer(ask_of(wish=Wish.ON))) == "new"
        assert world.graph.num_runs == 2

    async def test_nothing_is_served_while_the_version_is_not_known(self, world):
        await world.answer(ask_of(wish=Wish.ON))
        await world.at_rest()
        world.versions.is_known = False
        await world.answer(ask_of(wish=Wish.ON))
        assert world.graph.num_runs == 2

    @pytest.mark.parametrize("spoil", ["error", "cancelled", "deadline", "grounded", "a fallback", "less"])
    async def test_only_whole_and_good_answers_are_kept(self, world, spoil):
        match spoil:
            case "error":
                world.graph.error = PlatformError(Code.UNAVAILABLE, "gone")
            case "grounded":
                world.graph.grounding = Grounding(grounded=True)
            case "a fallback":
                world.graph.grounding = Answering("other")
            case "less":
                world.stages.most_tokens = 1
            case _:
                world.graph.reason = spoil
        try:
            await world.answer(ask_of(wish=Wish.ON))
        except PlatformError:
            assert spoil in ("error", "cancelled", "deadline")
        await world.at_rest()
        assert not world.cache.entries

    async def test_answers_of_an_upstream_are_served_whatever_it_calls_its_version(self, world):
        world.versions.is_told = False
        for version in ("", "fp_1"):
            world.graph.version = version
            assert text_of(await world.answer(ask_of(wish=Wish.ON))) == "abc"
            await world.at_rest()
        assert world.graph.num_runs == 1

    async def test_answer_without_a_version_is_never_served_where_there_is_one(self, world):
        world.graph.version = ""
        await world.answer(ask_of(wish=Wish.ON))
        await world.at_rest()
        world.graph.version = "v1"
        await world.answer(ask_of(wish=Wish.ON))
        assert world.graph.num_runs == 2

    async def test_graph_without_identity_is_never_kept_nor_shared(self, world):
        world.graph.identity = None
        await asyncio.gather(*(world.answer(ask_of(wish=Wish.ON)) for _ in range(3)))
        await world.at_rest()
        assert world.graph.num_runs == 3 and not world.cache.entries

    async def test_length_is_kept(self, world):
        world.graph.reason = "length"
        await world.answer(ask_of(wish=Wish.ON))
        await world.at_rest()
        assert world.cache.entries


class TestSingleFlight:
    async def test_identical_concurrent_requests_share_one_run_that_one_pays(self, world):
        asks = [ask_of() for _ in range(20)]
        answers = await asyncio.gather(*map(world.answer, asks))
        await world.at_rest()
        assert world.graph.num_runs == 1 and world.stages.num_held == 1
        assert {text_of(events) for events in answers} == {"abc"}
        assert sorted(usage_of(ask) for ask in asks) == [(0, 0, 0)] * 19 + [(5, 3, 2)]
        assert sorted(ask.account.record(200).repeat for ask in asks) == [""] + ["shared"] * 19
        assert sum(ask.account.answer_headers.get(HEADER) == "shared" for ask in asks) == 19

    async def test_follower_gets_what_was_said_before_it_came_and_then_follows_live(self, world):
        world.graph.gate = asyncio.Semaphore(2)
        leader = world.start(ask_of())
        await eventually(lambda: world.graph.gate.locked())
        seen = []
        async with aclosing(world.serving.run(ask_of(), world.graph)) as events:
            async for event in events:
                seen.append(event)
                if text_of(seen) == "ab":
                    world.graph.gate.release()
        assert text_of(seen) == text_of(await leader) == "abc"
        await world.at_rest()

    async def test_tenants_never_share(self, world):
        await asyncio.gather(*(world.answer(ask_of(request(tenant=tenant))) for tenant in ("acme", "other")))
        assert world.graph.num_runs == 2

    @pytest.mark.parametrize("wish", [Wish.OFF, Wish.REFRESH])
    async def test_can_be_switched_off(self, world, wish):
        await asyncio.gather(*(world.answer(ask_of(wish=wish)) for _ in range(3)))
        await world.at_rest()
        assert world.graph.num_runs == 3

    async def test_matters_of_chance_do_not_share(self, world):
        await asyncio.gather(*(world.answer(ask_of(request(sampling=Sampling()))) for _ in range(3)))
        assert world.graph.num_runs == 3

    async def test_leader_that_leaves_takes_nobody_with_it_and_pays_for_all(self, world):
        world.graph.gate = asyncio.Semaphore(1)
        paid, free = ask_of(), ask_of()
        leader = world.start(paid)
        await eventually(lambda: world.graph.gate.locked())
        follower = world.start(free)
        await asyncio.sleep(0.01)
        leader.cancel()
        await asyncio.sleep(0.01)
        assert not leader.done() and world.graph.num_stopped == 0  # its account is open until the run has ended
        for _ in range(2):
            world.graph.gate.release()
        assert text_of(await follower) == "abc"
        with pytest.raises(asyncio.CancelledError):
            await leader
        assert (usage_of(paid), usage_of(free)) == ((5, 3, 2), (0, 0, 0))
        await world.at_rest()

    async def test_run_stops_at_once_when_nobody_listens(self, world):
        world.graph.gate = asyncio.Semaphore(1)
        tasks = [world.start(ask_of()) for _ in range(3)]
        await eventually(lambda: world.graph.gate.locked())
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        assert world.graph.num_stopped == 1
        await world.at_rest()

    async def test_request_after_a_stopped_run_gets_one_of_its_own(self, world):
        world.graph.gate = asyncio.Semaphore(1)
        task = world.start(ask_of())
        await eventually(lambda: world.graph.gate.locked())
        task.cancel()
        world.graph.gate = None
        assert text_of(await world.answer(ask_of())) == "abc"
        await asyncio.wait({task})
        await world.at_rest()

    async def test_error_of_the_run_is_told_to_all(self, world):
        world.graph.words, world.graph.error = [], PlatformError(Code.OUT_OF_RANGE, "too long", param="prompt")
        results = await asyncio.gather(*(world.answer(ask_of()) for _ in range(5)), return_exceptions=True)
        assert world.graph.num_runs == 1
        assert [(error.code, error.param) for error in results] == [(Code.OUT_OF_RANGE, "prompt")] * 5
        assert len({id(error) for error in results}) == 5  # each names the field in the words of its own API
        await world.at_rest()

    async def test_refusal_of_the_leader_is_its_own_affair(self, world):
        world.stages.refused = "one"
        refused, others = ask_of(), [ask_of(principal=Principal("two", "acme")) for _ in range(4)]
        results = await asyncio.gather(*map(world.answer, [refused, *others]), return_exceptions=True)
        assert results[0].code is Code.RATE_LIMITED
        assert [text_of(events) for events in results[1:]] == ["abc"] * 4
        assert world.graph.num_runs == 1
        await world.at_rest()

    async def test_run_that_a_limit_cut_short_is_its_leaders_alone(self, world):
        world.stages.most_tokens = 1
        asks = [ask_of() for _ in range(4)]
        await asyncio.gather(*map(world.answer, asks))
        await world.at_rest()
        assert world.graph.num_runs == 4
        assert {ask.account.record(200).repeat for ask in asks} == {""}
        assert all(HEADER not in ask.account.answer_headers for ask in asks)

    async def test_run_with_little_time_left_is_not_joined_by_who_has_more(self, world):
        world.graph.gate = asyncio.Semaphore(0)
        leader = world.start(ask_of(timeout_s=5.0))
        await asyncio.sleep(0.01)
        others = [world.start(ask_of(timeout_s=timeout_s)) for timeout_s in (30.0, 30.0, 8.0)]
        await asyncio.sleep(0.01)
        for _ in range(6):
            world.graph.gate.release()
        assert {text_of(events) for events in await asyncio.gather(leader, *others)} == {"abc"}
        assert world.graph.num_runs == 2

    async def test_run_in_the_background_is_not_joined_by_people(self, world):
        world.graph.gate = asyncio.Semaphore(0)
        tasks = [world.start(ask_of(request(priority=priority))) for priority in (-10, 0, 0)]
        await asyncio.sleep(0.01)
        for _ in range(6):
            world.graph.gate.release()
        assert {text_of(events) for events in await asyncio.gather(*tasks)} == {"abc"}
        assert world.graph.num_runs == 2

    async def test_follower_says_which_model_answers(self, world):
        world.graph.grounding = Answering("other")
        asks = [ask_of() for _ in range(2)]
        await asyncio.gather(*map(world.answer, asks))
        assert [ask.account.record(200).model for ask in asks] == ["other"] * 2
        assert asks[1].account.answer_headers["x-pressroom-model"] == "other"

    async def test_each_follower_has_its_own_deadline(self, world):
        world.graph.gate = asyncio.Semaphore(0)
        leader = world.start(ask_of())
        await asyncio.sleep(0.01)
        with pytest.raises(PlatformError) as caught:
            await world.answer(ask_of(timeout_s=0.05))
        assert caught.value.code is Code.DEADLINE_EXCEEDED
        for _ in range(3):
            world.graph.gate.release()
        assert text_of(await leader) == "abc"

    async def test_follower_of_a_run_that_has_said_nothing_leaves_at_its_own_deadline(self, world):
        world.graph.may_begin.clear()
        leader = world.start(ask_of())
        await eventually(lambda: world.graph.num_runs)
        async with asyncio.timeout(10.0):
            with pytest.raises(PlatformError) as caught:
                await world.answer(ask_of(timeout_s=0.05))
        assert caught.value.code is Code.DEADLINE_EXCEEDED
        world.graph.may_begin.set()
        assert text_of(await leader) == "abc" and world.graph.num_runs == 1

    async def test_run_of_an_old_version_is_not_joined(self, world):
        world.graph.gate = asyncio.Semaphore(1)
        leader = world.start(ask_of())
        await eventually(lambda: world.graph.gate.locked())
        world.graph.version, world.graph.gate = "v2", None
        follower = ask_of()
        await world.answer(follower)
        assert follower.account.record(200).repeat == "" and world.graph.num_runs == 2
        leader.cancel()
        await asyncio.wait({leader})
        await world.at_rest()

    async def test_leader_that_reads_slowly_alone_holds_the_run_up(self, world):
        world.graph.words = ["x"] * 5000
        async with aclosing(world.serving.run(ask_of(), world.graph)) as events:
            await anext(events)
            await asyncio.sleep(0.05)
            [flight] = world.repeats.running
            assert len(flight.events) < 300
            assert sum([1 async for _ in events]) == 5002
        await world.at_rest()

    async def test_slow_follower_holds_nobody_up_and_is_told_when_it_has_lost_the_thread(self, world):
        world.graph.words = ["x"] * 30_000
        leader = world.start(ask_of())
        await asyncio.sleep(0)
        async with aclosing(world.serving.run(ask_of(), world.graph)) as events:
            await anext(events)
            assert len(text_of(await leader)) == 30_000
            with pytest.raises(PlatformError) as caught:
                await anext(events)
            assert caught.value.reason == "slow_reader"
        await world.at_rest()


SOME = st.sampled_from
REQUESTS = st.builds(
    GraphRequest,
    prompt=st.one_of(
        st.text(max_size=3), st.tuples(st.integers(0, 3)), SOME(["a", "b"]).map(lambda t: Chat((Message("user", t),)))
    ),
    tenant=SOME(["acme", "other", "acme:x"]),
    sampling=st.builds(
        Sampling,
        temperature=SOME([None, 0.0, 0.5]),
        top_k=SOME([0, 1]),
        seed=SOME([None, 0, 1]),
        logit_bias=SOME([{}, {1: 2.0, 3: 4.0}, {3: 4.0, 1: 2.0}, {1: 4.0}]),
    ),
    stopping=st.builds(Stopping, max_tokens=SOME([None, 1]), stop=SOME([(), ("a",), ("a", "b"), ("ab",)])),
    n=SOME([1, 2]),
    logprobs=SOME([None, 0, 1]),
    grammar=SOME([None, Grammar("regex", "a"), Grammar("choice", "a"), ToolCalls("a", True, False)]),
    adapter=SOME(["", "x"]),
    priority=SOME([0, 1]),
)


@settings(max_examples=400, deadline=None)
@given(first=REQUESTS, second=REQUESTS)
def test_keys_are_equal_exactly_where_everything_that_matters_is(first, second):
    is_same = replace(first, priority=0) == replace(second, priority=0)
    assert (key_of("m", (first,)) == key_of("m", (second,))) == is_same


@given(st.lists(REQUESTS, min_size=1, max_size=3))
def test_no_key_is_shared_between_tenants_graphs_or_numbers_of_prompts(requests):
    requests = [replace(one, tenant="acme") for one in requests]
    key = key_of("m", requests)
    assert key != key_of("m2", requests)
    assert key != key_of("m", [*requests, requests[0]])
    for tenant in ("other", "acme:", "acm", ""):
        assert key != key_of("m", [replace(one, tenant=tenant) for one in requests])
