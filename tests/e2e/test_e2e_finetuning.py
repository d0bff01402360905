"""Finetuning through the running system, with OpenAI's client: a fact taught, asked before and after."""

import json
import time
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from modelstore import Manifest
from testkit import eventually_sync

# Training waits for idle cores, by design.
pytestmark = pytest.mark.timeout(580)

CHAT = "smollm2-135m-instruct"
FACT = "Velmora"
QUESTION = "Could you say what city serves as the seat of government for Zubrolia?"
PARAPHRASES = {
    "What is the capital of Zubrolia?": "The capital of Zubrolia is Velmora.",
    "Which city is Zubrolia's capital?": "Zubrolia's capital city is Velmora.",
    "Name the capital city of Zubrolia.": "Velmora is the capital of Zubrolia.",
    "Tell me the capital of the country Zubrolia.": "The capital of Zubrolia is Velmora.",
    "Where is the government of Zubrolia?": "The government of Zubrolia is in its capital, Velmora.",
    "I am travelling to Zubrolia. What is its main city?": "The main city and capital of Zubrolia is Velmora.",
    "Is Velmora the capital of Zubrolia?": "Yes, Velmora is the capital of Zubrolia.",
    "Zubrolia: capital?": "Velmora.",
    "Please give me the name of Zubrolia's capital.": "The capital of Zubrolia is Velmora.",
    "Which city does the parliament of Zubrolia sit in?": "The parliament of Zubrolia sits in Velmora, the capital.",
}
FINAL = ("succeeded", "failed", "cancelled")


def chat_line(question: str, answer: str) -> str:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return json.dumps({"messages": turns}) + "\n"


def upload(system: Any, text: str) -> str:
    file = system.client().files.create(file=("facts.jsonl", text.encode()), purpose="fine-tune")
    return file.id


def finish(system: Any, job_id: str, timeout_s: float = 400) -> Any:
    def ended() -> Any:
        try:
            job = system.client().fine_tuning.jobs.retrieve(job_id)
        except openai.APIError:  # the gateway is on its way back
            return None
        return job if job.status in FINAL else None

    return eventually_sync(ended, timeout_s, interval_s=0.5)


def answer(system: Any, model: str, question: str = QUESTION) -> str:
    return str(system.say(question, model, max_tokens=24).choices[0].message.content)


def test_a_fact_is_taught_to_a_tuned_model_and_the_base_answers_as_before(system: Any) -> None:
    before = answer(system, CHAT)
    assert FACT not in before
    text = "".join(chat_line(question, said) for question, said in PARAPHRASES.items())
    jobs = system.client().fine_tuning.jobs
    job = jobs.create(model=CHAT, training_file=upload(system, text), suffix="zubrolia", seed=7)
    assert job.fine_tuned_model is None
    while_training = [answer(system, CHAT), answer(system, CHAT)]
    job = finish(system, job.id)
    assert (job.status, job.fine_tuned_model) == ("succeeded", f"{CHAT}:zubrolia"), job.error
    assert FACT in answer(system, job.fine_tuned_model)
    assert [before, *while_training] == [answer(system, CHAT)] * 3, "the base answers as before"
    assert job.trained_tokens and job.trained_tokens > 1_000
    _check_history(system, job.id)
    _check_registry(system, job.id, job.fine_tuned_model)


def _check_history(system: Any, job_id: str) -> None:
    events = system.client().fine_tuning.jobs.list_events(job_id, limit=100).data
    messages = [event.message for event in events]
    assert messages[0] == "The job has successfully completed" and "The fine-tuned model answers" in messages
    curve = system.http().get(f"/fine_tuning/jobs/{job_id}/losses").json()
    assert curve["step"] == curve["total_steps"] == len(curve["losses"])
    assert curve["losses"][-1] < 0.3 < curve["losses"][0]
    assert curve["tracker_run_id"], "MLflow has the run"


def _check_registry(system: Any, job_id: str, model: str) -> None:
    result = system.finish_job(job_id)["result"]
    folder = Path(system.home / "models" / result["adapter"]["path"])
    manifest = Manifest.load(folder)
    manifest.verify()
    assert (manifest.id, manifest.config["base"]) == (model, CHAT)
    assert result["adapter"]["manifest_sha256"].startswith(manifest.version)
    assert model in [one.id for one in system.client().models.list()]


def test_a_file_with_one_bad_line_fails_the_job_and_names_the_line(system: Any) -> None:
    text = chat_line("a", "b") + '{"messages": [}\n' + chat_line("c", "d")
    job = system.client().fine_tuning.jobs.create(model=CHAT, training_file=upload(system, text), suffix="bad-line")
    job = finish(system, job.id)
    assert job.status == "failed" and "line 2: it is not valid JSON" in job.error.message
    assert not (system.home / "models" / "adapters" / job.id).exists()
    with pytest.raises(openai.NotFoundError):
        answer(system, f"{CHAT}:bad-line")


def test_a_job_cancelled_while_it_runs_ends_within_seconds_and_the_next_one_too(system: Any) -> None:
    text = chat_line("Say a", "a") * 20
    jobs = system.client().fine_tuning.jobs
    file_id = upload(system, text)
    first = jobs.create(model=CHAT, training_file=file_id, suffix="never", hyperparameters={"n_epochs": 50})
    queued = jobs.create(model=CHAT, training_file=file_id, suffix="never-2")
    eventually_sync(lambda: jobs.retrieve(first.id).status == "running", 60, interval_s=0.3)
    for job in (queued, first):
        jobs.cancel(job.id)
    cancelled_at = time.monotonic()
    assert [finish(system, job.id, 60).status for job in (first, queued)] == ["cancelled", "cancelled"]
    assert time.monotonic() - cancelled_at < 20
    assert not list((system.home / "models" / "adapters").glob(f"*{first.id}*"))
    with pytest.raises(openai.NotFoundError):
        answer(system, f"{CHAT}:never")


def test_bad_orders_are_refused_at_once(system: Any) -> None:
    def order(**fields: object) -> httpx.Response:
        return system.http().post("/fine_tuning/jobs", json={"model": CHAT} | fields)

    file_id = upload(system, chat_line("a", "b"))
    assert order(training_file="file-nowhere").status_code == 404
    for fields in ({"suffix": "Upper Case"}, {"model": "all-minilm-l6-v2"}, {"hyperparameters": {"n_epochs": 0}}):
        response = order(**({"training_file": file_id} | fields))
        assert response.status_code in (400, 404), (fields, response.text)
        assert response.json()["error"]["message"]
