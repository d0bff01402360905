"""The commands of the ledger say to the API what their options say, and show money as money."""

import json

import httpx
import pytest
from typer.testing import CliRunner

from devstack.api import Api
from devstack.cli import app, ledger

SUMS = {
    "key_id": "k1",
    "num_requests": 3,
    "num_errors": 0,
    "prompt_tokens": 10,
    "completion_tokens": 5,
    "cached_tokens": 1,
    "cost_micros": 1_234_567,
}
PRICE = {
    "model": "m",
    "input_micros": 150_000,
    "cached_input_micros": 15_000,
    "output_micros": 600_000,
    "effective_from": 0,
}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, dict]]:
    """What the gateway was asked."""
    seen: list[tuple[str, str, dict]] = []

    def answer(request: httpx.Request) -> httpx.Response:
        body = json.loads(request.content) if request.content else dict(request.url.params)
        seen.append((request.method, request.url.path, body))
        if request.method == "PUT":
            return httpx.Response(200, json=PRICE)
        rows = [SUMS] if request.url.path == "/admin/usage" else [PRICE]
        return httpx.Response(200, json={"data": [] if body.get("tenant") == "nobody" else rows})

    monkeypatch.setattr(ledger, "admin", lambda: Api("http://gateway/v1", "sk-a-b", httpx.MockTransport(answer)))
    return seen


def _run(*arguments: str):
    return CliRunner().invoke(app, arguments)


def test_usage_asks_for_what_was_named_and_shows_money(asked) -> None:
    done = _run("usage", "--by", "key", "--tenant", "acme", "--from", "2026-11-01", "--to", "2026-11-30")
    assert asked == [
        ("GET", "/admin/usage", {"group_by": "key", "tenant": "acme", "from": "2026-11-01", "to": "2026-11-30"})
    ]
    head, row = done.stdout.splitlines()
    assert head.split() == [
        "key",
        "requests",
        "errors",
        "prompt",
        "tokens",
        "completion",
        "tokens",
        "cached",
        "tokens",
        "cost",
    ]
    assert row.split() == ["k1", "3", "0", "10", "5", "1", "1.234567"]


def test_usage_for_programs_and_usage_of_nobody(asked) -> None:
    assert json.loads(_run("usage", "--json").stdout) == [SUMS]
    assert _run("usage", "--tenant", "nobody").stdout == "nothing was used\n"


def test_prices_are_set_in_money_and_told_in_money(asked) -> None:
    assert _run("prices", "set", "m", "--input", "0.15", "--cached-input", "0.015", "--output", "0.6").exit_code == 0
    sent = {"model": "m", "input_micros": 150_000, "cached_input_micros": 15_000, "output_micros": 600_000}
    assert asked == [("PUT", "/admin/prices", sent)]
    assert "0.150000" in _run("prices", "list").stdout and json.loads(_run("prices", "list", "--json").stdout) == [
        PRICE
    ]


def test_a_price_can_begin_later(asked) -> None:
    _run("prices", "set", "m", "--input", "0", "--output", "1", "--begins", "2030-01-31")
    assert asked[0][2]["effective_from"] == 1_896_048_000


@pytest.mark.parametrize("amount", ["-1", "much", "0.0000001", "NaN", "Infinity"])
def test_what_is_no_money_is_refused_before_anybody_is_asked(asked, amount: str) -> None:
    done = _run("prices", "set", "m", f"--input={amount}", "--output", "1")
    assert done.exit_code != 0 and not asked
