"""Which records are profiled, and how much of their text."""

import pytest

from monitor.core.samples import Sample, Sampler, cut


def sampler(rate: float = 1.0, *, now: float = 10_000.0) -> Sampler:
    return Sampler(rate=rate, window_s=300, max_chars=20, unix_time=lambda: now)


def taken(rate: float, message_id: str = "m", ended: float = 1_000.0, prompt: str = "p") -> Sample | None:
    return sampler(rate).take(message_id, "model", ended, prompt, "")


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 1.0])
def test_the_share_that_is_taken_is_the_rate(rate: float) -> None:
    num_taken = sum(taken(rate, f"request-{i}") is not None for i in range(4_000))
    assert num_taken == pytest.approx(4_000 * rate, abs=100)


def test_a_message_is_decided_alike_each_time_and_stays_taken_at_a_higher_rate() -> None:
    ids = [f"request-{i}" for i in range(300)]
    at_tenth, again, at_half = ({i for i in ids if taken(rate, i)} for rate in (0.1, 0.1, 0.5))
    assert at_tenth == again
    assert set() < at_tenth < at_half


def test_a_record_without_text_is_never_taken() -> None:
    assert taken(1.0, prompt="") is None


@pytest.mark.parametrize(("ended", "start"), [(299.9, 0), (300.0, 300), (-5.0, 0), (1e12, 9_900)])
def test_a_window_begins_at_a_multiple_of_its_length_and_never_in_the_future(ended: float, start: int) -> None:
    sample = taken(1.0, ended=ended)
    assert sample is not None and sample.window_start_unix_s == start


def test_a_long_text_keeps_its_beginning_and_its_end() -> None:
    text = "What was said: " + "x" * 1_000_000 + " and who said it?"
    kept = cut(text, 40)
    assert len(kept) == 40
    assert kept.startswith("What was said: ") and kept.endswith(" and who said it?")
    assert cut("as it is", 8) == "as it is"
