"""Chat, completions, embeddings and models through the official client."""

import concurrent.futures
import math
import re

import openai
import pytest

from testkit import eventually_sync

CHAT, ENCODER, RAG = "smollm2-135m-instruct", "all-minilm-l6-v2", "rag"
FRANCE = [{"role": "user", "content": "Name the capital of France."}]


def _running(system) -> float:
    found = re.findall(r"^pressroom_running_sequences(?:\{[^}]*\})? ([\d.e+]+)$", system.metrics("generator"), re.M)
    assert found, "the generator tells no running sequences"
    return sum(map(float, found))


def test_models_are_listed(system):
    assert {CHAT, ENCODER, RAG} <= {model.id for model in system.client().models.list()}


def test_chat_answers_with_exact_usage(system):
    answer = system.client().chat.completions.create(model=CHAT, messages=FRANCE, temperature=0, max_tokens=20)
    choice = answer.choices[0]
    assert choice.message.role == "assistant"
    assert "Paris" in choice.message.content
    assert choice.finish_reason == "stop"
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert 0 < answer.usage.completion_tokens <= 20


def test_chat_streams_and_stops_at_max_tokens(system):
    stream = system.client().chat.completions.create(
        model=CHAT,
        messages=[{"role": "user", "content": "Count from one to fifty in words."}],
        temperature=0,
        max_tokens=8,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    texts = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices and chunk.choices[0].delta.content]
    reasons = [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices and chunk.choices[0].finish_reason]
    usages = [chunk.usage for chunk in chunks if chunk.usage]
    assert len(texts) > 1, "the answer came in one piece"
    assert reasons == ["length"]
    assert [usage.completion_tokens for usage in usages] == [8]


def test_stop_string_ends_the_answer_and_is_not_part_of_it(system):
    answer = system.client().chat.completions.create(
        model=CHAT, messages=FRANCE, temperature=0, max_tokens=20, stop=["Paris"]
    )
    assert answer.choices[0].finish_reason == "stop"
    assert "Paris" not in answer.choices[0].message.content


def test_concurrent_chats_are_decoded_together(system):
    def long_answer(number: int):
        # So long that a look at the metrics finds it running: an answer of 40 tokens takes a fifth of a second.
        question = f"Write a long story about a fox, part {number}."
        return system.say(question, max_tokens=400, extra_body={"ignore_eos": True})

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        answers = [pool.submit(long_answer, number) for number in range(4)]
        eventually_sync(lambda: _running(system) >= 2, 60, interval_s=0.05)
        assert all(answer.result(120).usage.completion_tokens > 0 for answer in answers)


def test_client_that_leaves_frees_the_engine(system):
    stream = system.client().chat.completions.create(
        model=CHAT,
        messages=[{"role": "user", "content": "Write a very long story about the sea."}],
        max_tokens=1500,
        stream=True,
    )
    for number, _ in enumerate(stream):
        if number == 3:
            break
    assert _running(system) >= 1
    stream.close()
    eventually_sync(lambda: _running(system) == 0, 5, interval_s=0.1)


def test_completions_continue_a_text(system):
    answer = system.client().completions.create(
        model=CHAT, prompt="The capital of France is", max_tokens=5, temperature=0
    )
    assert answer.choices[0].text.strip()
    assert answer.usage.completion_tokens <= 5


def test_embeddings_are_unit_vectors_in_the_order_of_their_inputs(system):
    texts = ["a cat sits on the mat", "the parliament passed a law", "a kitten lies on the rug"]
    answer = system.client().embeddings.create(model=ENCODER, input=texts)
    assert [item.index for item in answer.data] == [0, 1, 2]
    cat, law, kitten = (item.embedding for item in answer.data)
    assert len(cat) == 384
    assert math.isclose(sum(x * x for x in cat), 1.0, abs_tol=1e-3)

    def dot(a, b):
        return sum(x * y for x, y in zip(a, b, strict=True))

    assert dot(cat, kitten) > dot(cat, law) + 0.2
    assert answer.usage.prompt_tokens > 10


def test_overlong_embedding_input_is_refused_with_the_numbers(system):
    with pytest.raises(openai.BadRequestError) as error:
        system.client().embeddings.create(model=ENCODER, input="word " * 1000)
    assert "256" in error.value.message
    assert re.search(r"100\d", error.value.message), error.value.message


def test_grounded_chat_names_its_sources(system):
    answer = system.say("Which service keeps the access keys?", model=RAG, max_tokens=16)
    extra = answer.model_extra
    assert extra["grounded"] is True
    assert {"document_id", "external_id", "chunk_id", "title", "score"} <= extra["sources"][0].keys()
    assert any(source["external_id"].startswith("samples/") for source in extra["sources"])
    assert answer.choices[0].message.content.strip()


def test_grounded_stream_carries_its_sources_on_the_chunk_with_the_finish_reason(system):
    stream = system.client().chat.completions.create(
        model=RAG, messages=[{"role": "user", "content": "What is an outbox?"}], max_tokens=8, stream=True
    )
    chunks = list(stream)
    with_sources = [chunk for chunk in chunks if "sources" in (chunk.model_extra or {})]
    assert len(with_sources) == 1
    assert with_sources[0].choices[0].finish_reason
    assert with_sources[0].model_extra["grounded"] is True
    assert len([chunk for chunk in chunks if chunk.choices and chunk.choices[0].delta.content]) > 1


def test_question_beside_the_documents_gets_the_fixed_sentence(system):
    first = system.say("How long does sourdough bread bake in a wood oven?", model=RAG)
    second = system.say("Which team won the football cup of 1987?", model=RAG)
    assert first.model_extra["grounded"] is False and second.model_extra["grounded"] is False
    assert first.model_extra["sources"] == []
    assert first.choices[0].message.content == second.choices[0].message.content != ""
