"""The algorithms of limits: in memory beside a slow reference that reads the history, in Valkey beside memory."""

import copy
from fractions import Fraction

import pytest
import redis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gateway.backends import valkey_scripts
from gateway.backends.valkey_limits import _args, _verdict
from gateway.core.counts import LEAKY_WAIT_MS
from gateway.core.limits import LocalLimiter
from gateway.core.meters import Meter, Scope
from gateway.core.policy import Algorithm, Counted, Limit

MAX_AMOUNT = 12
MAX_WINDOW_MS = 400
LEASE_MS = 10**9  # nobody dies here

limits = st.builds(
    Limit,
    counted=st.sampled_from(Counted),
    amount=st.integers(1, MAX_AMOUNT),
    window_s=st.integers(1, MAX_WINDOW_MS).map(lambda ms: ms / 1000),
    algorithm=st.sampled_from(Algorithm),
)


def meters_of(chosen, prefix=""):
    return tuple(Meter(f"{prefix}{number}", Scope.KEY, limit) for number, limit in enumerate(chosen))


# A life: after so many milliseconds a request comes that needs from least to most tokens, or one that runs has ended
# and used some part of what it was given. Most gaps are short, so that limits are met.
gaps_ms = st.one_of(st.integers(0, 20), st.integers(0, 2 * MAX_WINDOW_MS))
arrivals = st.tuples(st.just("arrives"), gaps_ms, st.integers(1, MAX_AMOUNT), st.integers(1, MAX_AMOUNT))
ends = st.tuples(st.just("ends"), gaps_ms, st.integers(0, 100), st.floats(0, 1))
lives = st.lists(st.one_of(arrivals, ends), min_size=1, max_size=60)


def play(life, clock, reserve, settle):
    """Leads a limiter through a life; yields (what, tokens used or None, verdict) of each step."""
    running = []
    for what, gap_ms, first, second in life:
        clock.advance_ms(gap_ms)
        if what == "arrives":
            verdict = reserve(min(first, second), max(first, second))
            if verdict.allowed:
                running.append(verdict)
            yield "arrives", None, verdict
        elif running:
            verdict = running.pop(first % len(running))
            used = round(second * verdict.tokens)
            settle(verdict, used)
            yield "ends", used, verdict


class MsClock:
    """A clock in whole milliseconds that says seconds."""

    def __init__(self, now_ms=1_000_000):
        self.now_ms = now_ms

    def __call__(self):
        return self.now_ms / 1000

    def advance_ms(self, gap_ms):
        self.now_ms += gap_ms


