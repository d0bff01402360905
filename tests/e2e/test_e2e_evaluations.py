"""Evaluations ordered over HTTP, as a user would: by name, by a file of one's own, killed and cancelled on the way."""

from typing import Any

import httpx
import pytest

from testkit import eventually_sync

CHAT, RAG = "smollm2-135m-instruct", "rag"
TASK = """
name: small
version: "1"
metrics: [exact_match, f1, rouge1, rougeL, bleu, bits_per_byte]
generation: {max_tokens: 6}
samples:
  - {prompt: "What is the capital of France?", references: [Paris, The capital of France is Paris.]}
  - {prompt: "What is the capital of Italy?", references: [Rome, The capital of Italy is Rome.]}
  - {prompt: "What is the capital of Japan?", references: [Tokyo, The capital of Japan is Tokyo.]}
  - {prompt: "Count from one to three.", references: [one two three]}
texts: [The press prints a new page every second.]
"""
# The same, forty times over: long enough to be killed in the middle.
SAMPLES = TASK[TASK.index("  - ") : TASK.index("texts:")]
LONG_TASK = TASK.replace(SAMPLES, SAMPLES * 40).replace("name: small", "name: long")
VALUES = {
    "exact_match", "f1", "rouge1", "rouge1_precision", "rouge1_recall",
    "rougeL", "rougeL_precision", "rougeL_recall", "bleu",
}  # fmt: skip


def order(system: Any, model: str, task: str) -> str:
    answer = system.http().post("/evaluations", json={"model": model, "task": task})
    assert answer.status_code == 202, answer.text
    job_id: str = answer.json()["id"]
    return job_id


def upload(system: Any, text: str) -> str:
    files = {"file": ("task.yaml", text.encode(), "application/yaml")}
    answer = system.http().post("/files", files=files, data={"purpose": "evals"})
    assert answer.status_code == 200, answer.text
    file_id: str = answer.json()["id"]
    return file_id


def wait_for(system: Any, job_id: str, num_done: int) -> None:
    """Waits until so many answers are kept."""

    def has_begun() -> bool:
        try:
            job = system.http().get(f"/jobs/{job_id}").json()
        except httpx.HTTPError:
            return False
        assert job["status"] in ("queued", "running"), job
        return bool(job["progress"]["done"] >= num_done)

    eventually_sync(has_begun, 90, interval_s=0.1)


def test_a_task_of_ones_own_is_scored_on_the_model_and_on_the_graph_and_survives_kill9(system):
    file_id = upload(system, TASK)
    whole = system.finish_job(order(system, CHAT, file_id))["result"]
    assert set(whole) == VALUES | {"bits_per_byte"}
    for name, metric in whole.items():
        low, high = metric["ci95"]
        assert 0 <= low <= metric["value"] <= high, name
        assert metric["n"] == (1 if name == "bits_per_byte" else 4)
    assert whole["rouge1"]["value"] > 0.2, "the model knows a capital"
    assert 0.3 < whole["bits_per_byte"]["value"] < 4
    killed = order(system, CHAT, upload(system, LONG_TASK))
    wait_for(system, killed, 1)
    pid = system.kill9("evaluator")
    system.wait_ready("evaluator", other_than=pid)
    again = system.finish_job(killed)["result"]
    sizes = {name: metric["n"] for name, metric in again.items()}
    assert sizes == {name: 1 if name == "bits_per_byte" else 160 for name in whole}
    # Not the texts' equality: a near-tie may fall otherwise where more of a prompt was cached.
    assert again["bits_per_byte"]["value"] == pytest.approx(whole["bits_per_byte"]["value"], rel=0.02)
    assert set(system.finish_job(order(system, RAG, file_id))["result"]) == VALUES, "a graph predicts no texts"


def test_what_is_shipped_is_listed_and_a_job_of_it_can_be_cancelled(system):
    (task,) = system.http().get("/evaluations/tasks").json()["data"]
    assert task["id"] == "pressroom-basics" and "bits_per_byte" in task["metrics"]
    job_id = order(system, CHAT, "pressroom-basics")
    wait_for(system, job_id, 1)
    assert system.http().post(f"/jobs/{job_id}/cancel").status_code == 200
    system.finish_job(job_id, timeout_s=20, status="cancelled")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (TASK.replace("[exact_match,", "[bleurt,"), "metrics[0]: 'bleurt' is no known metric; known are bits_per_byte"),
        (TASK.replace("[Rome, ", "[yes, "), "samples[1].references[0]: it must be a text"),
        ("a: &a [1]\nb: *a", "anchors and aliases"),
    ],
    ids=["metric", "type", "alias"],
)
def test_a_bad_task_file_fails_its_job_by_name_of_the_field(system, text, told):
    job = system.finish_job(order(system, CHAT, upload(system, text)), status="failed")
    assert told in job["error"], job


@pytest.mark.parametrize(
    ("body", "param"),
    [({"model": CHAT, "task": "nope"}, "task"), ({"model": "nope", "task": "pressroom-basics"}, "model")],
)
def test_an_unknown_task_or_model_is_refused_at_the_door(system, body, param):
    answer = system.http().post("/evaluations", json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (404, param), answer.text
