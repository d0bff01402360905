"""/v1/fine_tuning/jobs: OpenAI's client, tenancy, who owns an id, and what a job becomes."""

import json

import pytest
from pressroom.events.v1 import events_pb2

from chassis.bus import DEAD_PREFIX, Received
from chassis.errors import Code, PlatformError
from contracts import subjects
from gateway.backends.sqlite_finetuning import SqliteFinetunes
from gateway.core import finetuning
from gateway.core.finetuning import Run, RunEvent

BASE = "smollm2-135m-instruct"
RESULT = json.dumps(
    {
        "fine_tuned_model": f"{BASE}:press",
        "trained_tokens": 1234,
        "final_loss": 0.5,
        "adapter": {"path": "adapters/x", "manifest_sha256": "0" * 64},
    }
)
EVENTS = [
    RunEvent("e1", 1_000, "info", "message", "began"),
    RunEvent("e2", 2_000, "info", "metrics", "Step 1", {"step": 1, "train_loss": 2.5}),
    RunEvent("e3", 3_000, "warn", "message", "slow"),
]


def refused(response, status, param=None):
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}, response.text
    assert (response.status_code, error["param"]) == (status, param), response.text
    return error


async def train_orders(world):
    return [events_pb2.TrainJob.FromString(payload) for payload in await world.orders(subjects.JOBS_TRAIN)]


async def test_official_client_orders_a_job_and_follows_it_to_its_model(client, world):
    file = await client.files.create(file=("facts.jsonl", b"{}\n"), purpose="fine-tune")
    job = await client.fine_tuning.jobs.create(
        model=BASE,
        training_file=file.id,
        suffix="press",
        seed=7,
        method={
            "type": "supervised",
            "supervised": {"hyperparameters": {"n_epochs": 3, "batch_size": "auto", "learning_rate_multiplier": 0.5}},
        },
        metadata={"who": "me"},
    )
    assert job.object == "fine_tuning.job" and job.id.startswith("ftjob-") and job.status == "queued"
    assert (job.model, job.training_file, job.validation_file, job.seed) == (BASE, file.id, None, 7)
    assert (job.hyperparameters.n_epochs, job.hyperparameters.batch_size) == (3, "auto")
    assert job.method.supervised.hyperparameters.learning_rate_multiplier == 0.5
    assert (job.fine_tuned_model, job.finished_at, job.trained_tokens, job.error) == (None, None, None, None)
    assert (job.organization_id, job.result_files, job.integrations) == ("acme", [], [])
    assert (job.metadata, job.estimated_finish) == ({"who": "me"}, None)

    (order,) = await train_orders(world)
    assert (order.job_id, order.tenant, order.model, order.suffix) == (job.id, "acme", BASE, "press")
    assert (order.training_file_id, order.seed) == (file.id, 7)
    assert json.loads(order.hyperparameters_json) == {"n_epochs": 3, "learning_rate_multiplier": 0.5}
    row = await world.kept.file("acme", order.training_file_id)
    assert row.sha256 == order.training_file_sha256

    await world.report(job.id, "RUNNING", 1, done=1, total=10)
    assert (await client.fine_tuning.jobs.retrieve(job.id)).status == "running"
    await world.report(job.id, "SUCCEEDED", 2, done=10, total=10, result_json=RESULT)
    done = await client.fine_tuning.jobs.retrieve(job.id)
    assert (done.status, done.fine_tuned_model, done.trained_tokens) == ("succeeded", f"{BASE}:press", 1234)
    assert done.finished_at >= done.created_at and done.error is None
    assert [one.id async for one in client.fine_tuning.jobs.list()] == [job.id]
    checkpoints = await client.fine_tuning.jobs.checkpoints.list(job.id)
    assert checkpoints.data == []
    seen = (await world.http().get(f"/jobs/{job.id}")).json()
    assert (seen["type"], seen["status"], seen["progress"]) == ("train", "succeeded", {"done": 10, "total": 10})
    assert seen["result"] == json.loads(RESULT)


async def test_job_without_a_suffix_or_a_seed_has_both_made(world):
    job = await world.order()
    (order,) = await train_orders(world)
    assert job["suffix"] is None and order.suffix == job["id"]
    assert 0 <= job["seed"] < 2**31 and order.seed == job["seed"]
    assert job["hyperparameters"] == dict.fromkeys(("n_epochs", "batch_size", "learning_rate_multiplier"), "auto")
    await world.report(job["id"], "SUCCEEDED", result_json="{}")
    seen = (await world.http().get(f"/fine_tuning/jobs/{job['id']}")).json()
    assert seen["fine_tuned_model"] == f"{BASE}:{job['id']}" and seen["trained_tokens"] is None


