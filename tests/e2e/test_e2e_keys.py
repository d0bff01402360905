"""Keys: created and revoked by command, limited, isolated by tenant."""

import json

import openai
import pytest

from testkit import eventually_sync

ENCODER = "all-minilm-l6-v2"


def _create(system, *options: str) -> dict:
    return json.loads(system.cli("keys", "create", *options, "--json").stdout)


def test_requests_without_a_valid_key_get_401_in_the_envelope(system):
    for key in ("none", "sk-nope-" + "x" * 32, system.env["PRESSROOM_API_KEY"] + "x"):
        answer = system.http(key).get("/models")
        assert answer.status_code == 401
        assert {"message", "type", "param", "code"} <= answer.json()["error"].keys()
    with pytest.raises(openai.AuthenticationError):
        system.client("sk-nope-" + "x" * 32).models.list()


def test_request_limit_answers_429_with_the_headers(system):
    created = _create(system, "--rpm", "3")
    http = system.http(created["key"])
    body = {"model": ENCODER, "input": "x"}
    answers = [http.post("/embeddings", json=body) for _ in range(4)]
    assert [answer.status_code for answer in answers] == [200, 200, 200, 429]
    assert answers[0].headers["x-ratelimit-limit-requests"] == "3"
    assert [answer.headers["x-ratelimit-remaining-requests"] for answer in answers[:3]] == ["2", "1", "0"]
    assert float(answers[3].headers["retry-after"]) > 0
    with pytest.raises(openai.RateLimitError):
        system.client(created["key"]).embeddings.create(model=ENCODER, input="x")
    # Another key is not touched by it.
    assert system.http().post("/embeddings", json=body).status_code == 200


def test_revoked_key_is_refused(system):
    created = _create(system)
    http = system.http(created["key"])
    assert http.get("/models").status_code == 200
    system.cli("keys", "revoke", created["id"])
    eventually_sync(lambda: http.get("/models").status_code == 401, 3)


def test_listing_shows_no_secret(system):
    created = _create(system, "--tenant", "acme")
    listed = system.cli("keys", "list", "--json").stdout
    assert created["id"] in listed
    assert created["key"].split("-", 2)[2] not in listed


def test_a_key_with_a_policy_does_what_it_says_and_no_more(system):
    created = _create(system, "--tenant", "narrow", "--models", ENCODER, "--scopes", "embeddings,models.read")
    http = system.http(created["key"])
    assert http.post("/embeddings", json={"model": ENCODER, "input": "x"}).status_code == 200
    assert [model["id"] for model in http.get("/models").json()["data"]] == [ENCODER]
    answer = http.post("/chat/completions", json={})
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "scope_missing")
    system.cli("keys", "change", created["id"], "--models", "rag")
    answer = http.post("/embeddings", json={"model": ENCODER, "input": "x"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "model_not_allowed")


def test_a_rotated_secret_and_a_disabled_tenant_end_at_once(system):
    created = _create(system, "--tenant", "ending")
    rotated = json.loads(system.cli("keys", "rotate", created["id"], "--overlap", "0s", "--json").stdout)["key"]
    assert system.http(created["key"]).get("/models").status_code == 401
    assert system.http(rotated).get("/models").status_code == 200
    system.cli("tenants", "disable", "ending")
    assert system.http(rotated).get("/models").status_code == 401
    said = json.loads(system.cli("audit", "verify", "--json").stdout)
    assert said["ok"] is True
    changes = json.loads(system.cli("audit", "list", "--subject", "ending", "--json").stdout)
    assert [change["action"] for change in changes] == ["tenant.changed", "tenant.created"]


def test_admin_routes_refuse_an_ordinary_key(system):
    base = system.env["PRESSROOM_BASE_URL"].removesuffix("/v1")
    assert system.http().get(f"{base}/admin/keys").status_code == 403


def test_tenants_do_not_see_each_other(system):
    stranger = system.http(_create(system, "--tenant", "stranger")["key"])
    accepted = system.add_text("The vault code word is heliotrope.", external_id="e2e/vault")
    system.finish_job(accepted["job_id"])
    assert system.search("vault code word", top_k=1)[0]["external_id"] == "e2e/vault"
    hits = stranger.post("/search", json={"query": "vault code word heliotrope"}).json()["hits"]
    assert hits == []
    assert stranger.get(f"/documents/{accepted['document_id']}").status_code == 404
    assert stranger.get(f"/jobs/{accepted['job_id']}").status_code == 404
    assert stranger.delete(f"/documents/{accepted['document_id']}").status_code == 404
    assert stranger.get("/documents").json()["data"] == []
