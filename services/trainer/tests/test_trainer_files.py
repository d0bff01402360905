"""Training files, hyperparameters and the order of examples: what is taken, and what is said of what is not."""

import json

import pytest

from chassis.errors import Code, PlatformError
from trainer.core.examples import FileLimits, parse_examples
from trainer.core.hyperparameters import MAX_EPOCHS, MAX_STEPS, Hyperparameters, Plan, parse_hyperparameters, plan_of
from trainer.core.order import BatchOrder

LIMITS = FileLimits(max_bytes=10_000, max_examples=50)
GOOD = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}


def lines(*examples: object) -> bytes:
    return "\n".join(e if isinstance(e, str) else json.dumps(e) for e in examples).encode()


def refusal(data: bytes) -> str:
    with pytest.raises(PlatformError) as caught:
        parse_examples(data, LIMITS)
    assert not caught.value.retryable
    return caught.value.message


def messages(*turns: tuple[str, object], **extra: object) -> dict[str, object]:
    return {"messages": [{"role": role, "content": content} | extra for role, content in turns]}


def test_a_good_file_is_read_with_its_line_numbers() -> None:
    system = messages(("system", "s"), ("user", "q"), ("assistant", "a"), ("user", "q2"), ("assistant", "a2"))
    examples = parse_examples(b"\xef\xbb\xbf" + lines(GOOD, "", system, "  "), LIMITS)
    assert [example.line for example in examples] == [1, 3]
    assert [turn.is_learned for turn in examples[1].turns] == [False, False, True, False, True]


def test_a_line_end_inside_a_text_ends_no_line() -> None:
    (example,) = parse_examples(
        json.dumps(messages(("user", "a\u2028b"), ("assistant", "c")), ensure_ascii=False).encode(), LIMITS
    )
    assert example.turns[0].content == "a\u2028b"


def test_an_answer_of_weight_0_is_context_alone() -> None:
    turns = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "bad", "weight": 0},
        {"role": "user", "content": "again"},
        {"role": "assistant", "content": "good", "weight": 1},
    ]
    (example,) = parse_examples(lines({"messages": turns}), LIMITS)
    assert [turn.content for turn in example.turns if turn.is_learned] == ["good"]


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        ('{"messages": [', "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("[1, 2]", "must be an object"),
        ({"prompt": "a", "completion": "b"}, 'unknown field "prompt"'),
        ({"messages": []}, 'no "messages"'),
        ({"messages": "hello"}, 'no "messages"'),
        (messages(("user", "q")), "no message of the assistant"),
        (messages(("assistant", "a"), ("user", "q")), "last message is the user's"),
        (messages(("assistant", "a")), "first message is the assistant's"),
        (messages(("human", "q"), ("assistant", "a")), 'message 1 has the role "human"; known are system, user'),
        ({"messages": [{"content": "q"}]}, "message 1 has the role none"),
        (messages(("user", "q"), ("assistant", "")), "message 2 has no content"),
        (messages(("user", None), ("assistant", "a")), "message 1 has no content"),
        (
            messages(("user", "q"), ("assistant", "a"), ("system", "s"), ("assistant", "a")),
            "first message may be the sys",
        ),
        (messages(("user", "q"), ("assistant", "a"), weight=1), "message 1 has a bad weight"),
        (messages(("user", "\ud800"), ("assistant", "a")), "half a character"),
        (messages(("user", "q"), ("assistant", "a"), tool_calls=[]), 'unknown field "tool_calls"'),
        ({"messages": ["hi"]}, "message 1 must be an object"),
        (
            {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "weight": 0}]},
            "weight 0",
        ),
    ],
)
def test_a_bad_line_is_named_with_what_is_wrong(bad: object, why: str) -> None:
    limits = FileLimits(max_bytes=1_000_000, max_examples=50)
    with pytest.raises(PlatformError) as caught:
        parse_examples(lines(GOOD, bad, GOOD), limits)
    assert caught.value.message.startswith("training_file: line 2: ") and why in caught.value.message
    assert (caught.value.code, caught.value.param) == (Code.INVALID_ARGUMENT, "training_file")


def test_text_in_another_encoding_is_named_by_its_byte() -> None:
    assert "line 2: it is not UTF-8 (byte 0xe9 at column 2)" in refusal(lines(GOOD) + b'\n"\xe9"')


