"""/v1/evaluations: what is ordered, what is refused, and whose."""

import json

import pytest
from pressroom.events.v1 import events_pb2

from chassis.errors import Code, PlatformError
from contracts import subjects
from gateway.core import evaluations

BASE = "smollm2-135m-instruct"
RESULT = {"f1": {"value": 0.5, "ci95": [0.25, 0.75], "n": 12}}


async def orders(world):
    return [events_pb2.EvaluateJob.FromString(payload) for payload in await world.orders(subjects.JOBS_EVALUATE)]


def evaluate(world, model=BASE, task="facts", tenant="acme"):
    return world.http(tenant).post("/evaluations", json={"model": model, "task": task})


@pytest.mark.parametrize("task", ["facts", "facts@1"])
async def test_evaluation_is_ordered_and_its_result_is_told_by_its_job(world, task):
    response = await evaluate(world, "rag", task)
    assert response.status_code == 202, response.text
    job = response.json()
    assert job["id"] == job["job_id"] and job["id"].startswith("job_")
    assert (job["object"], job["type"], job["status"]) == ("job", "evaluate", "queued")
    (order,) = await orders(world)
    assert (order.job_id, order.tenant, order.model, order.task) == (job["id"], "acme", "rag", task)
    assert (order.task_file_id, order.task_file_sha256) == ("", "")
    await world.report(job["id"], "RUNNING", 1, done=1, total=12)
    await world.report(job["id"], "SUCCEEDED", 2, done=12, total=12, result_json=json.dumps(RESULT))
    seen = (await world.http().get(f"/jobs/{job['id']}")).json()
    assert (seen["status"], seen["result"], seen["progress"]) == ("succeeded", RESULT, {"done": 12, "total": 12})


async def test_uploaded_task_is_ordered_by_file_and_checksum(world):
    file_id = await world.upload(b"name: mine", "evals")
    job = (await evaluate(world, task=file_id)).json()
    (order,) = await orders(world)
    assert (order.task, order.task_file_id) == ("", file_id)
    assert order.task_file_sha256 == (await world.kept.file("acme", file_id)).sha256
    assert (await world.http().delete(f"/files/{file_id}")).status_code == 409
    await world.report(job["id"], "FAILED", error="unknown metric 'vibes'")
    assert (await world.http().delete(f"/files/{file_id}")).status_code == 200
    assert (await world.http().get(f"/jobs/{job['id']}")).json()["error"] == "unknown metric 'vibes'"


async def test_tuned_model_is_evaluated_by_its_owner_once_it_is_published(world):
    job = await world.order(suffix="press")
    tuned = f"{BASE}:press"
    assert (await evaluate(world, tuned)).status_code == 404
    await world.report(job["id"], "SUCCEEDED", result_json="{}")
    assert (await evaluate(world, tuned)).status_code == 202
    assert (await evaluate(world, tuned, tenant="other")).status_code == 404


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({"model": "gpt-9", "task": "facts"}, 404, "model"),
        ({"model": "all-minilm-l6-v2", "task": "facts"}, 404, "model"),
        ({"model": BASE, "task": "no-such-task"}, 404, "task"),
        ({"model": BASE, "task": "facts@2"}, 404, "task"),
        ({"model": BASE, "task": "file-" + "0" * 32}, 404, "task"),
        ({"model": BASE, "task": "../facts"}, 400, "task"),
        ({"model": BASE, "task": "Facts"}, 400, "task"),
        ({"model": BASE, "task": "facts\n"}, 400, "task"),
        ({"model": BASE, "task": ""}, 400, "task"),
        ({"model": BASE, "task": "x" * 129}, 400, "task"),
        ({"model": BASE, "task": {"name": "facts"}}, 400, "task"),
        ({"model": BASE}, 400, "task"),
        ({"task": "facts"}, 400, "model"),
        ({"model": 7, "task": "facts"}, 400, "model"),
    ],
)
async def test_bad_order_is_refused_by_name_and_orders_nothing(world, body, status, param):
    response = await world.http().post("/evaluations", json=body)
    assert (response.status_code, response.json()["error"]["param"]) == (status, param), response.text
    assert await orders(world) == [] and (await world.http().get("/jobs")).json()["data"] == []


async def test_unknown_task_names_those_that_there_are(world):
    assert "facts" in (await evaluate(world, task="trivia")).json()["error"]["message"]


@pytest.mark.parametrize("code", [Code.UNAVAILABLE, Code.UNIMPLEMENTED, Code.DEADLINE_EXCEEDED])
async def test_evaluator_that_does_not_answer_delays_the_judgement_of_the_task(world, code):
    world.evaluator.error = PlatformError(code, "away")
    assert (await evaluate(world, task="trivia")).status_code == 202
    assert [order.task for order in await orders(world)] == ["trivia"]


async def test_another_tenants_task_file_and_job_are_not_found(world):
    file_id = await world.upload(b"name: mine", "evals")
    response = await evaluate(world, task=file_id, tenant="other")
    assert (response.status_code, response.json()["error"]["code"]) == (404, "file_not_found")
    job_id = (await evaluate(world)).json()["id"]
    assert (await world.http("other").get(f"/jobs/{job_id}")).status_code == 404
    assert (await world.http("other").post(f"/jobs/{job_id}/cancel")).status_code == 404


async def test_evaluations_of_one_tenant_wait_in_bounded_numbers(world, monkeypatch):
    monkeypatch.setattr(evaluations, "MAX_UNFINISHED_JOBS", 1)
    job_id = (await evaluate(world)).json()["id"]
    response = await evaluate(world)
    assert (response.status_code, response.json()["error"]["code"]) == (429, "too_many_jobs")
    await world.http().post(f"/jobs/{job_id}/cancel")
    assert (await evaluate(world)).status_code == 202


async def test_tasks_are_told(world):
    listed = (await world.http().get("/evaluations/tasks")).json()
    assert listed["data"] == [
        {
            "id": "facts",
            "object": "evaluation.task",
            "version": "1",
            "metrics": ["f1", "rouge1"],
            "description": "Facts.",
            "num_samples": 12,
        }
    ]
    world.evaluator.error = PlatformError(Code.UNAVAILABLE, "away")
    assert (await world.http().get("/evaluations/tasks")).status_code == 503
