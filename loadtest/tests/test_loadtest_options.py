"""Options, the plan of an open loop, the command line, prompts, and where the system is found."""

import argparse
import json

import pytest
from tokenizers import Tokenizer

from loadtest import options, prompts, target
from loadtest.__main__ import locust_command, main
from loadtest.options import OptionError, Plan


def parse(*arguments):
    parser = argparse.ArgumentParser()
    options.add(parser)
    return parser.parse_args(arguments)


@pytest.fixture
def trace(tmp_path):
    path = tmp_path / "t.jsonl"
    lines = [{"timestamp": n * 1000, "input_length": 100 * n, "output_length": 10} for n in range(20)]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--steps", "1,x"], "numbers"),
        (["--steps", "4,2"], "rise"),
        (["--steps", "0,2"], "rise"),
        (["--steps", "1,1.5"], "whole"),
        (["--arrivals", "trace"], "--trace"),
        (["--trace", "f"], "go together"),
        (["--step-time", "0"], "--step-time"),
        (["--max-in-flight", "-1"], "--max-in-flight"),
    ],
)
def test_what_cannot_be_meant_is_refused_by_name(arguments, word):
    with pytest.raises(OptionError, match=word):
        options.check(parse(*arguments))


def test_the_defaults_are_allowed_and_described():
    wanted = parse()
    options.check(wanted)
    assert options.conditions(wanted, "http://x/v1")["lengths"] == "prompt 95 tokens (chat), answer 64 tokens"


def test_steps_of_a_trace_play_its_beginning_at_each_speed(trace):
    plan = Plan(parse("--arrivals", "trace", "--trace", str(trace), "--steps", "1,2", "--step-time", "5"), None)
    slow, fast = plan.steps()
    assert [a.at_s for a in slow.arrivals] == [0, 1, 2, 3, 4]
    assert [a.at_s for a in fast.arrivals] == [n / 2 for n in range(10)]
    assert (slow.offered, fast.offered, fast.length_s) == (1.0, 2.0, 5.0)
    assert (plan.num_in_trace, plan.num_clipped) == (20, 10), "from 1100 tokens on, and the one of no tokens"


def test_a_trace_without_steps_is_played_whole_or_as_long_as_wanted(trace):
    wanted = parse("--arrivals", "trace", "--trace", str(trace), "--speed", "2")
    (whole,) = Plan(wanted, None).steps()
    (cut,) = Plan(wanted, 3.0).steps()
    assert (len(whole.arrivals), whole.length_s) == (20, 10.5)
    assert (len(cut.arrivals), cut.length_s) == (6, 3.0)


def test_poisson_steps_have_their_rate():
    plan = Plan(parse("--arrivals", "poisson", "--steps", "2,20", "--step-time", "100", "--max-tokens", "9"), None)
    low, high = plan.steps()
    assert 130 < len(low.arrivals) < 270  # 200 and 5 standard deviations
    assert 1780 < len(high.arrivals) < 2220
    assert {a.completion_tokens for a in high.arrivals} == {9}


def test_the_command_fills_in_what_was_left_out():
    command = locust_command(["--steps", "1,2"])
    assert "--headless" in command and "--stop-timeout" in command and command[-2:] == ["--steps", "1,2"]
    page = locust_command(["--page", "-s", "5"])
    assert "--headless" not in page and "--page" not in page and "--stop-timeout" not in page
    assert page[page.index("--web-host") + 1] == "127.0.0.1", "the page has no password: not for every interface"
    assert "--headless" not in locust_command(["--help"])


def test_a_trace_is_made_and_a_report_made_again(tmp_path, capsys):
    assert main(["trace", str(tmp_path / "t.jsonl"), "--seed", "7", "--duration", "30"]) == 0
    assert "arrivals in" in capsys.readouterr().out
    assert main(["report", str(tmp_path / "nothing")]) == 2
    assert "run.json" in capsys.readouterr().err


def test_prompts_differ_from_their_first_words_on():
    """Equal beginnings would come out of the prefix cache."""
    begins = {" ".join(prompts.text_of(95, seed).split()[:4]) for seed in range(500)}
    assert len(begins) == 500
    assert prompts.text_of(95, 1) == prompts.text_of(95, 1)
    assert {prompts.question(seed) for seed in range(500)} == set(prompts.questions())


@pytest.mark.integration
@pytest.mark.parametrize("num_tokens", [40, 95, 700])
def test_prompts_have_the_wanted_number_of_tokens(model_store, num_tokens):
    """Each word is one token of SmolLM2; the chat template's share is a constant that this test keeps true."""
    tokenizer = Tokenizer.from_file(str(model_store / "smollm2-135m-instruct" / "tokenizer.json"))
    count = len(tokenizer.encode(prompts.text_of(num_tokens, 5), add_special_tokens=False).ids)
    assert count + prompts.TEMPLATE_TOKENS == num_tokens


def test_the_environment_goes_before_the_file(tmp_path):
    (tmp_path / "env").write_text("# c\nPRESSROOM_BASE_URL=http://file/v1\nPRESSROOM_API_KEY=sk-f-f=\n")
    home = {"PRESSROOM_HOME": str(tmp_path)}
    assert target.find(home) == target.Target("http://file/v1", "sk-f-f=")
    found = target.find(home | {"PRESSROOM_BASE_URL": "https://cluster/v1/"})
    assert found == target.Target("https://cluster/v1", "sk-f-f=")
    assert "sk-f" not in repr(found)


def test_without_a_system_it_says_what_to_do(tmp_path):
    with pytest.raises(target.TargetError, match="make up"):
        target.find({"PRESSROOM_HOME": str(tmp_path)})