async def test_older_place_of_the_hyperparameters_is_read_too(world):
    job = await world.order(hyperparameters={"n_epochs": 2}, method={"type": "supervised"})
    assert job["hyperparameters"]["n_epochs"] == 2
    both = {"method": {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2}}}}
    assert (await world.order(hyperparameters={"n_epochs": 2}, **both))["hyperparameters"]["n_epochs"] == 2


@pytest.mark.parametrize(
    ("message", "code", "param"),
    [
        ("training_file: line 3: it is not valid JSON", "invalid_training_file", "training_file"),
        ("hyperparameters.n_epochs: too many", "invalid_hyperparameters", "hyperparameters.n_epochs"),
        ("the disk is full: no space left", "job_failed", None),
        ("", "job_failed", None),
    ],
)
async def test_failed_job_says_why(world, message, code, param):
    job = await world.order()
    await world.report(job["id"], "FAILED", error=message)
    seen = (await world.http().get(f"/fine_tuning/jobs/{job['id']}")).json()
    assert seen["error"] == {"code": code, "message": message or "the job failed", "param": param}
    assert (seen["status"], seen["fine_tuned_model"]) == ("failed", None) and seen["finished_at"]


BAD_ORDERS = {
    "unknown model": ({"model": "gpt-9"}, 404, "model"),
    "a graph": ({"model": "rag"}, 400, "model"),
    "an encoder": ({"model": "all-minilm-l6-v2"}, 400, "model"),
    "a tuned model": ({"model": f"{BASE}:x"}, 400, "model"),
    "no model": ({"model": None}, 400, "model"),
    "unknown file": ({"training_file": "file-" + "0" * 32}, 404, "training_file"),
    "a path for a file": ({"training_file": "../../etc/passwd"}, 404, "training_file"),
    "no file": ({"training_file": None}, 400, "training_file"),
    "validation file": ({"validation_file": "file-" + "0" * 32}, 400, "validation_file"),
    "upper case": ({"suffix": "Press"}, 400, "suffix"),
    "underscore": ({"suffix": "a_b"}, 400, "suffix"),
    "colon": ({"suffix": "a:b"}, 400, "suffix"),
    "slash": ({"suffix": "../x"}, 400, "suffix"),
    "empty suffix": ({"suffix": ""}, 400, "suffix"),
    "hyphen first": ({"suffix": "-a"}, 400, "suffix"),
    "newline": ({"suffix": "a\n"}, 400, "suffix"),
    "no ASCII": ({"suffix": "é"}, 400, "suffix"),
    "65 characters": ({"suffix": "a" * 65}, 400, "suffix"),
    "zero epochs": ({"hyperparameters": {"n_epochs": 0}}, 400, "hyperparameters.n_epochs"),
    "too many epochs": ({"hyperparameters": {"n_epochs": 51}}, 400, "hyperparameters.n_epochs"),
    "epochs as text": ({"hyperparameters": {"n_epochs": "3"}}, 400, "hyperparameters.n_epochs"),
    "half an epoch": ({"hyperparameters": {"n_epochs": 0.5}}, 400, "hyperparameters.n_epochs"),
    "batch": ({"hyperparameters": {"batch_size": 257}}, 400, "hyperparameters.batch_size"),
    "rate": ({"hyperparameters": {"learning_rate_multiplier": 0}}, 400, "hyperparameters.learning_rate_multiplier"),
    "rate of a method": (
        {"method": {"type": "supervised", "supervised": {"hyperparameters": {"learning_rate_multiplier": -1}}}},
        400,
        "method.supervised.hyperparameters.learning_rate_multiplier",
    ),
    "two places that differ": (
        {
            "hyperparameters": {"n_epochs": 1},
            "method": {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2}}},
        },
        400,
        "hyperparameters",
    ),
    "dpo": ({"method": {"type": "dpo"}}, 400, "method.type"),
    "unknown method": ({"method": {"type": "magic"}}, 400, "method.type"),
    "integration": ({"integrations": [{"type": "wandb"}]}, 400, "integrations"),
    "negative seed": ({"seed": -1}, 400, "seed"),
    "huge seed": ({"seed": 2**63}, 400, "seed"),
    "metadata as a list": ({"metadata": ["a"]}, 400, "metadata"),
    "long value": ({"metadata": {"a": "x" * 513}}, 400, "metadata.a"),
    "many entries": ({"metadata": {str(i): "" for i in range(17)}}, 400, "metadata"),
}


@pytest.mark.parametrize("name", BAD_ORDERS)
async def test_bad_order_is_refused_by_name_and_orders_nothing(world, name):
    changes, status, param = BAD_ORDERS[name]
    body = {"model": BASE, "training_file": await world.upload()} | changes
    refused(await world.http().post("/fine_tuning/jobs", json=body), status, param)
    assert await world.orders(subjects.JOBS_TRAIN) == []
    assert (await world.http().get("/fine_tuning/jobs")).json()["data"] == []


