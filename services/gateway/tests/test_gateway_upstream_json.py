"""Repeated keys are found whatever way they are written, though the slow reader is not asked for every body."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chassis.errors import PlatformError
from gateway.api.json_body import parse_json

REPEATED = [
    '{"a": 1, "a": 2}',
    '{"a":1,"a":2}',
    '{"a"  :1,"a"\t:2}',
    '{"a"\n\n:1,"b":{"c":1,"c"\r\n:1}}',
    '{"a": 1, "\\u0061": 2}',
    '{"x": [{"a": 1}, {"b": 1, "b": 1}]}',
    '{"a": "\\":", "a": 1}',
    '{"a\\":": 1, "a\\":": 1}',
]


@pytest.mark.parametrize("text", REPEATED)
def test_a_repeated_key_is_refused(text):
    with pytest.raises(PlatformError, match="appears twice"):
        parse_json(text.encode())


@pytest.mark.parametrize(
    "text", ['{"a": "say \\"b\\": 1 and \\"b\\": 2"}', '{"a\\":": 1}', "{}", '{"a": {"a": [{"a": ":"}]}}']
)
def test_what_only_looks_like_one_is_not(text):
    assert parse_json(text.encode()) == json.loads(text)


keys = st.text(alphabet='ab":\\ \u00e4', max_size=3)
values = st.recursive(
    st.text(alphabet='a":{}\\ ', max_size=6) | st.integers(0, 9), lambda one: st.lists(one, max_size=3)
)
pairs = st.recursive(
    st.lists(st.tuples(keys, values), max_size=4),
    lambda inner: st.lists(st.tuples(keys, inner | values), max_size=4),
)


def written(node, space):
    """The node as JSON; a list of pairs is an object, which may repeat keys."""
    if isinstance(node, list) and all(isinstance(one, tuple) for one in node):
        return "{" + ",".join(f"{json.dumps(k)}{space}:{space}{written(v, space)}" for k, v in node) + "}"
    if isinstance(node, list):
        return "[" + ",".join(written(one, space) for one in node) + "]"
    return json.dumps(node)


def repeats(node):
    if isinstance(node, list) and all(isinstance(one, tuple) for one in node):
        names = [key for key, _ in node]
        return len(set(names)) != len(names) or any(repeats(value) for _, value in node)
    return isinstance(node, list) and any(map(repeats, node))


@given(pairs, st.sampled_from(["", " ", "\n\t "]))
def test_it_agrees_with_reading_pair_by_pair(node, space):
    text = written(node, space)
    try:
        parse_json(text.encode())
        refused = False
    except PlatformError:
        refused = True
    assert refused == repeats(node)
