"""Bad input of every kind is a 4xx in OpenAI's envelope that names the field."""

import json
import time

import pytest

CHAT, ENCODER = "smollm2-135m-instruct", "all-minilm-l6-v2"
HELLO = [{"role": "user", "content": "hello"}]
# Python's json sends it; JSON has no such number.
NOT_A_NUMBER = json.dumps({"model": CHAT, "messages": HELLO, "temperature": float("nan")}).encode()

TABLE = [
    ("chat/completions", b"{not json", 400, None),
    ("chat/completions", b"[1, 2]", 400, None),
    ("chat/completions", b"\xff\xfe", 400, None),
    ("chat/completions", {"messages": HELLO}, 400, "model"),
    ("chat/completions", {"model": CHAT}, 400, "messages"),
    ("chat/completions", {"model": CHAT, "messages": []}, 400, "messages"),
    ("chat/completions", {"model": CHAT, "messages": "hello"}, 400, "messages"),
    ("chat/completions", {"model": CHAT, "messages": HELLO, "temperature": "hot"}, 400, "temperature"),
    ("chat/completions", {"model": CHAT, "messages": HELLO, "temperature": -1}, 400, "temperature"),
    ("chat/completions", {"model": CHAT, "messages": HELLO, "max_tokens": 0}, 400, "max_tokens"),
    ("chat/completions", {"model": CHAT, "messages": HELLO, "top_p": 2}, 400, "top_p"),
    ("chat/completions", {"model": CHAT, "messages": HELLO, "temperature": 2.5}, 400, "temperature"),
    (
        "chat/completions",
        b'{"model": "smollm2-135m-instruct", "messages": [{"role": "user", "content": "hi"}], "temperature": NaN}',
        400,
        None,
    ),
    ("chat/completions", {"model": CHAT, "messages": HELLO, "max_tokens": -5}, 400, "max_tokens"),
    ("chat/completions", {"model": CHAT, "messages": HELLO, "max_completion_tokens": 0}, 400, "max"),
    ("chat/completions", {"model": CHAT, "messages": HELLO, "n": 0}, 400, "n"),
    ("chat/completions", {"model": CHAT, "messages": HELLO, "n": -1}, 400, "n"),
    ("chat/completions", {"model": CHAT, "messages": HELLO, "logit_bias": {"999999": 1}}, 400, "logit_bias"),
    ("chat/completions", {"model": CHAT, "messages": HELLO, "logit_bias": {"-1": 1}}, 400, "logit_bias"),
    ("chat/completions", {"model": CHAT, "messages": HELLO, "logit_bias": {"17": 1e9}}, 400, "logit_bias"),
    ("chat/completions", {"model": CHAT, "messages": HELLO, "stop": [str(i) for i in range(1000)]}, 400, "stop"),
    ("chat/completions", {"model": CHAT, "messages": HELLO, "stop": ["x" * 100_000]}, 400, "stop"),
    ("chat/completions", {"model": CHAT, "messages": HELLO, "frequency_penalty": 9}, 400, "frequency_penalty"),
    ("completions", {"model": CHAT, "prompt": ""}, 400, "prompt"),
    ("completions", {"model": CHAT, "prompt": [999999]}, 400, "prompt"),
    ("completions", {"model": CHAT, "prompt": "x", "max_tokens": -1}, 400, "max_tokens"),
    ("chat/completions", {"model": CHAT + ":nobody-made-it", "messages": HELLO}, 404, "model"),
    ("chat/completions", {"model": "gpt-nope", "messages": HELLO}, 404, "model"),
    ("embeddings", {"model": ENCODER}, 400, "input"),
    ("embeddings", {"model": ENCODER, "input": []}, 400, "input"),
    ("embeddings", {"model": CHAT, "input": "x"}, (400, 404), "model"),
    ("completions", {"model": CHAT, "prompt": 5.5}, 400, "prompt"),
    ("search", {"query": ""}, 400, "query"),
    ("search", {"query": "x", "mode": "psychic"}, 400, "mode"),
    ("search", {"query": "x", "top_k": 0}, 400, "top_k"),
    ("documents", {"text": "x", "content_type": "image/png"}, (400, 415), "content_type"),
    ("documents", {"title": "no text"}, 400, "text"),
]


@pytest.mark.parametrize(("path", "body", "status", "field"), TABLE, ids=lambda value: str(value)[:60])
def test_bad_body_is_refused_with_its_field(system, path, body, status, field):
    arguments = {"content": body, "headers": {"content-type": "application/json"}}
    answer = system.http().post(f"/{path}", **(arguments if isinstance(body, bytes) else {"json": body}))
    assert answer.status_code in (status if isinstance(status, tuple) else (status,)), answer.text
    error = answer.json()["error"]
    assert {"message", "type", "param", "code"} <= error.keys()
    assert "Traceback" not in answer.text
    if field is not None:
        assert error["param"] is not None and field in error["param"], error
    assert answer.headers["x-request-id"]


def test_prompt_longer_than_the_context_is_refused_with_the_numbers(system):
    messages = [{"role": "user", "content": "word " * 9000}]
    answer = system.http().post("/chat/completions", json={"model": CHAT, "messages": messages})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["code"] == "context_length_exceeded"
    numbers = [int(word) for word in error["message"].replace(",", "").split() if word.strip(".").isdecimal()]
    assert any(number > 9000 for number in numbers), error


def test_max_tokens_beyond_the_context_are_refused_with_the_numbers(system):
    body = {"model": CHAT, "messages": HELLO, "max_tokens": 1_000_000}
    error = system.http().post("/chat/completions", json=body).json()["error"]
    assert error["code"] == "context_length_exceeded" and "1000000" in error["message"].replace(",", ""), error


def test_refusals_come_within_a_second_while_a_stream_goes_on(system):
    """One stream to its end; beside it all that the table has for chat and completions, each timed."""
    took_s, num_seen = {}, 0
    body = {"model": CHAT, "messages": HELLO, "max_tokens": 200, "stream": True, "temperature": 0, "ignore_eos": True}
    with system.http() as client, client.stream("POST", "/chat/completions", json=body) as stream:
        lines = (line for line in stream.iter_lines() if line.startswith("data: "))
        next(lines)
        for path, bad, _, _ in TABLE:
            if "completions" not in path:
                continue
            arguments = {"content": bad, "headers": {"content-type": "application/json"}}
            started_s = time.monotonic()
            answer = system.http().post(f"/{path}", **(arguments if isinstance(bad, bytes) else {"json": bad}))
            took_s[str(bad)[:80]] = time.monotonic() - started_s
            assert 400 <= answer.status_code < 500, (bad, answer.text)
        num_seen = sum(1 for _ in lines)
    assert num_seen > 50
    slow = {bad: seconds for bad, seconds in took_s.items() if seconds > 1.0}
    assert len(slow) <= len(took_s) // 10, slow  # the machine may have been busy for a moment


def test_oversize_body_is_refused(system):
    answer = system.http().post("/embeddings", json={"model": ENCODER, "input": "x" * (4 * 1024**2)})
    assert answer.status_code == 413, answer.text


def test_unknown_route_and_method_keep_the_envelope(system):
    assert system.http().get("/nowhere").json()["error"]["message"]
    wrong = system.http().put("/models")
    assert wrong.status_code == 405
    assert wrong.json()["error"]["message"]