def test_of_many_bad_lines_the_first_five_are_named() -> None:
    message = refusal(lines(*["x"] * 8))
    assert message.count("line ") == 5 and message.endswith("and 3 more lines")


@pytest.mark.parametrize("data", [b"", b"\n \n\r\n", b"\xef\xbb\xbf"])
def test_an_empty_file_is_refused_as_such(data: bytes) -> None:
    assert "it is empty: at least 1 example" in refusal(data)


def test_a_file_over_a_limit_is_told_the_limit() -> None:
    assert "it has 10001 bytes; the most is 10000" in refusal(b"x" * 10_001)
    assert "more than 50 examples" in refusal(lines(*[GOOD] * 51))


def test_hyperparameters_may_be_auto_or_numbers() -> None:
    assert parse_hyperparameters("") == Hyperparameters()
    text = '{"n_epochs": "auto", "batch_size": 2, "learning_rate_multiplier": 0.5}'
    assert parse_hyperparameters(text) == Hyperparameters(None, 2, 0.5)
    assert parse_hyperparameters('{"n_epochs": 3.0}').n_epochs == 3


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{", "not valid JSON"),
        ("[]", "must be a JSON object"),
        ('{"n_epochs": 0}', 'n_epochs: it must be "auto" or a whole number from 1 to 50'),
        ('{"n_epochs": true}', "whole number"),
        ('{"n_epochs": 2.5}', "whole number"),
        ('{"batch_size": 257}', 'batch_size: it must be "auto" or a whole number from 1 to 256'),
        ('{"learning_rate_multiplier": 0}', "above 0, up to 100"),
        ('{"learning_rate_multiplier": NaN}', "above 0, up to 100"),
        ('{"learning_rate_multiplier": "fast"}', "above 0, up to 100"),
        ('{"epochs": 3}', "hyperparameters.epochs: unknown; known are n_epochs"),
    ],
)
def test_bad_hyperparameters_are_named_with_their_bounds(text: str, why: str) -> None:
    with pytest.raises(PlatformError) as caught:
        parse_hyperparameters(text)
    assert why in caught.value.message and caught.value.param.startswith("hyperparameters")


@pytest.mark.parametrize("num_examples", [1, 2, 3, 10, 12, 30, 100, 1_000, 10_000])
def test_auto_gives_every_size_of_file_a_bounded_number_of_steps(num_examples: int) -> None:
    plan = plan_of(Hyperparameters(), num_examples, seed=1)
    assert 1 <= plan.n_epochs <= MAX_EPOCHS and 1 <= plan.batch_size <= num_examples
    assert min(50, num_examples * 50) <= plan.total_steps <= max(1_000, plan.steps_per_epoch)


def test_more_steps_than_the_most_are_refused_with_the_sum() -> None:
    with pytest.raises(PlatformError, match=f"50 epochs of 1000 examples in batches of 1 are 50000 steps.*{MAX_STEPS}"):
        plan_of(Hyperparameters(50, 1), 1_000, seed=1)


def test_the_learning_rate_rises_then_falls_and_stays_above_zero() -> None:
    plan = plan_of(Hyperparameters(), 12, seed=1)
    rates = [plan.learning_rate(step) for step in range(plan.total_steps)]
    peak = rates.index(max(rates))
    assert rates[: peak + 1] == sorted(rates[: peak + 1]) and rates[peak:] == sorted(rates[peak:], reverse=True)
    assert 0 < rates[-1] < rates[peak]


@pytest.mark.parametrize("batch_size", [1, 3, 4, 10])
def test_every_epoch_takes_every_example_once_in_an_order_of_its_own(batch_size: int) -> None:
    plan = Plan(n_epochs=3, batch_size=batch_size, learning_rate_multiplier=1, num_examples=10, seed=7)
    order = BatchOrder(plan)
    batches = [order.batch(step) for step in range(plan.total_steps)]
    epochs = [batches[i : i + plan.steps_per_epoch] for i in range(0, plan.total_steps, plan.steps_per_epoch)]
    flat = [[i for batch in epoch for i in batch] for epoch in epochs]
    assert all(sorted(numbers) == list(range(10)) for numbers in flat)
    assert len({tuple(numbers) for numbers in flat}) == 3
    assert [BatchOrder(plan).batch(step) for step in range(plan.total_steps)] == batches, "any step can be asked for"