class History:
    """Everything that ever happened to one meter."""

    def __init__(self, meter):
        self.meter = meter
        self.amount, self.window_ms = meter.limit.amount, meter.window_ms
        self.used = []  # when, how much; 0 where a request was let in that holds something
        self.held = 0

    def let_in(self, now_ms, tokens):
        self.held += self.meter.cost(tokens) if self.meter.is_held else 0
        self.used.append((now_ms, 0 if self.meter.is_held else 1))

    def ended(self, now_ms, tokens, used):
        if self.meter.is_held:
            self.held -= self.meter.cost(tokens)
            self.used.append((now_ms, used if self.meter.limit.counted is Counted.TOKENS else 0))

    def windows(self):
        """The sums of the fixed windows, by their starts."""
        sums, start_ms = {}, None
        for at_ms, amount in self.used:
            if start_ms is None or at_ms >= start_ms + self.window_ms:
                start_ms, sums[at_ms] = at_ms, 0
            sums[start_ms] += amount
        return sums

    def in_window(self, now_ms):
        sums = self.windows()
        last_ms = max(sums, default=None)
        return 0 if last_ms is None or now_ms >= last_ms + self.window_ms else sums[last_ms]

    def in_log(self, now_ms):
        return sum(amount for at_ms, amount in self.used if now_ms - self.window_ms < at_ms <= now_ms)

    def level(self, now_ms):
        """What is missing from the bucket, in units, exactly."""
        level, last_ms = Fraction(0), 0
        for at_ms, amount in [*self.used, (now_ms, 0)]:
            level = max(Fraction(0), level - Fraction((at_ms - last_ms) * self.amount, self.window_ms)) + amount
            last_ms = at_ms
        return level

    def fits(self, now_ms, cost):
        limit = self.meter.limit
        if limit.counted is Counted.CONCURRENCY:
            return self.held + cost <= self.amount
        match limit.algorithm:
            case Algorithm.FIXED_WINDOW:
                return self.in_window(now_ms) + self.held + cost <= self.amount
            case Algorithm.SLIDING_LOG:
                return self.in_log(now_ms) + self.held + cost <= self.amount
            case Algorithm.TOKEN_BUCKET:
                return self.level(now_ms) + self.held + cost <= self.amount
            case Algorithm.LEAKY_BUCKET:
                return cost <= self.amount and self.wait_ms(now_ms) <= min(LEAKY_WAIT_MS, self.window_ms)

    def wait_ms(self, now_ms):
        return -(-(self.level(now_ms) + self.held) * self.window_ms // self.amount)


@given(chosen=st.lists(limits, min_size=1, max_size=3), life=lives)
@settings(max_examples=400, deadline=None)
def test_every_decision_is_that_of_the_history(chosen, life):
    clock = MsClock()
    limiter = LocalLimiter(clock=clock)
    meters = meters_of(chosen)
    histories = [History(meter) for meter in meters]
    wanted = {}

    def reserve(least, most):
        # Most of the tokens that every limit on them has room for: found by trying.
        fitting = [
            tokens
            for tokens in range(least, most + 1)
            if all(h.fits(clock.now_ms, tokens) for h in histories if h.meter.limit.counted is Counted.TOKENS)
        ]
        wanted["tokens"] = max(fitting, default=least)
        wanted["fits"] = [h.fits(clock.now_ms, h.meter.cost(wanted["tokens"])) for h in histories]
        wanted["wait_ms"] = max(
            (h.wait_ms(clock.now_ms) for h in histories if h.meter.algorithm == "leaky_bucket"), default=0
        )
        return limiter.judge(meters, least, most)

    for what, used, verdict in play(life, clock, reserve, limiter.settle):
        if what == "ends":
            for history in histories:
                history.ended(clock.now_ms, verdict.tokens, used)
            continue
        assert verdict.tokens == wanted["tokens"]
        assert [standing.fits for standing in verdict.standings] == wanted["fits"]
        assert verdict.allowed == all(wanted["fits"])
        if verdict.allowed:
            assert verdict.wait_s * 1000 == wanted["wait_ms"]
            for history in histories:
                history.let_in(clock.now_ms, verdict.tokens)
    for history in histories:
        never_over(history, clock.now_ms)


def never_over(history, now_ms):
    """No span of time has seen more than its limit, reading the whole history."""
    amount, window_ms, limit = history.amount, history.window_ms, history.meter.limit
    if limit.counted is Counted.CONCURRENCY:
        assert history.held <= amount
    elif limit.algorithm is Algorithm.FIXED_WINDOW:
        assert all(used <= amount for used in history.windows().values())
    elif limit.algorithm is Algorithm.SLIDING_LOG:
        assert all(history.in_log(at_ms) <= amount for at_ms, _ in history.used)
    else:
        most = amount if limit.algorithm is Algorithm.TOKEN_BUCKET else _queue(amount, window_ms)
        for first, (start_ms, _) in enumerate(history.used):
            used = 0
            for at_ms, one in history.used[first:]:
                used += one
                assert used <= most + Fraction((at_ms - start_ms) * amount, window_ms)


def _queue(amount, window_ms):
    """What can be in a leaky bucket: what flows out while the last one waits, and the last one."""
    return Fraction(min(LEAKY_WAIT_MS, window_ms) * amount, window_ms) + amount


@given(chosen=st.lists(limits, min_size=1, max_size=3), life=lives)
@settings(max_examples=300, deadline=None)
def test_who_waits_as_long_as_it_is_told_passes_unless_others_still_hold(chosen, life):
    clock = MsClock()
    limiter = LocalLimiter(clock=clock)
    meters = meters_of(chosen)
    running = 0
    for what, _, verdict in play(life, clock, lambda least, most: limiter.judge(meters, least, most), limiter.settle):
        running += 1 if what == "arrives" and verdict.allowed else -1 if what == "ends" else 0
        if verdict.allowed or (running and any(meter.is_held for meter in meters)):
            continue
        if any(meter.cost(verdict.tokens) > meter.limit.amount for meter in meters):
            continue  # no waiting helps
        retry_ms = round(max(standing.retry_s for standing in verdict.standings) * 1000)
        assert not _later(limiter, clock, retry_ms - 1).judge(meters, verdict.tokens, verdict.tokens).allowed
        assert _later(limiter, clock, retry_ms).judge(meters, verdict.tokens, verdict.tokens).allowed


def _later(limiter, clock, gap_ms):
    later = copy.deepcopy(limiter)
    later._clock = MsClock(clock.now_ms + gap_ms)
    return later


@given(chosen=st.lists(limits, min_size=2, max_size=4), life=lives)
@settings(max_examples=200, deadline=None)
def test_a_refused_request_takes_nothing_of_any_limit(chosen, life):
    clock = MsClock()
    limiter, spared = LocalLimiter(clock=clock), LocalLimiter(clock=clock)
    meters = meters_of(chosen)
    ids = iter(range(1000))
    twins = {}

    def reserve(least, most):
        verdict = limiter.judge(meters, least, most)
        if verdict.allowed:  # the twin never sees what was refused
            twins[id(verdict)] = spared.judge(meters, least, most)
            assert twins[id(verdict)] == verdict, next(ids)
        return verdict

    def settle(verdict, used):
        limiter.settle(verdict, used)
        spared.settle(twins[id(verdict)], used)

    for _ in play(life, clock, reserve, settle):
        pass


def meter(counted, amount, *, algorithm=Algorithm.FIXED_WINDOW, window_s=60.0):
    return Meter(f"{counted}:{algorithm}", Scope.KEY, Limit(counted, amount, window_s, algorithm))


@pytest.mark.parametrize("algorithm", [Algorithm.FIXED_WINDOW, Algorithm.SLIDING_LOG, Algorithm.TOKEN_BUCKET])
def test_what_was_reserved_and_not_used_is_there_for_the_next_at_once(algorithm):
    clock = MsClock()
    limiter = LocalLimiter(clock=clock)
    tokens = (meter(Counted.TOKENS, 100, algorithm=algorithm),)
    first = limiter.judge(tokens, 100, 100)
    assert first.allowed and first.standings[0].remaining == 0
    assert not limiter.judge(tokens, 1, 1).allowed
    limiter.settle(first, 7)
    assert limiter.judge(tokens, 93, 93).allowed
    assert not limiter.judge(tokens, 1, 1).allowed


@pytest.mark.parametrize("algorithm", Algorithm)
def test_the_moment_that_is_told_is_the_first_that_passes(algorithm):
    clock = MsClock()
    limiter = LocalLimiter(clock=clock)
    requests = (meter(Counted.REQUESTS, 3, algorithm=algorithm, window_s=1.0),)
    verdict = limiter.judge(requests, 0, 0)
    while verdict.allowed:
        verdict = limiter.judge(requests, 0, 0)
    clock.advance_ms(round(verdict.standings[0].retry_s * 1000) - 1)
    assert not limiter.judge(requests, 0, 0).allowed
    clock.advance_ms(1)
    assert limiter.judge(requests, 0, 0).allowed


def test_tokens_that_a_request_may_have_fewer_of_are_shared_out_to_the_last():
    limiter = LocalLimiter(clock=MsClock())
    tokens = (meter(Counted.TOKENS, 100),)
    assert limiter.judge(tokens, 10, 70).tokens == 70
    assert limiter.judge(tokens, 10, 70).tokens == 30
    assert not limiter.judge(tokens, 10, 70).allowed


def test_leaky_bucket_lets_out_one_after_the_other_and_refuses_who_would_wait_too_long():
    clock = MsClock()
    limiter = LocalLimiter(clock=clock)
    requests = (meter(Counted.REQUESTS, 60, algorithm=Algorithm.LEAKY_BUCKET),)
    verdicts = [limiter.judge(requests, 0, 0) for _ in range(8)]
    assert [one.wait_s for one in verdicts if one.allowed] == [0, 1, 2, 3, 4, 5]
    assert [one.standings[0].retry_s for one in verdicts if not one.allowed] == [1, 1]
    clock.advance_ms(1000)
    assert limiter.judge(requests, 0, 0).wait_s == 5


def test_what_a_forgotten_meter_held_does_not_go_below_nothing():
    limiter = LocalLimiter(clock=MsClock(), max_meters=1)
    first = (meter(Counted.CONCURRENCY, 1),)
    verdict = limiter.judge(first, 0, 0)
    limiter.judge((meter(Counted.REQUESTS, 1),), 0, 0)  # the first is forgotten
    limiter.settle(verdict, 0)
    assert [limiter.judge(first, 0, 0).allowed for _ in range(2)] == [True, False]


class ScriptLimiter:
    """The scripts of ValkeyLimiter in a real Valkey, by the clock of a test."""

    def __init__(self, client, clock, meters):
        def script(text):
            return client.register_script(
                text.replace(valkey_scripts._CLOCK, "local now = tonumber(table.remove(ARGV))")
            )

        self._reserve, self._settle = script(valkey_scripts.RESERVE), script(valkey_scripts.SETTLE)
        self._clock, self._meters = clock, meters
        self._names = [meter.name for meter in meters]
        self._num_requests = 0

    def judge(self, least, most):
        self._num_requests += 1
        args = [f"r{self._num_requests}", LEASE_MS, least, most, *_args(self._meters), self._clock.now_ms]
        return _verdict(args[0], self._meters, self._reserve(self._names, args))

    def settle(self, verdict, used):
        held = verdict.held
        args = [verdict.id, LEASE_MS, used, *_args(held), self._clock.now_ms]
        self._settle([meter.name for meter in held], args)


@pytest.mark.integration
def test_valkey_decides_as_memory_does_on_the_same_clock(valkey):
    client = redis.Redis.from_url(valkey.url)
    num_lives = 0

    @given(chosen=st.lists(limits, min_size=1, max_size=3), life=lives)
    @settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    def agree(chosen, life):
        nonlocal num_lives
        num_lives += 1
        clock = MsClock()
        meters = meters_of(chosen, f"life{num_lives}:")
        local, shared, twins = LocalLimiter(clock=clock), ScriptLimiter(client, clock, meters), {}

        def reserve(least, most):
            mine, theirs = local.judge(meters, least, most), shared.judge(least, most)
            assert (theirs.allowed, theirs.tokens, theirs.standings) == (mine.allowed, mine.tokens, mine.standings)
            assert not mine.allowed or theirs.wait_s == mine.wait_s
            twins[id(mine)] = theirs
            return mine

        def settle(verdict, used):
            local.settle(verdict, used)
            shared.settle(twins[id(verdict)], used)

        for _ in play(life, clock, reserve, settle):
            pass

    agree()
    client.close()
