"""Tuned models as models: who may name them, what is accounted, and what happens while they are not served."""

import pytest
from openai import NotFoundError

from gateway.core.services import Source
from testkit import eventually

BASE = "smollm2-135m-instruct"
TUNED = f"{BASE}:press"
HI = [{"role": "user", "content": "hi"}]


@pytest.fixture
async def tuned(world):
    """A model that acme has had trained and the generator serves."""
    job = await world.order(suffix="press")
    await world.report(job["id"], "SUCCEEDED", result_json="{}")
    world.generator.adapters.add(TUNED)
    return job


def chat(model, **rest):
    return {"model": model, "messages": HI} | rest


async def test_tuned_model_answers_and_is_accounted_under_its_own_name(client, world, tuned):
    answer = await client.chat.completions.create(model=TUNED, messages=HI)
    assert (answer.model, answer.choices[0].message.content) == (TUNED, f"I am {TUNED}")
    completion = await client.completions.create(model=TUNED, prompt="hi")
    assert (completion.model, completion.choices[0].text) == (TUNED, f"I am {TUNED}")
    stream = await client.chat.completions.create(model=TUNED, messages=HI, stream=True)
    assert {chunk.model async for chunk in stream} == {TUNED}
    base = await client.chat.completions.create(model=BASE, messages=HI)
    assert base.choices[0].message.content == f"I am {BASE}"
    assert [(call.model, call.adapter, call.priority) for call in world.generator.calls] == [
        (BASE, TUNED, 0),
        (BASE, TUNED, 0),
        (BASE, TUNED, 0),
        (BASE, "", 0),
    ]
    # What its makers recommend for the base holds for what was tuned from it.
    assert world.generator.calls[0].sampling.temperature == world.generator.calls[3].sampling.temperature == 0.2
    await eventually(lambda: _has_rows(world, 4))
    rows = [(model, prompt, completion) for _, _, model, _, prompt, completion, *_ in await world.usage()]
    assert rows == [(TUNED, 3, 3)] * 3 + [(BASE, 3, 3)]


async def _has_rows(world, count):
    return len(await world.usage()) == count


async def test_several_prompts_reach_the_adapter(client, world, tuned):
    answer = await client.completions.create(model=TUNED, prompt=["a", "b"])
    assert [choice.text for choice in answer.choices] == [f"I am {TUNED}"] * 2


@pytest.mark.parametrize("path", ["/chat/completions", "/completions"])
@pytest.mark.parametrize("stream", [False, True])
async def test_another_tenant_finds_no_such_model(world, tuned, path, stream):
    body = {"model": TUNED, "stream": stream} | ({"messages": HI} if "chat" in path else {"prompt": "hi"})
    response = await world.http("other").post(path, json=body)
    assert (response.status_code, response.json()["error"]["code"]) == (404, "model_not_found")
    assert world.generator.calls == []


async def test_models_are_listed_to_their_owner_alone_and_only_while_served(client, world, tuned):
    world.generator.adapters.add(f"{BASE}:of-nobody")
    listed = {model.id: model async for model in client.models.list()}
    assert set(listed) == {BASE, TUNED, "rag", "all-minilm-l6-v2"}
    assert (listed[TUNED].owned_by, listed[TUNED].created, listed[BASE].owned_by) == ("acme", 1_800, "pressroom")
    assert (await client.models.retrieve(TUNED)).id == TUNED
    others = (await world.http("other").get("/models")).json()["data"]
    assert {model["id"] for model in others} == {BASE, "rag", "all-minilm-l6-v2"}
    assert (await world.http("other").get(f"/models/{TUNED}")).status_code == 404
    world.generator.adapters.clear()
    with pytest.raises(NotFoundError):
        await client.models.retrieve(TUNED)


async def test_published_model_that_is_not_served_yet_asks_to_come_again(world, tuned):
    world.generator.adapters.clear()
    for body in (chat(TUNED), chat(TUNED, stream=True)):
        response = await world.http().post("/chat/completions", json=body)
        assert (response.status_code, response.json()["error"]["code"]) == (503, "model_loading")
        assert response.headers["retry-after"] == "2"


async def test_model_whose_job_has_not_succeeded_does_not_exist(world):
    job = await world.order(suffix="press")
    for status in ("RUNNING", "FAILED"):
        response = await world.http().post("/chat/completions", json=chat(TUNED))
        assert (response.status_code, response.json()["error"]["code"]) == (404, "model_not_found")
        await world.report(job["id"], status, 1 + (status == "FAILED"))
    again = await world.order(suffix="press")
    await world.report(again["id"], "SUCCEEDED", result_json="{}")
    assert (await world.http().post("/chat/completions", json=chat(TUNED))).status_code == 503


async def test_model_answers_as_soon_as_it_is_served_even_if_its_jobs_end_is_not_told_yet(world):
    await world.order(suffix="press")
    world.generator.adapters.add(TUNED)
    assert (await world.http().post("/chat/completions", json=chat(TUNED))).status_code == 200


async def test_retraining_keeps_the_model_that_is_there(world, tuned):
    again = await world.order(suffix="press")
    await world.report(again["id"], "FAILED", error="no")
    assert (await world.http().post("/chat/completions", json=chat(TUNED))).status_code == 200


@pytest.mark.parametrize("model", [f"{BASE}:", ":press", ":", f"{BASE}:unknown", f"rag:{'x' * 200}", "a:b:c"])
async def test_unknown_tuned_model_is_not_found(world, model):
    response = await world.http().post("/chat/completions", json=chat(model))
    assert (response.status_code, response.json()["error"]["code"]) == (404, "model_not_found")


async def test_graph_and_encoder_take_no_suffix(world, tuned):
    world.retriever.sources = [Source("d", "", "c", "T", "text", 0.9)]
    for model in ("rag:press", "all-minilm-l6-v2:press"):
        assert (await world.http().post("/chat/completions", json=chat(model))).status_code == 404
    assert (await world.http().post("/chat/completions", json=chat("rag"))).status_code == 200
    assert world.generator.calls[-1].adapter == ""
