"""Figures from rows: exact percentiles against numpy, tokens where they came, failures counted and never forgotten."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtest import rows
from loadtest.rows import OVERFLOW, STOPPED, Row, RowFile
from loadtest.summary import (
    Slo,
    Window,
    over_time,
    percentile,
    summarize,
    summarize_all,
    tokens_within,
    within_slo,
)

SLO = Slo(ttft_s=1.0, tpot_s=0.5)


def row(number=1, step=1, due_s=0.0, *, wait_s=0.5, gap_s=0.1, tokens=11, lag_s=0.0, **fields):
    """An answer: sent lag_s late, first token wait_s after that, the others gap_s apart."""
    first_s = due_s + lag_s + wait_s
    last_s = first_s + gap_s * (tokens - 1)
    answered = {
        "sent_s": due_s + lag_s, "first_token_s": first_s, "last_token_s": last_s, "done_s": last_s,
        "prompt_tokens": 20, "completion_tokens": tokens, "num_chunks": tokens, "status": 200,
        "finish_reason": "length",
    }  # fmt: skip
    return Row(number, step, 1.0, "chat", "m", due_s, **answered | fields)


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=200), st.sampled_from([0, 1, 50, 95, 99, 100]))
def test_percentiles_are_numpys(values, percent):
    assert percentile(values, percent) == pytest.approx(float(np.percentile(values, percent)), rel=1e-9, abs=1e-9)


def test_no_values_have_no_percentile():
    assert percentile([], 50) is None


def test_times_of_a_row():
    found = row(due_s=2.0, lag_s=0.25, wait_s=0.5, gap_s=0.1, tokens=11)
    assert found.ttft_s == pytest.approx(0.5)
    assert found.ttft_scheduled_s == pytest.approx(0.75), "a late sending is part of what a caller waits"
    assert found.tpot_s == pytest.approx(0.1)
    assert found.tokens_per_s == pytest.approx(10)


def test_one_token_has_no_time_per_token():
    assert row(tokens=1).tpot_s is None


def test_tokens_count_in_the_window_in_which_they_came():
    answer = row(wait_s=1.0, gap_s=0.1, tokens=11)  # from 1.0 to 2.0
    assert tokens_within(answer, 0, 1.5) == pytest.approx(5.5)
    assert tokens_within(answer, 1.5, 9) == pytest.approx(5.5)
    assert tokens_within(answer, 2.5, 9) == 0


@given(
    st.lists(st.tuples(st.floats(0, 30), st.floats(0, 5), st.floats(0, 0.5), st.integers(0, 50)), max_size=30),
    st.lists(st.floats(0, 80), max_size=5),
)
def test_windows_beside_each_other_share_out_all_tokens(answers, cuts):
    found = [row(due_s=due, wait_s=wait, gap_s=gap, tokens=tokens) for due, wait, gap, tokens in answers]
    edges = [0.0, *sorted(cuts), 200.0]
    windows = [(a, b) for a, b in itertools.pairwise(edges) if b > a]
    shared = sum(tokens_within(r, a, b) for r in found for a, b in windows)
    assert shared == pytest.approx(sum(r.num_tokens for r in found))


def test_a_step_counts_what_was_due_in_it_and_its_failures_by_code():
    found = [
        row(1), row(2, due_s=1.0), row(3, due_s=2.0, status=429, error="rate_limit_exceeded", completion_tokens=0),
        row(4, error=OVERFLOW, status=0, sent_s=None, first_token_s=None, last_token_s=None, done_s=None),
        row(5, error=STOPPED), row(6, error="no_done", completion_tokens=None), row(7, step=2, due_s=12.0),
    ]  # fmt: skip
    summary = summarize(found, Window(1, 4.0, 0.0, 10.0), SLO)
    assert (summary.num_due, summary.num_ok, summary.num_failed) == (6, 2, 3)
    assert (summary.num_overflow, summary.num_stopped) == (1, 1)
    assert summary.failures == {"429 rate_limit_exceeded": 1, "overflow": 1, "200 no_done": 1}
    assert summary.error_share == pytest.approx(3 / 5), "overflow is a failure; what the end cut off is none"
    assert summary.ttft.n == 2
    whole = summarize_all(found, [Window(1, 4.0, 0.0, 10.0), Window(2, 8.0, 10.0, 20.0)], 25.0, SLO)
    assert (whole.num_due, whole.window.length_s) == (7, 20.0)


def test_a_failure_does_not_make_the_latencies_better():
    """The latencies are those of answers; a step with nothing but failures has none, rather than zeros."""
    summary = summarize([row(error="timeout", status=0)], Window(1, 1.0, 0.0, 10.0), SLO)
    assert (summary.ttft.p50, summary.tpot.p95) == (None, None)


def test_goodput_leaves_out_what_came_too_late_or_too_slowly():
    found = [row(1, tokens=11), row(2, wait_s=1.5, tokens=11), row(3, gap_s=0.6, tokens=11), row(4, error="no_done")]
    summary = summarize(found, Window(1, 1.0, 0.0, 10.0), SLO)
    assert summary.tokens_per_s == pytest.approx(44 / 10)
    assert summary.goodput_tokens_per_s == pytest.approx(11 / 10)


def test_load_within_the_objectives_ends_at_the_first_step_that_breaks_them():
    windows = [Window(1, 1.0, 0, 10), Window(2, 2.0, 10, 20), Window(3, 4.0, 20, 30)]
    found = [row(1, 1), row(2, 2, 10.0, wait_s=3.0), row(3, 3, 20.0)]
    summaries = [summarize(found, window, SLO) for window in windows]
    assert within_slo(summaries, SLO) is summaries[0]
    assert within_slo(summaries[1:], SLO) is None


def test_series_over_time_add_up_to_the_rows():
    found = [row(n, due_s=n * 0.5, tokens=7) for n in range(40)] + [row(99, due_s=3.0, error="timeout", status=0)]
    series = over_time(found, 30.0, num_buckets=30)
    assert sum(series.tokens_per_s) == pytest.approx(sum(r.num_tokens for r in found))
    assert sum(series.arrivals_per_s) == pytest.approx(41)
    assert sum(series.failures_per_s) == pytest.approx(1)
    assert series.ttft_p50[0] == pytest.approx(0.5)
    assert series.ttft_p50[-1] is None


def test_rows_come_back_from_the_csv_as_they_were(tmp_path):
    before = [
        row(1, due_s=0.5),
        row(2, due_s=0.25, completion_tokens=None, grounded=True, error="no_done", done_s=None),
    ]
    file = RowFile(tmp_path / "rows.csv")
    for each in before:
        file.add(each)
    file.close()
    file.add(row(3))
    after = rows.read(tmp_path / "rows.csv")
    assert [r.number for r in after] == [2, 1], "in the order of arrival, and without what came after the end"
    by_number = {r.number: r for r in after}
    assert by_number[1] == before[0]
    assert by_number[2] == before[1]
