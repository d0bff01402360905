"""The stage that holds requests to their limits: what is given back when, where the end of a request is not clear."""

import asyncio

import pytest

from chassis.errors import Code, PlatformError
from gateway.core.account import Account
from gateway.core.graph import Deadline
from gateway.core.limiting import Limiting, meters_of
from gateway.core.limits import LocalLimiter
from gateway.core.meters import Scope
from gateway.core.platform_limits import PlatformLimits
from gateway.core.policy import Algorithm, Counted, Limit, Policy
from gateway.core.ports import Principal
from gateway.core.services import Usage
from gateway.core.serving import Ask
from gateway.core.sizing import Size

PLACES, TOKENS = Limit(Counted.CONCURRENCY, 1), Limit(Counted.TOKENS, 100)


class FixedSizes:
    """Every request may use 60 tokens."""

    async def bound(self, ask):
        return Size(60, 60)

    async def exact(self, ask):
        return Size(60, 60)


class NoStore:
    async def limits(self):
        return ()


def asking(*limits, of_tenant=(), model="m", key_id="k"):
    principal = Principal(key_id, "acme", policy=Policy(limits=limits), tenant_policy=Policy(limits=tuple(of_tenant)))
    account = Account("r", "t", "", "/v1/chat/completions", principal)
    return Ask(principal, account, Deadline.after(30), model, inputs=("text",))


@pytest.fixture
def refused():
    return []


@pytest.fixture
def limiting(refused):
    return Limiting(LocalLimiter(), FixedSizes(), PlatformLimits(NoStore()), refused.append)


async def remaining(limiting, limit):
    """What a limit has left, as a refusal or an answer tells."""
    (meter,) = meters_of(asking(limit), ())
    return limiting._limiter.judge((meter,), 1000, 1000).standings[0].remaining


async def test_where_only_the_generator_knows_what_was_used_the_place_is_free_and_the_tokens_are_held(limiting):
    ask = asking(PLACES, TOKENS)
    with pytest.raises(ConnectionError):
        async with limiting.hold(ask):
            ask.account.asks_generator()
            ask.account.prompt_known(3)
            ask.account.produced(2, "two tokens")
            raise ConnectionError  # the client left
    async with limiting.hold(asking(PLACES)):
        pass
    assert await remaining(limiting, TOKENS) == 40
    ask.account.settled(Usage(3, 4))  # two more were computed than had arrived
    assert await remaining(limiting, TOKENS) == 93
    ask.account.settled(Usage(3, 4))
    assert await remaining(limiting, TOKENS) == 93


async def test_what_is_known_at_the_end_is_given_back_at_the_end(limiting):
    ask = asking(PLACES, TOKENS)
    async with limiting.hold(ask):
        ask.account.asks_generator()
        assert await remaining(limiting, TOKENS) == 40
        ask.account.done(Usage(3, 8))
    assert await remaining(limiting, TOKENS) == 89
    async with limiting.hold(asking(PLACES)):
        pass


async def test_more_than_was_reserved_is_counted_too_and_nothing_goes_below_zero(limiting):
    ask = asking(TOKENS)
    async with limiting.hold(ask):
        ask.account.done(Usage(70, 50))
    assert await remaining(limiting, TOKENS) == 0


async def test_a_request_that_is_cancelled_while_it_waits_for_its_turn_holds_nothing(limiting):
    drip = Limit(Counted.TOKENS, 60, 60.0, Algorithm.LEAKY_BUCKET)
    first = asking(drip)
    async with limiting.hold(first):
        first.account.done(Usage(3, 0))

    async def wait():
        async with limiting.hold(asking(drip)):
            raise AssertionError("three tokens flow out in three seconds")

    task = asyncio.create_task(wait())
    await asyncio.sleep(0.05)
    assert not task.done()
    task.cancel()
    await asyncio.wait({task})
    assert task.cancelled()
    (meter,) = meters_of(asking(drip), ())
    verdict = limiting._limiter.judge((meter,), 60, 60)
    assert verdict.allowed and verdict.wait_s <= 3


async def test_every_limit_without_room_is_counted_and_the_one_that_lasts_longest_is_named(limiting, refused):
    slow, fast = Limit(Counted.REQUESTS, 1, 3600.0), Limit(Counted.REQUESTS, 1, 60.0)
    async with limiting.hold(asking(fast, of_tenant=[slow])):
        pass
    with pytest.raises(PlatformError) as error:
        async with limiting.hold(asking(fast, of_tenant=[slow])):
            pass
    assert error.value.code is Code.RATE_LIMITED
    assert "this key's tenant may send 1 requests per 3600 s" in error.value.message
    assert 3590 < error.value.retry_after_s <= 3600
    assert {meter.scope for meter in refused} == {Scope.KEY, Scope.TENANT}


def test_of_two_limits_that_count_the_same_the_narrower_holds():
    meters = meters_of(asking(Limit(Counted.TOKENS, 500), Limit(Counted.TOKENS, 100), Limit(Counted.TOKENS, 300)), ())
    assert [meter.limit.amount for meter in meters] == [100]


def test_a_limit_on_a_model_holds_for_what_was_tuned_from_it():
    limit = Limit(Counted.REQUESTS, 1, model="base")
    assert meters_of(asking(limit, model="base"), ()) == meters_of(asking(limit, model="base:mine"), ())
    assert meters_of(asking(limit, model="other"), ()) == ()


def test_limits_are_counted_apart_by_key_tenant_and_model():
    limits = (TOKENS, Limit(Counted.TOKENS, 100, model="m"), Limit(Counted.TOKENS, 100, 30.0), PLACES)
    mine = meters_of(asking(*limits, of_tenant=limits), limits)
    others = meters_of(asking(*limits, of_tenant=limits, key_id="other"), limits)
    assert len({meter.name for meter in mine}) == 12
    shared = {meter.name for meter in mine} & {meter.name for meter in others}
    assert len(shared) == 8  # all but those of the key