async def test_what_cannot_be_tuned_says_why(world):
    async def message(model):
        response = await world.http().post("/fine_tuning/jobs", json={"model": model, "training_file": "x"})
        return response.json()["error"]["message"]

    assert "is a graph over 'smollm2-135m-instruct'" in await message("rag")
    assert "is an encoder" in await message("all-minilm-l6-v2")


async def test_file_for_another_purpose_is_refused(world):
    file_id = await world.upload(purpose="evals")
    response = await world.http().post("/fine_tuning/jobs", json={"model": BASE, "training_file": file_id})
    assert refused(response, 400, "training_file")["code"] == "invalid_file_purpose"


async def test_another_tenants_job_and_file_are_not_found(world):
    job = await world.order(suffix="press")
    other = world.http("other")
    for method, path in (
        ("GET", ""),
        ("POST", "/cancel"),
        ("GET", "/events"),
        ("GET", "/checkpoints"),
        ("GET", "/losses"),
    ):
        refused(await other.request(method, f"/fine_tuning/jobs/{job['id']}{path}"), 404, "fine_tuning_job_id")
    assert (await other.get(f"/jobs/{job['id']}")).status_code == 404
    assert (await other.post(f"/jobs/{job['id']}/cancel")).status_code == 404
    assert (await other.get("/fine_tuning/jobs")).json()["data"] == []
    assert (await other.get("/fine_tuning/jobs", params={"after": job["id"]})).json()["data"] == []
    body = {"model": BASE, "training_file": job["training_file"]}
    refused(await other.post("/fine_tuning/jobs", json=body), 404, "training_file")
    assert world.told_to_stop() == []
    assert (await world.http().get(f"/fine_tuning/jobs/{job['id']}")).json()["status"] == "queued"


async def test_id_belongs_to_the_tenant_that_claimed_it_first_even_if_its_job_failed(world):
    first = await world.order(suffix="press")
    await world.report(first["id"], "FAILED", error="no")
    body = {"model": BASE, "training_file": await world.upload(tenant="other"), "suffix": "press"}
    taken = refused(await world.http("other").post("/fine_tuning/jobs", json=body), 409, "suffix")
    assert taken["code"] == "suffix_taken" and "acme" not in taken["message"]
    assert (await world.http("other").get("/fine_tuning/jobs")).json()["data"] == []
    assert (await world.http("other").get("/jobs")).json()["data"] == []
    assert [order.job_id for order in await train_orders(world)] == [first["id"]]
    again = await world.order(suffix="press")  # its owner may train it anew
    assert again["id"] != first["id"]


async def test_order_that_does_not_get_through_leaves_nothing_behind(world, monkeypatch):
    """The message cannot be written: neither the job nor the claim of the id may stay."""

    def broken(connection, message):
        raise PlatformError(Code.UNAVAILABLE, "the disk is full")

    body = {"model": BASE, "training_file": await world.upload(), "suffix": "press"}
    with monkeypatch.context() as patched:
        patched.setattr("gateway.backends.sqlite_outbox.add", broken)
        assert (await world.http().post("/fine_tuning/jobs", json=body)).status_code == 503
    assert (await world.http().get("/jobs")).json()["data"] == []
    assert await SqliteFinetunes(world.database, world.outbox).tuned_of("acme") == []
    await world.order(tenant="other", suffix="press")


async def test_file_that_is_deleted_while_the_order_is_made_is_missed(world, monkeypatch):
    file_id = await world.upload()
    upload = await world.kept.get("acme", file_id)
    await world.http().delete(f"/files/{file_id}")

    async def still_there(tenant, upload_id):
        return upload

    monkeypatch.setattr(world.kept, "get", still_there)
    response = await world.http().post("/fine_tuning/jobs", json={"model": BASE, "training_file": file_id})
    refused(response, 404, "training_file")


async def test_jobs_of_one_tenant_wait_in_bounded_numbers(world, monkeypatch):
    monkeypatch.setattr(finetuning, "MAX_UNFINISHED_JOBS", 2)
    first, _ = [await world.order() for _ in range(2)]
    body = {"model": BASE, "training_file": first["training_file"]}
    response = await world.http().post("/fine_tuning/jobs", json=body)
    assert refused(response, 429)["code"] == "too_many_jobs" and response.headers["retry-after"] == "30"
    await world.order(tenant="other")
    await world.http().post(f"/fine_tuning/jobs/{first['id']}/cancel")
    await world.order()


