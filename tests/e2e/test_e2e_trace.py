"""One request, one trace: through every service and the consumers of its event."""

import json
import re

import httpx
import pytest

from testkit import eventually_sync

RAG = "rag"
SERVICES = ("gateway", "embedder", "retriever", "generator", "evaluator", "trainer", "monitor")


def _grounded(system) -> httpx.Response:
    body = {"model": RAG, "messages": [{"role": "user", "content": "What is an outbox?"}], "max_tokens": 4}
    answer = system.http().post("/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    return answer


def _spans(system, trace_id: str) -> list[dict]:
    return json.loads(system.cli("trace", trace_id, "--json").stdout)["spans"]


def test_grounded_chat_is_one_trace_across_all_services_of_its_path(system):
    trace_id = _grounded(system).headers["x-trace-id"]
    assert re.fullmatch(r"[0-9a-f]{32}", trace_id)

    def complete() -> list[dict]:
        spans = _spans(system, trace_id)
        assert {"gateway", "embedder", "retriever", "generator", "monitor"} <= {span["service"] for span in spans}
        ids = {span["span_id"] for span in spans}  # a service writes its spans in batches: the parent may come last
        assert all(span["parent_id"] in ids for span in spans if span["parent_id"])
        return spans

    spans = eventually_sync(complete, 20, interval_s=0.5)
    roots = [span for span in spans if span["parent_id"] is None]
    assert [root["service"] for root in roots] == ["gateway"]
    assert all(roots[0]["start_ns"] <= span["start_ns"] <= span["end_ns"] for span in spans)
    drawn = system.cli("trace", trace_id).stdout
    assert "generator" in drawn and "missing" not in drawn


def test_log_lines_of_a_request_are_found_across_services(system):
    headers = _grounded(system).headers

    def logged() -> bool:
        said = system.cli("logs", "--request", headers["x-request-id"], "--json").stdout
        lines = [json.loads(line) for line in said.splitlines()]
        assert {"gateway", "embedder", "retriever", "generator"} <= {line["service"] for line in lines}
        assert {line["trace_id"] for line in lines} == {headers["x-trace-id"]}
        return True

    eventually_sync(logged, 10, interval_s=0.5)


def test_request_id_finds_the_trace_too(system):
    headers = _grounded(system).headers
    eventually_sync(lambda: headers["x-trace-id"] in _trace_by_request(system, headers["x-request-id"]), 10)


def _trace_by_request(system, request_id: str) -> str:
    return system.cli("trace", request_id).stdout


@pytest.mark.parametrize("name", SERVICES)
def test_every_service_offers_health_and_metrics(system, name):
    base = f"http://127.0.0.1:{system.services()[name]['http_port']}"
    assert httpx.get(f"{base}/healthz", trust_env=False).status_code == 200
    assert httpx.get(f"{base}/readyz", trust_env=False).json()["ready"] is True
    assert "pressroom_queue_depth" in httpx.get(f"{base}/metrics", trust_env=False).text
