"""The fair queue: shares of tokens between tenants that wait, classes, pauses, and what a queue says of waits."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.core.fair_queue import Entry, FairQueue

COSTS = st.lists(st.integers(1, 4000), min_size=5, max_size=60)


def filled(*entries):
    queue = FairQueue()
    for entry in entries:
        queue.add(entry)
    return queue


def pop(queue):
    entry = queue.first()
    queue.take(entry)
    return entry


def order(queue):
    return [pop(queue).tenant for _ in range(len(queue))]


@settings(max_examples=200, deadline=None)
@given(short=COSTS, long=COSTS, weight=st.sampled_from([0.5, 1.0, 3.0]))
def test_while_two_tenants_wait_their_shares_differ_by_no_more_than_one_request_of_each(short, long, weight):
    costs = {"short": short, "long": long}
    weights = {"short": weight, "long": 1.0}
    queue = filled(*(Entry(t, 0, cost, weights[t]) for t in costs for cost in costs[t]))
    left = {tenant: len(costs[tenant]) for tenant in costs}
    bound = sum(max(costs[t]) / weights[t] for t in costs)
    served, history = {"short": 0.0, "long": 0.0}, []
    while all(left.values()):
        history.append(dict(served))
        entry = pop(queue)
        served[entry.tenant] += entry.cost
        left[entry.tenant] -= 1
    history.append(served)
    # Over any part of the time, not from the beginning alone.
    gaps = [state["short"] / weights["short"] - state["long"] / weights["long"] for state in history]
    assert max(gaps) - min(gaps) <= bound + 1e-6


@settings(max_examples=200, deadline=None)
@given(
    requests=st.lists(
        st.tuples(st.sampled_from("abc"), st.integers(1, 100), st.floats(0, 3), st.booleans()), max_size=60
    ),
    at_once=st.integers(1, 8),
)
def test_whatever_happens_every_request_goes_on_once_and_nothing_is_left_behind(requests, at_once):
    queue = FairQueue()
    waiting, running, taken = [], [], []
    for tenant, cost, factor, is_dropped in requests:
        entry = Entry(tenant, 0, cost)
        queue.add(entry)
        waiting.append(entry)
        if is_dropped:
            gone = waiting.pop(cost % len(waiting))
            queue.drop(gone)
        if len(running) < at_once and len(queue):
            entry = pop(queue)
            waiting.remove(entry)
            taken.append(entry)
            running.append(entry)
        elif running:
            ended = running.pop(0)
            queue.settle(ended, ended.cost * factor)
    assert len(queue) == len(waiting)
    while len(queue):
        running.append(pop(queue))
        assert running[-1] in waiting
    for entry in running:
        queue.settle(entry, entry.cost)
    assert queue._used == {} and queue._now == 0.0 and not queue._present and not queue._waiting


def test_tokens_and_not_requests_are_shared():
    long, short = [Entry("long", 0, 1000) for _ in range(3)], [Entry("short", 0, 100) for _ in range(20)]
    assert order(filled(*long, *short))[:12] == ["long", *["short"] * 10, "long"]


def test_a_weight_is_a_larger_share():
    entries = [Entry(t, 0, 100, weight) for t, weight in (("one", 1.0), ("three", 3.0)) for _ in range(40)]
    first = order(filled(*entries))[:40]
    assert 29 <= first.count("three") <= 31


def test_a_higher_class_goes_first_and_jobs_last():
    queue = filled(Entry("job", -1, 1), Entry("person", 0, 1), Entry("vip", 5, 1000), Entry("job", 0, 1))
    assert [(e.priority, e.tenant) for e in (pop(queue) for _ in range(4))] == [
        (5, "vip"),
        (0, "person"),
        (0, "job"),
        (-1, "job"),
    ]


def test_who_was_away_has_no_credit():
    queue = filled(Entry("busy", 0, 100))
    running = [pop(queue)]
    for _ in range(50):
        queue.add(Entry("busy", 0, 100))
        running.append(pop(queue))
    for entry in [Entry("away", 0, 100) for _ in range(10)] + [Entry("busy", 0, 100) for _ in range(10)]:
        queue.add(entry)
    first = order(queue)[:10]
    assert 4 <= first.count("away") <= 6


def test_the_real_usage_corrects_the_share():
    queue = filled(*(Entry(tenant, 0, 100) for tenant in ("honest", "hungry") for _ in range(20)))
    honest, hungry = pop(queue), pop(queue)
    queue.settle(honest, 100)
    queue.settle(hungry, 1000)
    assert order(queue)[:10].count("hungry") <= 1


def test_a_request_that_used_nothing_costs_nothing():
    queue = filled(*(Entry("unlucky", 0, 1000) for _ in range(3)), *(Entry("other", 0, 10) for _ in range(3)))
    queue.settle(pop(queue), 0)
    assert queue.first().tenant == "unlucky"


@pytest.mark.parametrize(
    ("tenant", "priority", "expected"),
    [
        ("short", 0, 200 + 200),  # its own two, and as much of the other's
        ("new", 0, 0),
        ("long", 0, 3000 + 200),
        ("new", 1, 0),
        ("new", -1, 3200),
    ],
)
def test_it_tells_how_much_would_go_before(tenant, priority, expected):
    waiting = [Entry("long", 0, 1000) for _ in range(3)] + [Entry("short", 0, 100) for _ in range(2)]
    assert filled(*waiting).ahead(Entry(tenant, priority, 50)) == expected


def test_room_is_made_by_the_lowest_class_and_there_by_who_has_most_waiting():
    people = [Entry("long", 0, 1000), Entry("long", 0, 1000), Entry("short", 0, 10)]
    assert filled(*people).last() is people[1]
    job = Entry("job", -1, 1)
    assert filled(*people, job).last() is job
    assert FairQueue().last() is None
