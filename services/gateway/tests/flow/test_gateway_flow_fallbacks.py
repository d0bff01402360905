"""Fallbacks between models: when another answers, when none may, and that nothing is told twice."""

import asyncio
from contextlib import aclosing, asynccontextmanager

import pytest

from chassis.errors import Code, PlatformError
from gateway.core.account import Account
from gateway.core.graph import Answering, Deadline, Fallbacks, GraphRequest, Grounding
from gateway.core.ports import Principal
from gateway.core.services import Delta, Done, Finished, Started, Usage
from gateway.core.serving import Ask, Serving

AWAY = PlatformError(Code.UNAVAILABLE, "not there")
BUSY = PlatformError(Code.OVERLOADED, "full")
LATE = PlatformError(Code.DEADLINE_EXCEEDED, "late")
BAD = PlatformError(Code.INVALID_ARGUMENT, "no")
ANSWER = [Started(3, "v1"), Delta(0, "a", 1), Finished(0, "stop"), Done(Usage(3, 1))]


class FakeGraph:
    """Gives its events; an error among them is raised, a number is waited for."""

    identity = None  # never shared nor kept

    def __init__(self, name, *events, fallbacks=(), first_token_s=None):
        self.name = name
        self.uses_generator = True
        self.identity = None  # its answers are shared with nobody
        self.events = events
        self.fallbacks = Fallbacks(tuple(fallbacks), first_token_s)
        self.num_runs = self.num_closed = 0

    async def run(self, request, deadline):
        self.num_runs += 1
        try:
            for event in self.events:
                if isinstance(event, Exception):
                    raise event
                if isinstance(event, int | float):
                    await asyncio.sleep(event)
                else:
                    yield event
        finally:
            self.num_closed += 1


class FakeCatalog:
    def __init__(self, *graphs):
        self.graphs = {graph.name: graph for graph in graphs}

    async def graph(self, name, tenant):
        if name not in self.graphs:
            raise PlatformError(Code.NOT_FOUND, name)
        return self.graphs[name]


class FullFor:
    """An admission that is full for some models."""

    def __init__(self, *models):
        self.models = models
        self.held = []

    @asynccontextmanager
    async def hold(self, ask):
        if ask.model in self.models:
            raise BUSY
        self.held.append(ask.model)
        yield
        self.held.remove(ask.model)


async def answered(*graphs, within_s=30.0, **serving):
    """Asks the first graph; returns the events and the account."""
    principal = Principal("k", "acme")
    account = Account("r", "t", "", "/v1/completions", principal, model=graphs[0].name)
    ask = Ask(principal, account, Deadline.after(within_s), graphs[0].name, (GraphRequest(prompt="x", tenant="acme"),))
    async with aclosing(Serving(FakeCatalog(*graphs), **serving).run(ask, graphs[0])) as events:
        return [event async for event in events], account


@pytest.mark.parametrize("error", [AWAY, BUSY, LATE], ids=lambda error: error.code.value)
async def test_another_model_answers_and_says_so(error):
    told = []
    first, second = FakeGraph("first", error, fallbacks=["second"]), FakeGraph("second", *ANSWER)
    events, account = await answered(first, second, on_fallback=lambda *names: told.append(names))
    assert events == [Answering("second"), *ANSWER] and told == [("first", "second")]
    assert account.model == "second" and account.answer_headers["x-pressroom-model"] == "second"
    assert account.usage == Usage(3, 1)


async def test_the_model_that_was_asked_is_named_too():
    events, account = await answered(FakeGraph("first", *ANSWER, fallbacks=["second"]), FakeGraph("second", AWAY))
    assert events == ANSWER and account.answer_headers["x-pressroom-model"] == "first"


async def test_what_was_not_passed_on_is_not_accounted():
    lost = [Grounding(True), Started(500, "v1"), AWAY]
    events, account = await answered(FakeGraph("first", *lost, fallbacks=["second"]), FakeGraph("second", *ANSWER))
    assert events == [Answering("second"), *ANSWER] and account.usage.prompt_tokens == 3
    assert not account.is_exact  # the generator is asked what the first try used


async def test_what_another_server_tells_is_exact_though_the_generator_was_asked_first():
    second = FakeGraph("second", *ANSWER)
    second.uses_generator = False
    _, account = await answered(FakeGraph("first", Started(500, "v1"), AWAY, fallbacks=["second"]), second)
    assert account.is_exact and account.usage == Usage(3, 1)


async def test_a_model_that_has_begun_to_speak_is_not_replaced():
    second = FakeGraph("second", *ANSWER)
    with pytest.raises(PlatformError) as caught:
        await answered(FakeGraph("first", *ANSWER[:2], AWAY, fallbacks=["second"]), second)
    assert caught.value is AWAY and second.num_runs == 0


async def test_an_error_of_the_request_is_its_own():
    second = FakeGraph("second", *ANSWER)
    with pytest.raises(PlatformError) as caught:
        await answered(FakeGraph("first", BAD, fallbacks=["second"]), second)
    assert caught.value is BAD and second.num_runs == 0


async def test_the_next_is_tried_where_a_fallback_fails_and_the_first_error_is_told():
    first = FakeGraph("first", AWAY, fallbacks=["gone", "second", "third"])
    events, _ = await answered(first, FakeGraph("second", BUSY), FakeGraph("third", *ANSWER))
    assert events[0] == Answering("third")
    with pytest.raises(PlatformError) as caught:
        await answered(first, FakeGraph("second", BUSY), FakeGraph("third", BAD))
    assert caught.value is AWAY


async def test_a_model_that_is_slow_to_begin_is_replaced_and_stopped():
    first = FakeGraph("first", Started(3, "v1"), 30.0, *ANSWER, fallbacks=["second"], first_token_s=0.02)
    events, _ = await answered(first, FakeGraph("second", 0.1, *ANSWER))
    assert events[0] == Answering("second") and first.num_closed == 1


async def test_a_slow_answer_that_has_begun_is_left_alone():
    first = FakeGraph("first", *ANSWER[:2], 0.1, *ANSWER[2:], fallbacks=["second"], first_token_s=0.02)
    events, _ = await answered(first, FakeGraph("second", *ANSWER))
    assert events == ANSWER


async def test_no_fallback_where_the_requests_own_time_is_up():
    second = FakeGraph("second", *ANSWER)
    with pytest.raises(PlatformError) as caught:
        await answered(FakeGraph("first", 0.05, LATE, fallbacks=["second"]), second, within_s=0.02)
    assert caught.value is LATE and second.num_runs == 0


async def test_a_full_queue_leads_to_the_fallback_and_its_place_is_held():
    admission = FullFor("first")
    first, second = FakeGraph("first", *ANSWER, fallbacks=["second"]), FakeGraph("second", *ANSWER)
    events, _ = await answered(first, second, admission=admission)
    assert events[0] == Answering("second") and first.num_runs == 0 and admission.held == []
    with pytest.raises(PlatformError) as caught:
        await answered(first, second, admission=FullFor("first", "second"))
    assert caught.value is BUSY
