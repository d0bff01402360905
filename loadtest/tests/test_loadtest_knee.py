"""The knee, on curves whose knee is known."""

import itertools

import pytest

from loadtest.knee import find_knee


def test_capacity_of_an_open_loop_is_the_knee():
    """Throughput follows the rate up to a capacity of 4 and is flat beyond: the knee is the capacity itself."""
    rates = [0.5, 1, 2, 3, 4, 5, 6, 8]
    assert find_knee(rates, [min(rate, 4.0) for rate in rates]).index == rates.index(4)


def test_users_that_share_a_batch():
    """x / (x + 8): the greatest distance from the chord between 1 and 64 users is near sqrt(9 * 72) - 8 = 17.5."""
    users = [1, 2, 4, 8, 16, 32, 64]
    assert find_knee(users, [u / (u + 8) for u in users]).index == users.index(16)


def test_throughput_that_falls_beyond_its_peak():
    assert find_knee([1, 2, 4, 8, 16], [10, 20, 38, 20, 5]).index == 2


def test_a_straight_line_has_no_knee():
    found = find_knee([1, 2, 3, 4, 5], [10, 20, 30, 40, 50])
    assert found.index is None
    assert "still rising" in found.why


def test_noise_on_a_straight_line_is_no_knee():
    noise = [0, 0.4, -0.3, 0.5, -0.2, 0.3, 0]
    found = find_knee(range(1, 8), [10 * x + n for x, n in zip(range(1, 8), noise, strict=True)])
    assert found.index is None


@pytest.mark.parametrize("factors", list(itertools.product([0.97, 1.0, 1.03], repeat=3)))
def test_three_percent_of_noise_do_not_move_it_by_more_than_one_step(factors):
    users = [1, 2, 4, 8, 16, 32]
    clean = [min(12.0 * u, 50.0) for u in users]  # full at 4.2 users
    noisy = [*clean[:2], *(a * b for a, b in zip(clean[2:5], factors, strict=True)), clean[5]]
    assert find_knee(users, noisy).index in (2, 3)


def test_few_points_and_flat_curves_have_none():
    assert find_knee([1, 2, 4], [1, 2, 2]).index is None
    assert find_knee([1, 2, 4, 8], [0, 0, 0, 0]).index is None


def test_load_must_rise():
    with pytest.raises(ValueError, match="rise"):
        find_knee([1, 1, 2, 3], [1, 2, 3, 4])