async def test_cancel_works_by_both_routes_and_before_and_after_a_worker_has_the_job(client, world):
    queued, running = [await world.order() for _ in range(2)]
    assert (await client.fine_tuning.jobs.cancel(queued["id"])).status == "cancelled"
    assert [order.job_id for order in await train_orders(world)] == [running["id"]]
    await world.report(running["id"], "RUNNING")
    await world.http().post(f"/jobs/{running['id']}/cancel")
    assert (await client.fine_tuning.jobs.retrieve(running["id"])).status == "running"
    assert world.told_to_stop() == [queued["id"], running["id"]]
    await world.report(running["id"], "CANCELLED", 2)
    done = await client.fine_tuning.jobs.retrieve(running["id"])
    assert (done.status, done.error, done.fine_tuned_model) == ("cancelled", None, None) and done.finished_at
    assert (await client.fine_tuning.jobs.cancel(running["id"])).status == "cancelled"


async def test_job_that_has_ended_cannot_be_cancelled(world):
    job = await world.order()
    await world.report(job["id"], "SUCCEEDED", result_json="{}")
    response = await world.http().post(f"/fine_tuning/jobs/{job['id']}/cancel")
    assert refused(response, 409)["code"] == "job_finished"


async def test_other_jobs_are_no_finetuning_jobs(world):
    response = await world.http().post("/evaluations", json={"model": BASE, "task": "facts"})
    job_id = response.json()["id"]
    assert (await world.http().get(f"/fine_tuning/jobs/{job_id}")).status_code == 404
    assert (await world.http().post(f"/fine_tuning/jobs/{job_id}/cancel")).status_code == 404
    assert (await world.http().get(f"/jobs/{job_id}")).json()["status"] == "queued"


async def test_jobs_are_listed_page_by_page(client, world):
    ids = [(await world.order())["id"] for _ in range(5)]
    assert [one.id async for one in client.fine_tuning.jobs.list(limit=2)] == ids[::-1]
    refused(await world.http().get("/fine_tuning/jobs?limit=0"), 400, "limit")
    refused(await world.http().get("/fine_tuning/jobs?metadata[a]=b"), 400, "metadata")


async def test_events_come_newest_first_and_page_by_page(client, world):
    job = await world.order()
    created = f"ftevent-{job['id']}-created"
    assert [one.id async for one in client.fine_tuning.jobs.list_events(job["id"])] == [created]
    world.trainer.runs[job["id"]] = Run(1, 4, (2.5,), 99, EVENTS, "run-1")
    events = [one async for one in client.fine_tuning.jobs.list_events(job["id"], limit=2)]
    assert [one.id for one in events] == ["e3", "e2", "e1", created]
    assert (events[0].level, events[1].type, events[1].data) == ("warn", "metrics", {"step": 1, "train_loss": 2.5})
    assert events[1].created_at == 2 and events[0].object == "fine_tuning.job.event"
    page = (await world.http().get(f"/fine_tuning/jobs/{job['id']}/events", params={"after": "no such"})).json()
    assert page["data"] == [] and page["has_more"] is False


async def test_losses_are_told_in_one_piece(world):
    job = await world.order()
    path = f"/fine_tuning/jobs/{job['id']}/losses"
    assert (await world.http().get(path)).json()["losses"] == []
    world.trainer.runs[job["id"]] = Run(2, 4, (2.5, 1.25), 99, EVENTS, "run-1")
    assert (await world.http().get(path)).json() == {
        "object": "fine_tuning.job.losses",
        "step": 2,
        "total_steps": 4,
        "losses": [2.5, 1.25],
        "trained_tokens": 99,
        "tracker_run_id": "run-1",
    }


async def test_trainer_that_is_away_hides_events_and_nothing_else(world):
    job = await world.order()
    world.trainer.error = PlatformError(Code.UNAVAILABLE, "trainer is not available", retry_after_s=1)
    response = await world.http().get(f"/fine_tuning/jobs/{job['id']}/events")
    assert response.headers["retry-after"] == "1"
    refused(response, 503)
    assert (await world.http().get(f"/fine_tuning/jobs/{job['id']}")).status_code == 200
    assert (await world.http("other").get(f"/fine_tuning/jobs/{job['id']}/events")).status_code == 404


@pytest.mark.parametrize("action", ["pause", "resume"])
async def test_jobs_cannot_be_paused(world, action):
    job = await world.order()
    refused(await world.http().post(f"/fine_tuning/jobs/{job['id']}/{action}"), 501)


async def test_dead_letter_fails_the_job(world):
    job = await world.order()
    (payload,) = await world.orders(subjects.JOBS_TRAIN)
    headers = {"Pressroom-Error": "poison"}
    await world.consumer.on_dead_job(Received(DEAD_PREFIX + subjects.JOBS_TRAIN, payload, "", 1, headers))
    seen = (await world.http().get(f"/fine_tuning/jobs/{job['id']}")).json()
    assert (seen["status"], seen["error"]["message"]) == ("failed", "poison")
