"""Arrivals: traces are read, sped up and cut to the model; what is drawn depends on the seed alone."""

import itertools
import json
import statistics
from pathlib import Path

import pytest

from loadtest.arrivals import Arrival, TraceError, bursty, clip, faster, poisson, read_trace, until, write_trace

SHIPPED = Path(__file__).parents[1] / "traces" / "evening.jsonl"


def test_a_trace_begins_at_its_first_arrival_and_is_sorted(tmp_path):
    path = tmp_path / "t.jsonl"
    lines = [{"timestamp": ms, "input_length": 5, "output_length": 7} for ms in (9000, 5000, 5500)]
    path.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    assert [a.at_s for a in read_trace(path)] == [0.0, 0.5, 4.0]


@pytest.mark.parametrize(
    "line",
    ["{", "[]", '{"timestamp": 1}', '{"timestamp": "x", "input_length": 1, "output_length": 1}',
     '{"timestamp": 1, "input_length": -1, "output_length": 1}',
     '{"timestamp": NaN, "input_length": 1, "output_length": 1}'],
)  # fmt: skip
def test_a_bad_line_is_named(tmp_path, line):
    path = tmp_path / "t.jsonl"
    path.write_text('{"timestamp": 1, "input_length": 1, "output_length": 1}\n' + line + "\n")
    with pytest.raises(TraceError, match=r"t\.jsonl:2: "):
        read_trace(path)


def test_an_empty_or_absent_trace_is_refused(tmp_path):
    (tmp_path / "t.jsonl").write_text("")
    for name in ("t.jsonl", "absent.jsonl"):
        with pytest.raises(TraceError, match=name):
            read_trace(tmp_path / name)


def test_speed_divides_times_and_leaves_lengths():
    assert list(faster([Arrival(4.0, 3, 2)], 2)) == [Arrival(2.0, 3, 2)]


def test_what_is_too_long_is_shortened_and_counted():
    after, num_clipped = clip([Arrival(0, 5000, 10), Arrival(1, 10, 10), Arrival(2, 0, 900)], 1000, 100)
    assert after == [Arrival(0, 1000, 10), Arrival(1, 10, 10), Arrival(2, 1, 100)]
    assert num_clipped == 2


def test_until_ends_before_the_end():
    assert until([Arrival(0, 1, 1), Arrival(2, 1, 1)], 2) == [Arrival(0, 1, 1)]


def test_poisson_gaps_have_the_rate_and_the_spread_of_an_exponential():
    """4000 gaps: mean and deviation are within 10% with a margin of 6 standard errors."""
    times = [a.at_s for a in poisson(4.0, 1000.0, 10, 20, seed=3)]
    gaps = [b - a for a, b in itertools.pairwise(times)]
    assert statistics.mean(gaps) == pytest.approx(0.25, rel=0.1)
    assert statistics.stdev(gaps) == pytest.approx(0.25, rel=0.1)
    assert poisson(4.0, 10.0, 10, 20, seed=3) == poisson(4.0, 10.0, 10, 20, seed=3)
    assert poisson(4.0, 10.0, 10, 20, seed=3) != poisson(4.0, 10.0, 10, 20, seed=4)


def test_the_shipped_trace_is_what_its_seed_makes(tmp_path):
    """README names rate, duration and seed; `python -m loadtest trace` with them makes the file again."""
    again = tmp_path / "again.jsonl"
    write_trace(bursty(1.0, 120.0, seed=20), again)
    assert again.read_text() == SHIPPED.read_text()
    arrivals = read_trace(SHIPPED)
    assert 90 < len(arrivals) < 150
    gaps = [b.at_s - a.at_s for a, b in itertools.pairwise(arrivals)]
    assert statistics.stdev(gaps) > 1.3 * statistics.mean(gaps), "it is meant to be burstier than Poisson"
