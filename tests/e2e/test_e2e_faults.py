"""Faults of the running system: kill -9, a stopped bus, a stopped consumer. Nothing accepted is lost."""

import json
import os
import threading
import time
import uuid

import httpx
import openai
import pytest

from testkit import eventually_sync

ENCODER = "all-minilm-l6-v2"
EVERY = ("nats", "valkey", "milvus", "gateway", "embedder", "retriever", "generator", "evaluator", "trainer", "monitor")


class LightLoad:
    """Embeds a word a few times a second; failures are counted, a hang is one."""

    def __init__(self, system) -> None:
        self._client = system.client()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.num_ok = 0
        self.unexpected: list[str] = []

    def _run(self) -> None:
        while not self._over.wait(0.3):
            try:
                self._client.embeddings.create(model=ENCODER, input="word", timeout=20)
                self.num_ok += 1
            except openai.APIConnectionError as error:  # the gateway itself may be the one that was killed
                if isinstance(error, openai.APITimeoutError):
                    self.unexpected.append("a request hung")
            except openai.APIStatusError as error:
                if error.status_code not in (429, 503, 504):
                    self.unexpected.append(f"{error.status_code} {error.message}")

    def __enter__(self) -> "LightLoad":
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._over.set()
        self._thread.join(30)


@pytest.mark.parametrize("name", EVERY)
def test_killed_service_comes_back_and_no_job_is_lost(system, patiently, name):
    system.wait_all_ready()
    tag = uuid.uuid4().hex[:8]
    with LightLoad(system) as load:
        before = system.add_text(f"Written before {name} was killed, {tag}.", collection="faults")
        old = system.kill9(name)
        killed_at = time.monotonic()
        eventually_sync(lambda: system.services()[name]["pid"] not in (None, old), 10, interval_s=0.1)
        assert time.monotonic() - killed_at < 3 + 1  # half a second by design, and looking takes its time
        after = system.add_text(f"Written after {name} was killed, {tag}.", collection="faults")
        system.wait_ready(name, other_than=old)
        for accepted in (before, after):
            system.finish_job(accepted["job_id"])
        num_ok = load.num_ok
        eventually_sync(lambda: load.num_ok > num_ok, 30)
    assert load.unexpected == []
    for accepted in (before, after):
        document = patiently(lambda accepted=accepted: _document(system, accepted))
        assert document["num_chunks"] == 1
    assert patiently(lambda: system.say("Say hello.")).usage.completion_tokens > 0


def _document(system, accepted) -> dict:
    answer = system.http().get(f"/documents/{accepted['document_id']}")
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_retriever_killed_in_the_middle_of_an_ingest_loses_and_doubles_nothing(system):
    system.wait_all_ready()
    num_lines = 240
    words = "A report of many words about the weather over the northern sea, its winds and its waves, entry"
    lines = [{"_id": f"mid-{n}", "title": f"Entry {n}", "text": f"{words} zulu{n}x."} for n in range(num_lines)]
    body = "\n".join(map(json.dumps, lines)).encode()
    answer = system.http().post(
        "/documents", files={"file": ("many.jsonl", body, "application/jsonl")}, data={"collection": "middle"}
    )
    job_id = answer.json()["job_id"]

    def in_the_middle() -> bool:
        job = system.http().get(f"/jobs/{job_id}").json()
        assert job["status"] != "succeeded" or pytest.fail("the ingest was over before it could be disturbed")
        return 0 < job["progress"]["done"] < job["progress"]["total"]

    pid = system.pid("retriever")
    eventually_sync(in_the_middle, 60, interval_s=0.02)
    os.kill(pid, 9)
    system.wait_ready("retriever", other_than=pid)
    system.finish_job(job_id, timeout_s=180)
    for number in range(0, num_lines, 7):
        hits = system.search(f"zulu{number}x", collection="middle", mode="keyword", top_k=5)
        assert [hit["external_id"] for hit in hits if f"zulu{number}x" in hit["text"]] == [f"mid-{number}"]
    listed = system.search("weather over the northern sea", collection="middle", top_k=100)
    assert len({hit["chunk_id"] for hit in listed}) == len(listed) == 100
    assert len({hit["external_id"] for hit in listed}) == 100


def test_stopped_bus_delays_and_loses_nothing(system):
    system.wait_all_ready()
    system.cli("down", "nats")
    try:
        answer = system.http().post(
            "/chat/completions",
            json={
                "model": "rag",
                "max_tokens": 4,
                "messages": [{"role": "user", "content": "What is an outbox?"}],
            },
        )
        assert answer.status_code == 200, answer.text
        accepted = system.add_text("Handed in while the bus was down.", collection="faults")
        time.sleep(1)  # long enough for a job that was not delayed to be done
        assert system.http().get(f"/jobs/{accepted['job_id']}").json()["status"] == "queued"
    finally:
        system.cli("up", "nats")
    system.finish_job(accepted["job_id"])
    _heard_by_monitor(system, answer.headers["x-trace-id"])
    system.wait_all_ready()


def test_stopped_consumer_costs_requests_nothing_and_catches_up(system):
    system.wait_all_ready()
    system.cli("down", "monitor")
    try:
        answer: httpx.Response = system.http().post("/embeddings", json={"model": ENCODER, "input": "x"})
        assert answer.status_code == 200
    finally:
        system.cli("up", "monitor")
    _heard_by_monitor(system, answer.headers["x-trace-id"])


def _heard_by_monitor(system, trace_id: str) -> None:
    def heard() -> bool:
        spans = json.loads(system.cli("trace", trace_id, "--json").stdout)["spans"]
        return "monitor" in {span["service"] for span in spans}

    eventually_sync(heard, 60, interval_s=0.5)
