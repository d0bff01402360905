"""The graph engine: what passes from node to node, what is said when nothing was found, what a file may declare."""

import shutil
from contextlib import aclosing, contextmanager

import pytest
import yaml

from chassis.errors import Code, PlatformError
from gateway.backends.graph_files import Services, assemble, read_graphs
from gateway.core.graph import Deadline, GraphError, GraphRequest, Grounding
from gateway.core.services import Chat, Delta, Done, Finished, Message, Sampling, Source, Started, Stopping, Usage
from gateway.settings import GatewaySettings

GRAPHS_DIR = GatewaySettings.model_fields["graphs_dir"].default
ENGINE = [Message("user", "who made the engine")]


def source(number, text):
    return Source(f"doc{number}", f"ext{number}", f"doc{number}-0", f"Title {number}", text, 0.9 - number / 10)


@pytest.fixture
def spans():
    return []


@pytest.fixture
def graphs(world, spans):
    @contextmanager
    def span(name):
        spans.append(f"+{name}")
        yield
        spans.append(f"-{name}")

    services = Services(world.generator, world.embedder, world.retriever, span)
    return assemble(read_graphs(GRAPHS_DIR), services)


async def run(graph, messages=ENGINE, **changes):
    prompt = Chat(tuple(messages)) if isinstance(messages, list) else messages
    request = GraphRequest(prompt=prompt, tenant="acme", **{"stopping": Stopping(max_tokens=2)} | changes)
    async with aclosing(graph.run(request, Deadline.after(10))) as events:
        return [event async for event in events]


async def test_plain_model_passes_the_generators_events_on(graphs, spans):
    events = await run(graphs["smollm2-135m-instruct"])
    assert [type(event) for event in events] == [Started, Delta, Delta, Finished, Done]
    assert spans == ["+graph.generate", "-graph.generate"]


@pytest.mark.parametrize(
    ("named", "expected"),
    [(Sampling(), (0.2, 0.9)), (Sampling(temperature=1.0), (1.0, None)), (Sampling(top_p=0.5), (None, 0.5))],
)
async def test_a_graphs_sampling_holds_only_where_the_client_names_none(graphs, world, named, expected):
    await run(graphs["smollm2-135m-instruct"], sampling=named)
    sampling = world.generator.calls[0].sampling
    assert (sampling.temperature, sampling.top_p) == expected


async def test_rag_walks_encode_retrieve_generate(graphs, spans, world):
    world.retriever.sources = [source(0, "Ada made it."), source(1, "It runs.")]
    events = await run(graphs["rag"])
    assert events[0] == Grounding(True, tuple(world.retriever.sources))
    assert [type(event) for event in events[1:]] == [Started, Delta, Delta, Finished, Done]
    assert [name for name in spans if name[0] == "+"] == ["+graph.encode", "+graph.retrieve", "+graph.generate"]
    (query,) = world.retriever.queries
    assert (query.tenant, query.collection, query.text) == ("acme", "default", "who made the engine")
    assert list(query.vector) == [0.5, 0.5, -0.25] and query.min_score is not None
    asked = world.generator.calls[0].prompt.messages[-1].content
    assert asked.index("Ada made it.") < asked.index("It runs.") < asked.index("who made the engine")


async def test_rag_says_honestly_that_nothing_was_found_and_asks_no_generator(graphs, world):
    events = await run(graphs["rag"], n=2)
    assert events[0] == Grounding(False, ())
    deltas = [event for event in events if isinstance(event, Delta)]
    assert [event.index for event in deltas] == [0, 1] and deltas[0].text.startswith("I could not find")
    assert events[-1] == Done(Usage(0, 0, 0))
    assert world.generator.calls == []


async def test_rag_drops_the_least_relevant_sources_until_the_prompt_fits(graphs, world):
    world.generator.context_length = 34
    world.retriever.sources = [source(0, "best " * 10), source(1, "good " * 10), source(2, "poor " * 10)]
    events = await run(graphs["rag"])
    assert [kept.document_id for kept in events[0].sources] == ["doc0"]
    prompt = world.generator.calls[0].prompt.messages[-1].content
    assert "best" in prompt and "good" not in prompt


async def test_rag_tells_the_numbers_where_not_even_one_source_fits(graphs, world):
    world.generator.context_length = 20
    world.retriever.sources = [source(0, "best " * 30)]
    with pytest.raises(PlatformError) as caught:
        await run(graphs["rag"])
    assert caught.value.code is Code.OUT_OF_RANGE and caught.value.reason == "context_length_exceeded"
    assert "20 tokens" in caught.value.message and world.generator.calls == []


async def test_rag_retrieves_by_the_beginning_of_a_long_question(graphs, world):
    world.retriever.sources = [source(0, "Ada made it.")]
    with pytest.raises(PlatformError) as caught:
        await run(graphs["rag"], [Message("user", "who " * 20_000)])
    assert caught.value.reason == "context_length_exceeded" and caught.value.param == "messages"
    assert len(world.embedder.calls[0][0]) == len(world.retriever.queries[0].text) == 32_768


async def test_rag_keeps_the_turns_before_and_the_clients_instruction(graphs, world):
    world.generator.context_length = 200
    world.retriever.sources = [source(0, "Ada made it.")]
    turns = [
        Message("system", "Be polite."),
        Message("user", "hello"),
        Message("assistant", "hi"),
        Message("user", "who made the engine"),
    ]
    await run(graphs["rag"], turns)
    sent = world.generator.calls[0].prompt.messages
    assert [message.role for message in sent] == ["system", "user", "assistant", "user"]
    assert "Be polite." in sent[0].content and sent[1].content == "hello" and "Ada" in sent[3].content


