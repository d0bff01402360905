"""Bad input of every kind is a 4xx in OpenAI's envelope that names the field."""

import pytest

CHAT, ENCODER = "smollm2-135m-instruct", "all-minilm-l6-v2"
HELLO = [{"role": "user", "content": "hello"}]

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


def test_oversize_body_is_refused(system):
    answer = system.http().post("/embeddings", json={"model": ENCODER, "input": "x" * (4 * 1024**2)})
    assert answer.status_code == 413, answer.text


def test_unknown_route_and_method_keep_the_envelope(system):
    assert system.http().get("/nowhere").json()["error"]["message"]
    wrong = system.http().put("/models")
    assert wrong.status_code == 405
    assert wrong.json()["error"]["message"]
