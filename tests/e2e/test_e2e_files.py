"""Files, orders of jobs and who may see them, on the running system."""

import json

import pytest
from openai import NotFoundError

from testkit import eventually_sync

CHAT = "smollm2-135m-instruct"
ENDED = ("succeeded", "failed", "cancelled")
LINE = {"messages": [{"role": "user", "content": "Who prints?"}, {"role": "assistant", "content": "The press."}]}


@pytest.fixture
def other_key(system):
    return json.loads(system.cli("keys", "create", "--tenant", "e2e-files-other", "--json").stdout)["key"]


def test_file_goes_up_comes_back_and_goes_away(system, other_key):
    client, stranger = system.client(), system.client(other_key)
    content = json.dumps(LINE).encode() * 20_000  # more than one piece of 1 MiB
    made = client.files.create(file=("facts.jsonl", content), purpose="fine-tune")
    assert (made.bytes, made.filename, made.purpose, made.status) == (
        len(content),
        "facts.jsonl",
        "fine-tune",
        "processed",
    )
    assert client.files.content(made.id).content == content
    assert made.id in [one.id for one in client.files.list(limit=1)]
    for call in (stranger.files.retrieve, stranger.files.content, stranger.files.delete):
        with pytest.raises(NotFoundError):
            call(made.id)
    assert client.files.delete(made.id).deleted
    with pytest.raises(NotFoundError):
        client.files.retrieve(made.id)


def test_file_and_order_outlive_a_kill_of_the_gateway(system, patiently):
    client = system.client()
    file = client.files.create(file=("facts.jsonl", json.dumps(LINE).encode()), purpose="fine-tune")
    job = client.fine_tuning.jobs.create(model=CHAT, training_file=file.id, suffix="e2e-files")
    killed = system.kill9("gateway")
    system.wait_ready("gateway", other_than=killed)
    again = patiently(lambda: client.fine_tuning.jobs.retrieve(job.id))
    assert (again.training_file, again.model) == (file.id, CHAT)
    assert client.files.content(file.id).content == json.dumps(LINE).encode()
    patiently(lambda: _cancel(system, job.id))
    # A worker may have been quicker than the cancel, whatever it then said of one line.
    eventually_sync(lambda: client.fine_tuning.jobs.retrieve(job.id).status in ENDED, 300, interval_s=0.5)
    assert client.files.delete(file.id).deleted


def _cancel(system, job_id):
    answer = system.http().post(f"/fine_tuning/jobs/{job_id}/cancel")
    assert answer.status_code in (200, 409), answer.text


def test_what_cannot_be_ordered_is_refused_at_once(system):
    http = system.http()
    file_id = http.post("/files", files={"file": ("task.yaml", b"name: mine")}, data={"purpose": "evals"}).json()["id"]
    orders = [
        ("/fine_tuning/jobs", {"model": CHAT, "training_file": file_id}, 400, "training_file"),
        ("/fine_tuning/jobs", {"model": "rag", "training_file": file_id}, 400, "model"),
        ("/fine_tuning/jobs", {"model": CHAT, "training_file": "file-x"}, 404, "training_file"),
        ("/evaluations", {"model": "no-such-model", "task": "x"}, 404, "model"),
        ("/evaluations", {"model": CHAT, "task": "file-" + "0" * 32}, 404, "task"),
        ("/chat/completions", {"model": f"{CHAT}:nobodys", "messages": LINE["messages"]}, 404, "model"),
    ]
    for path, body, status, param in orders:
        answer = http.post(path, json=body)
        assert (answer.status_code, answer.json()["error"]["param"]) == (status, param), answer.text
    assert http.delete(f"/files/{file_id}").status_code == 200
