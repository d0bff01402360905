"""The commands of administrators say to the API what their options say."""

import json
import time

import httpx
import pytest
from typer.testing import CliRunner

from devstack.api import Api
from devstack.cli import access, app, audit

KEY = {
    "id": "k1",
    "tenant": "acme",
    "rpm": None,
    "is_admin": False,
    "name": "ci",
    "expires_at": 1_800_000_000,
    "revoked_at": None,
    "former_secret_until": None,
    "policy": {"scopes": ["inference"], "models": None, "budget": None},
}
TENANT = {"tenant": "acme", "allows_text": False, "disabled": False, "disabled_at": None, "policy": {"priority": 1}}


class Gateway:
    """Answers like the gateway and remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str, dict]] = []
        self.missing: set[str] = set()
        self.verdict = {"ok": True, "broken_at": None, "problem": None, "anchor": "7:ab"}

    def answer(self, request: httpx.Request) -> httpx.Response:
        path = request.url.path
        body = json.loads(request.content) if request.content else dict(request.url.params)
        self.asked.append((request.method, path, body))
        if f"{request.method} {path}" in self.missing:
            return httpx.Response(404, json={"error": {"message": "no such tenant"}})
        if path.endswith("/verify"):
            return httpx.Response(200, json=self.verdict)
        if path in ("/admin/keys", "/admin/tenants", "/admin/audit") and request.method == "GET":
            row = {"sequence": 1, "at_unix_ms": 0, "actor": "a", "action": "b", "subject": "c"}
            rows = {"/admin/keys": KEY, "/admin/tenants": TENANT, "/admin/audit": row}
            return httpx.Response(200, json={"data": [rows[path]]})
        if path.startswith("/admin/tenants"):
            return httpx.Response(200, json=TENANT)
        return httpx.Response(200, json=KEY | {"key": "sk-k1-secret"})


@pytest.fixture
def gateway(monkeypatch: pytest.MonkeyPatch) -> Gateway:
    made = Gateway()
    for module in (access, audit):
        monkeypatch.setattr(
            module, "admin", lambda: Api("http://gateway/v1", "sk-a-b", httpx.MockTransport(made.answer))
        )
    return made


def run(*arguments: str):
    return CliRunner().invoke(app, arguments)


def test_a_key_with_nothing_but_defaults_is_asked_for_as_ever(gateway: Gateway) -> None:
    done = run("keys", "create", "--rpm", "5", "--tenant", "acme", "--json")
    assert json.loads(done.stdout) == {"id": "k1", "key": "sk-k1-secret"}
    assert gateway.asked == [("POST", "/admin/keys", {"tenant": "acme", "rpm": 5})]


def test_every_option_of_a_key_reaches_the_gateway(gateway: Gateway) -> None:
    line = "--scopes inference,files --models rag,m:* --tokens-per-minute 100 --concurrency 2 --budget 1.5 "
    line += "--budget-period day --priority 3 --caches --name ci --expires 2030-01-31 --admin"
    assert run("keys", "create", *line.split()).stdout == "sk-k1-secret\n"
    ((_, _, body),) = gateway.asked
    assert body == {
        "tenant": "default",
        "name": "ci",
        "expires_at": 1_896_048_000,
        "is_admin": True,
        "policy": {
            "scopes": ["inference", "files"],
            "models": ["rag", "m:*"],
            "limits": [{"counted": "tokens", "amount": 100}, {"counted": "concurrency", "amount": 2}],
            "budget": {"amount": "1.5", "period": "day"},
            "priority": 3,
            "caches": True,
        },
    }


def test_a_change_says_only_what_is_named(gateway: Gateway) -> None:
    assert run("keys", "change", "k1", "--models", "all", "--budget", "none").exit_code == 0
    assert gateway.asked == [("PATCH", "/admin/keys/k1", {"policy": {"models": None, "budget": None}})]


def test_a_length_of_time_counts_from_now(gateway: Gateway) -> None:
    run("keys", "create", "--expires", "2h")
    assert abs(gateway.asked[0][2]["expires_at"] - time.time() - 7200) < 60
    run("keys", "rotate", "k1", "--overlap", "0s")
    run("keys", "rotate", "k1")
    assert [body for _, _, body in gateway.asked[1:]] == [{"overlap_s": 0}, {"overlap_s": 86_400}]


@pytest.mark.parametrize("said", ["soon", "5", "5w", "-1h", "2030-02-30", ""])
def test_what_is_no_time_is_refused_before_anybody_is_asked(gateway: Gateway, said: str) -> None:
    assert run("keys", "rotate", "k1", "--overlap", said).exit_code != 0
    if said:
        assert run("keys", "create", "--expires", said).exit_code != 0
    assert gateway.asked == []


def test_setting_a_tenant_that_is_not_there_makes_it(gateway: Gateway) -> None:
    gateway.missing.add("PATCH /admin/tenants/acme")
    assert run("tenants", "set", "acme", "--weight", "2", "--allow-text").exit_code == 0
    body = {"allows_text": True, "policy": {"weight": 2.0}}
    assert gateway.asked == [("PATCH", "/admin/tenants/acme", body), ("PUT", "/admin/tenants/acme", body)]


def test_tenants_are_disabled_and_enabled(gateway: Gateway) -> None:
    run("tenants", "disable", "acme")
    run("tenants", "enable", "acme")
    assert [body for _, _, body in gateway.asked] == [{"disabled": True}, {"disabled": False}]


def test_a_broken_log_ends_with_1_and_says_where(gateway: Gateway) -> None:
    whole = run("audit", "verify", "--anchor", "3:ab")
    assert (whole.exit_code, gateway.asked[-1][2]) == (0, {"anchor": "3:ab"}) and "anchor 7:ab" in whole.stdout
    gateway.verdict |= {"ok": False, "broken_at": 5, "problem": "the row was changed"}
    broken = run("audit", "verify")
    assert broken.exit_code == 1 and "BROKEN at row 5: the row was changed" in broken.stdout


@pytest.mark.parametrize("command", ["keys list", "keys show k1", "tenants list", "tenants show acme", "audit list"])
def test_what_is_listed_is_shown_for_people_and_for_programs(gateway: Gateway, command: str) -> None:
    for_people, for_programs = run(*command.split()), run(*command.split(), "--json")
    assert for_people.exit_code == 0 and len(for_people.stdout.splitlines()) > 1
    assert json.loads(for_programs.stdout)