async def test_rag_takes_its_own_defaults_only_where_the_client_says_nothing(graphs, world):
    world.generator.context_length = 1000
    world.retriever.sources = [source(0, "Ada made it.")]
    await run(graphs["rag"], stopping=Stopping())
    await run(graphs["rag"], sampling=Sampling(temperature=1.5, frequency_penalty=0.0), stopping=Stopping(max_tokens=3))
    first, second = world.generator.calls
    assert (first.sampling.temperature, first.stopping.max_tokens) == (0.0, 128)
    assert (second.sampling.temperature, second.sampling.frequency_penalty) == (1.5, 0.0)
    assert second.stopping.max_tokens == 3


async def test_a_long_question_is_cut_for_retrieval_only(graphs, world):
    world.generator.context_length = 200
    world.retriever.sources = [source(0, "Ada made it.")]
    question = "who " * 50 + "made it"
    await run(graphs["rag"], [Message("user", question)])
    assert question in world.generator.calls[0].prompt.messages[-1].content


async def test_a_collection_can_be_named(graphs, world):
    await run(graphs["rag"], collection="papers")
    assert world.retriever.queries[0].collection == "papers"


async def test_template_signs_in_texts_do_no_harm(graphs, world):
    world.generator.context_length = 200
    world.retriever.sources = [source(0, "It costs $5 and $question {x}.")]
    await run(graphs["rag"], [Message("user", "what is $sources worth")])
    asked = world.generator.calls[0].prompt.messages[-1].content
    assert "It costs $5 and $question {x}." in asked and "what is $sources worth" in asked


async def test_a_deadline_that_passed_ends_the_walk(graphs, world):
    graph = graphs["rag"]
    with pytest.raises(PlatformError) as caught:
        async for _ in graph.run(GraphRequest(prompt=Chat(tuple(ENGINE)), tenant="acme"), Deadline.after(-1)):
            pass
    assert caught.value.code is Code.DEADLINE_EXCEEDED and world.embedder.calls == []


async def test_closing_a_run_closes_the_generator_and_the_span(graphs, world, spans):
    request = GraphRequest(prompt=Chat(tuple(ENGINE)), tenant="acme")
    async with aclosing(graphs["smollm2-135m-instruct"].run(request, Deadline.after(10))) as events:
        async for event in events:
            if isinstance(event, Delta):
                break
    assert world.generator.num_cancelled == 1


def declared(**changes):
    graph = yaml.safe_load((GRAPHS_DIR / "rag.yaml").read_text())
    return graph | changes


def nodes(*changes):
    """The nodes of rag with one changed: (index, dotted field, value)."""
    graph = declared()
    for index, field, value in changes:
        *path, last = field.split(".")
        place = graph["nodes"][index]
        for step in path:
            place = place[step]
        place[last] = value
    return graph


RAG = declared()["nodes"]

BAD_FILES = [
    ("name: [", "cannot be read as YAML"),
    ("just text", "must hold one mapping"),
    (declared(name="Not A Name"), "name: "),
    (declared(block="ensemble"), "block: the building block 'ensemble' is not available yet"),
    (declared(block="router"), "block: the building block 'router' is not available yet"),
    (declared(shadow={}), "shadow: the building block 'shadow' is not available yet"),
    (declared(block="circle"), "block: "),
    (declared(colour="red"), "colour: "),
    (declared(nodes=[]), "nodes: "),
    (declared(nodes=RAG[:2]), "nodes: the last node gives sources"),
    (declared(nodes=[RAG[1], RAG[2]]), "nodes: the node 'retrieve' takes vector, but gets request"),
    (declared(nodes=[RAG[0], RAG[2]]), "nodes: the node 'generate' takes sources, but gets vector"),
    (declared(nodes=[*RAG, RAG[2]]), "nodes: the ids must differ"),
    (nodes((0, "id", "retrieve")), "nodes: the ids must differ"),
    (nodes((0, "service", "oracle")), "nodes[0]: "),
    (nodes((0, "call", "rerank")), "nodes[0].call: "),
    (nodes((0, "shadow", {})), "nodes[0].shadow: the building block 'shadow' is not available yet"),
    (nodes((1, "params.top_k", 0)), "nodes[1].params.top_k: "),
    (nodes((1, "params.top_k", "3")), "nodes[1].params.top_k: "),
    (nodes((1, "params.min_score", 7)), "nodes[1].params.min_score: "),
    (nodes((1, "params.depth", 7)), "nodes[1].params.depth: "),
    (nodes((2, "params.template", "$sources only")), "nodes[2].params.template: "),
    (nodes((2, "params.template", "$sources $question $answer")), "nodes[2].params.template: "),
    (nodes((2, "params.source_template", "$5")), "nodes[2].params.source_template: "),
    (nodes((2, "params.nothing_found", "")), "nodes[2].params.nothing_found: "),
]


@pytest.mark.parametrize(("content", "said"), BAD_FILES, ids=lambda value: value if isinstance(value, str) else "")
def test_a_bad_file_is_refused_with_its_name_and_the_field(tmp_path, content, said):
    text = content if isinstance(content, str) else yaml.safe_dump(content)
    (tmp_path / "broken.yaml").write_text(text)
    with pytest.raises(GraphError) as caught:
        read_graphs(tmp_path)
    assert str(caught.value).startswith("broken.yaml: ") and said in str(caught.value)


def test_a_graph_declared_twice_is_refused(tmp_path):
    shutil.copy(GRAPHS_DIR / "rag.yaml", tmp_path / "a.yaml")
    shutil.copy(GRAPHS_DIR / "rag.yaml", tmp_path / "b.yaml")
    with pytest.raises(GraphError, match=r"b\.yaml: name: .*declared twice"):
        read_graphs(tmp_path)


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(GraphError, match="no graph is declared"):
        read_graphs(tmp_path)
