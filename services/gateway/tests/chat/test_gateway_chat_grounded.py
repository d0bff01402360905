"""Grounded answers as clients see them."""

import json

from openai import AsyncOpenAI

from gateway.core.services import Source
from testkit import eventually

ASK = [{"role": "user", "content": "who made the engine"}]
SOURCE = Source("doc1", "", "doc1-0", "Engines", "Ada made it.", 0.5)


async def test_answer_in_one_piece_carries_its_sources(base_url, key, world):
    world.retriever.sources = [SOURCE]
    async with AsyncOpenAI(base_url=base_url, api_key=key, max_retries=0) as client:
        answer = await client.chat.completions.create(model="rag", messages=ASK, max_tokens=2)
    assert answer.choices[0].message.content == "w0 w1"
    assert answer.grounded is True
    assert answer.sources == [
        {"document_id": "doc1", "external_id": None, "chunk_id": "doc1-0", "title": "Engines", "score": 0.5}
    ]
    await eventually(lambda: len(world.ledger.records) == 1)
    assert world.ledger.records[0].grounded is True


async def test_stream_carries_sources_on_the_chunk_with_finish_reason(world):
    world.retriever.sources = [SOURCE]
    async with world.client() as client:
        body = {"model": "rag", "messages": ASK, "max_tokens": 2, "stream": True}
        response = await client.post("/v1/chat/completions", json=body)
    *lines, done = response.text.strip().split("\n\n")
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines]
    assert done == "data: [DONE]"
    with_sources = [chunk for chunk in chunks if "sources" in chunk]
    assert with_sources == [chunks[-1]]
    assert chunks[-1]["choices"][0]["finish_reason"] == "length" and chunks[-1]["grounded"] is True


async def test_nothing_found_is_said_honestly_and_costs_nothing(world):
    async with world.client() as client:
        response = await client.post("/v1/chat/completions", json={"model": "rag", "messages": ASK})
    answer = response.json()
    assert answer["grounded"] is False and answer["sources"] == []
    assert answer["choices"][0]["message"]["content"].startswith("I could not find")
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["usage"]["total_tokens"] == 0
    assert world.generator.calls == []
    await eventually(lambda: len(world.ledger.records) == 1)
    record = world.ledger.records[0]
    assert (record.grounded, record.completion_tokens, record.finish_reason) == (False, 0, "stop")


async def test_a_plain_model_says_nothing_of_grounding(world):
    async with world.client() as client:
        body = {"model": "smollm2-135m-instruct", "messages": ASK}
        response = await client.post("/v1/chat/completions", json=body)
    assert "grounded" not in response.json() and "sources" not in response.json()
