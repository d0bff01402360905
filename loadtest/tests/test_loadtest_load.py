"""The test that runs, on an environment that is not Locust's: what is asked, what is told to Locust, what is kept."""

import argparse
import collections
from types import SimpleNamespace

import pytest

from loadtest import http_stream, options, recording
from loadtest.arrivals import Arrival
from loadtest.load import Failure, Load
from loadtest.rows import OVERFLOW
from loadtest.target import Target


class Environment:
    """What Load uses of Locust's."""

    def __init__(self, *arguments):
        parser = argparse.ArgumentParser()
        options.add(parser)
        self.parsed_options = parser.parse_args(arguments)
        self.parsed_options.headless = True
        self.process_exit_code = None
        self.fired = []
        self.logged = collections.defaultdict(list)
        self.events = SimpleNamespace(request=SimpleNamespace(fire=lambda **event: self.fired.append(event)))
        self.stats = SimpleNamespace(entries=self)

    def __getitem__(self, key):
        return SimpleNamespace(log=lambda value, size: self.logged[key].append((value, size)))


@pytest.fixture
def answer(monkeypatch):
    """Answers in place of the system: 5 tokens, first after 0.5 s, 0.1 s apart; or what `fields` says."""
    seen = SimpleNamespace(bodies=[], fields={})

    def ask(target, body, row, *, timeout_s, clock):
        seen.bodies.append(body)
        answered = {
            "sent_s": 1.0, "first_token_s": 1.5, "last_token_s": 1.9, "done_s": 2.0, "prompt_tokens": 30,
            "completion_tokens": 5, "num_chunks": 5, "status": 200,
        } | seen.fields  # fmt: skip
        for name, value in answered.items():
            setattr(row, name, value)

    monkeypatch.setattr(http_stream, "ask", ask)
    return seen


@pytest.fixture
def make(tmp_path):
    def load(*arguments):
        environment = Environment("--out", str(tmp_path / "out"), *arguments)
        load = Load(environment, Target("http://x/v1", "k"))
        load.begin()
        return load, environment

    return load


def test_an_answer_is_one_request_to_locust_and_its_figures_stand_beside(make, answer):
    load, environment = make()
    load.ask("chat")
    ((event),) = environment.fired
    assert (event["request_type"], event["name"], event["response_time"]) == ("POST", "chat", pytest.approx(1000))
    assert event["exception"] is None
    assert environment.logged[("chat", "TTFT")] == [(pytest.approx(500), 0)]
    assert environment.logged[("chat", "TPOT")] == [(pytest.approx(100), 0)]
    assert environment.logged[("chat", "tokens/s")] == [(pytest.approx(10), 5)]


def test_a_failure_is_told_by_its_code_and_has_no_latency(make, answer):
    load, environment = make()
    answer.fields = {"status": 503, "error": "overloaded"}
    row = load.ask("chat")
    assert row.outcome == "failed"
    assert repr(environment.fired[0]["exception"]) == repr(Failure("503 overloaded"))
    assert environment.logged == {}


def test_what_the_end_cuts_off_is_kept_and_not_told_as_a_request(make, answer, tmp_path):
    load, environment = make()
    answer.fields = {"error": "stopped"}
    load.ask("chat")
    load.end()
    assert environment.fired == []
    assert [row.outcome for row in recording.read(tmp_path / "out").rows] == ["stopped"]


def test_the_body_asks_for_usage_and_for_the_wanted_length(make, answer):
    load, _ = make("--max-tokens", "7")
    load.ask("chat")
    load.ask("grounded", due_s=3.0, length=Arrival(3.0, 50, 11))
    chat, grounded = answer.bodies
    assert (chat["model"], chat["max_tokens"], chat["ignore_eos"]) == ("smollm2-135m-instruct", 7, True)
    assert chat["stream"] and chat["stream_options"] == {"include_usage": True}
    assert (grounded["model"], grounded["max_tokens"]) == ("rag", 11)
    assert grounded["messages"][0]["content"].endswith("?")


def test_natural_answers_end_by_themselves(make, answer):
    load, _ = make("--answer-length", "natural")
    load.ask("chat")
    assert "ignore_eos" not in answer.bodies[0]


def test_two_tests_of_one_seed_ask_the_same(make, answer):
    load, _ = make()
    load.ask("chat")
    load.end()
    load.begin()
    load.ask("chat")
    assert answer.bodies[0] == answer.bodies[1]


def test_an_overflow_is_a_failure_that_was_not_sent(make, answer, tmp_path):
    load, environment = make("--arrivals", "poisson")
    load.overflow("chat", 2.5)
    load.end()
    (row,) = recording.read(tmp_path / "out").rows
    assert (row.error, row.sent_s, row.scheduled_s) == (OVERFLOW, None, 2.5)
    assert str(environment.fired[0]["exception"]) == "overflow"
    assert answer.bodies == []


@pytest.mark.parametrize(("status", "code"), [(200, 0), (401, 1)])
def test_the_run_fails_when_nothing_was_answered(make, answer, status, code):
    load, environment = make()
    answer.fields = {"status": status}
    load.ask("chat")
    load.end()
    assert environment.process_exit_code == code


def test_a_second_test_does_not_write_over_the_first(make, answer, tmp_path):
    load, _ = make()
    load.ask("chat")
    load.end()
    first = load.report_path
    load.begin()
    load.end()
    assert load.report_path != first
    assert len(recording.read(tmp_path / "out").rows) == 1


def test_users_are_steps_of_load_unless_the_steps_are_planned(make, answer, tmp_path):
    load, _ = make()
    load.users_are(3)
    load.ask("chat")
    load.stopping()
    load.end()
    assert [window.offered for window in recording.read(tmp_path / "out").windows] == [3]


def test_a_page_that_is_closed_without_a_test_leaves_nothing(tmp_path):
    load = Load(Environment("--out", str(tmp_path / "out")), Target("http://x/v1", "k"))
    load.stopping()
    load.end()
    assert not (tmp_path / "out").exists()


def test_what_was_chosen_at_the_start_the_page_does_not_change(make, answer):
    load, environment = make("--traffic", "grounded")
    load.end()
    environment.parsed_options.traffic = "chat"
    load.begin()
    assert environment.parsed_options.traffic == "grounded"


def test_mixed_traffic_is_half_and_half_and_of_the_seed():
    mixed = Load(Environment("--traffic", "mixed"), Target("http://x/v1", "k"))
    kinds = [mixed.kind_of(number) for number in range(1000)]
    assert 420 < kinds.count("chat") < 580  # 5 standard deviations
    assert kinds == [mixed.kind_of(number) for number in range(1000)]
