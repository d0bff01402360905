"""A streamed answer is timed and counted by what arrives, however the bytes are cut."""

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtest.answer import Answer


def event(**fields):
    return b"data: " + json.dumps(fields).encode() + b"\n\n"


def delta(text, finish=None):
    return event(choices=[{"index": 0, "delta": {"content": text} if text else {}, "finish_reason": finish}])


USAGE = event(
    choices=[],
    usage={"prompt_tokens": 30, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 16}},
)
STREAM = delta("") + delta("Hel") + delta("lo") + delta(None, "stop") + USAGE + b"data: [DONE]\n\n"


def read(*pieces):
    answer = Answer()
    for now_s, data in pieces:
        answer.feed(data, now_s)
    answer.close()
    return answer


def test_first_token_is_the_first_chunk_with_text():
    answer = read((1.0, delta("")), (2.0, delta("Hel")), (3.0, delta("lo")), (4.0, delta(None, "stop")), (5.0, USAGE))
    assert (answer.first_token_s, answer.last_token_s, answer.num_chunks) == (2.0, 3.0, 2)
    assert answer.finish_reason == "stop"


def test_tokens_are_the_servers_count():
    answer = read((1.0, STREAM))
    assert (answer.prompt_tokens, answer.completion_tokens, answer.cached_tokens) == (30, 2, 16)
    assert (answer.is_done, answer.error) == (True, "")


@given(st.lists(st.integers(0, len(STREAM)), max_size=30))
def test_it_does_not_matter_where_the_bytes_are_cut(cuts):
    places = [0, *sorted(cuts), len(STREAM)]
    whole = read((1.0, STREAM))
    assert read(*((1.0, STREAM[a:b]) for a, b in itertools.pairwise(places))) == whole


def test_a_stream_without_done_has_failed_though_tokens_came():
    answer = read((1.0, delta("Hel")))
    assert (answer.error, answer.num_chunks, answer.completion_tokens) == ("no_done", 1, None)


def test_an_error_in_the_stream_is_told_by_its_code():
    answer = read((1.0, delta("Hel")), (2.0, event(error={"message": "gone", "type": "server_error", "code": "away"})))
    assert answer.error == "away"


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (
            b'{"error": {"message": "m", "type": "rate_limit_error", "code": "rate_limit_exceeded"}}',
            "rate_limit_exceeded",
        ),
        (b'{"error": {"message": "m", "type": "server_error", "code": null}}', "server_error"),
        (b"<html>", "unreadable_error"),
        (b"[]", "unreadable_error"),
    ],
)
def test_a_refusal_is_told_by_its_code(body, code):
    answer = Answer()
    answer.refuse(body)
    assert answer.error == code


def test_an_unreadable_event_is_a_failure():
    assert read((1.0, b"data: {\n\ndata: [DONE]\n\n")).error == "unreadable_event"


def test_grounded_is_told():
    chunk = event(choices=[{"delta": {}, "finish_reason": "stop"}], grounded=False, sources=[])
    assert read((1.0, chunk)).grounded is False
