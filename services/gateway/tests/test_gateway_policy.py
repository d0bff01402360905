"""A policy is read as it was written."""

import pytest

from gateway.core.policy import UNRESTRICTED, Algorithm, Budget, Counted, Limit, Policy, policy_from_json


@pytest.mark.parametrize(
    "policy",
    [
        UNRESTRICTED,
        Policy(scopes=frozenset()),
        Policy(
            scopes=frozenset({"inference", "files"}),
            models=frozenset({"rag"}),
            limits=(
                Limit(Counted.TOKENS, 1000, 1.5, Algorithm.SLIDING_LOG, "rag"),
                Limit(Counted.CONCURRENCY, 4),
            ),
            budget=Budget(5_000_000, "day"),
            priority=-1,
            caches=True,
        ),
    ],
)
def test_a_policy_is_read_as_it_was_written(policy):
    assert policy_from_json(policy.to_json()) == policy


def test_an_unrestricted_policy_takes_no_room():
    assert UNRESTRICTED.to_json() == "{}"


@pytest.mark.parametrize("text", ['{"limits": [{"counted": "sheep"}]}', '{"limits": [{}]}', '{"more": 1}', "[]", "{"])
def test_what_is_no_policy_is_refused(text):
    with pytest.raises(ValueError):
        policy_from_json(text)
