"""The evaluator's gRPC clients against servers in this process, its files on a real disk, and its own service."""

import asyncio
import math
import os
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import grpc.aio
import pytest
from pressroom.evaluator.v1 import evaluator_pb2 as pb
from pressroom.evaluator.v1 import evaluator_pb2_grpc
from pressroom.gateway.v1 import gateway_pb2, gateway_pb2_grpc
from pressroom.generator.v1 import generator_pb2, generator_pb2_grpc

import testkit
from chassis import context, rpc
from chassis.errors import Code, PlatformError
from evaluator.api.grpc import EvaluatorServicer
from evaluator.backends import durable_files
from evaluator.backends.answer_files import AnswerFiles
from evaluator.backends.grpc_generator import GrpcGenerator
from evaluator.backends.grpc_graph import GrpcGraph
from evaluator.backends.result_files import ResultFiles
from evaluator.backends.scoring.runner import ChildScorer
from evaluator.backends.task_folders import SHIPPED, TaskFolders
from evaluator.core.ports import ServedModel
from evaluator.core.results import Answer, MetricValue, Result, Scored, ScoringOrder, TextBits
from evaluator.core.scoring import score
from evaluator.core.tasks import Generation, Turn


class Graphs(gateway_pb2_grpc.GraphServiceServicer):
    def __init__(self) -> None:
        self.requests: list[gateway_pb2.AnswerRequest] = []

    async def Answer(
        self, request: gateway_pb2.AnswerRequest, rpc_context: grpc.aio.ServicerContext
    ) -> gateway_pb2.AnswerResponse:
        self.requests.append(request)
        if request.model == "stops":
            await rpc_context.abort(grpc.StatusCode.CANCELLED, "the server stops")
        if request.model != "small" or context.current().tenant != "acme":
            raise PlatformError(Code.NOT_FOUND, "there is no such model", param="model")
        return gateway_pb2.AnswerResponse(text="yes", finish_reason="stop", model_version="v1")


class Generators(generator_pb2_grpc.GeneratorServiceServicer):
    """Answers as the generator does, whose own tests check that."""

    def __init__(self) -> None:
        self.requests: list[generator_pb2.GenerateRequest] = []

    async def ListModels(self, request: object, _: object) -> generator_pb2.ListModelsResponse:
        return generator_pb2.ListModelsResponse(
            models=[
                generator_pb2.ServedModel(id="small", base="small"),
                generator_pb2.ServedModel(id="small:mine", base="small"),
            ]
        )

    async def Tokenize(self, request: generator_pb2.TokenizeRequest, _: object) -> generator_pb2.TokenizeResponse:
        return generator_pb2.TokenizeResponse(token_ids=list(request.text.encode()), context_length=99)

    async def Generate(
        self, request: generator_pb2.GenerateRequest, _: object
    ) -> AsyncIterator[generator_pb2.GenerateResponse]:
        self.requests.append(request)
        scores = [
            generator_pb2.TokenLogprob(token_id=i, logprob=-1.5 if place else math.nan, token_bytes=bytes([i]))
            for place, i in enumerate(request.token_ids.ids)
        ]
        yield generator_pb2.GenerateResponse(
            started=generator_pb2.Started(prompt_tokens=len(scores), model_version="v7", prompt_logprobs=scores)
        )
        yield generator_pb2.GenerateResponse(done=generator_pb2.Done())


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[tuple[grpc.aio.Channel, Graphs, Generators, ResultFiles]]:
    graphs, generators, results = Graphs(), Generators(), ResultFiles(tmp_path / "results", max_results=2)
    results.prepare()
    server = rpc.make_server("standin")
    gateway_pb2_grpc.add_GraphServiceServicer_to_server(graphs, server)
    generator_pb2_grpc.add_GeneratorServiceServicer_to_server(generators, server)
    servicer = EvaluatorServicer(TaskFolders([SHIPPED], max_bytes=10**6), results)
    evaluator_pb2_grpc.add_EvaluatorServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with rpc.connect(f"127.0.0.1:{port}") as channel:
        yield channel, graphs, generators, results
    await server.stop(0)


ASKED = (Turn("system", "Be brief."), Turn("user", "Well?"))


@pytest.fixture(autouse=True)
def _acme() -> Iterator[None]:
    with context.use(context.RequestContext("req_1", "acme")):
        yield


async def test_a_graph_is_asked_behind_all_others_and_for_the_jobs_tenant(served) -> None:
    channel, graphs, _, _ = served
    graph = GrpcGraph(channel, timeout_s=10)
    found = await graph.answer("small", ASKED, Generation(5, 0.0, ("\n",)), seed=3, job_id="job_1")
    assert (found.text, found.model_version) == ("yes", "v1")
    (request,) = graphs.requests
    assert [(turn.role, turn.content) for turn in request.messages] == [("system", "Be brief."), ("user", "Well?")]
    assert request.priority == -1 and request.job_id == "job_1"
    assert (request.max_tokens, request.temperature, request.seed, list(request.stop)) == (5, 0.0, 3, ["\n"])
    assert request.HasField("temperature"), "0 is greedy, absent would be as the graph says"


async def test_what_the_gateway_refuses_keeps_its_words_and_what_it_cuts_off_may_be_asked_again(served) -> None:
    graph = GrpcGraph(served[0], timeout_s=10)
    with pytest.raises(PlatformError, match="no such model") as caught:
        await graph.answer("other", ASKED, Generation(), seed=3, job_id="job_1")
    assert caught.value.code is Code.NOT_FOUND and not caught.value.retryable
    with pytest.raises(PlatformError) as caught:
        await graph.answer("stops", ASKED, Generation(), seed=3, job_id="job_1")
    assert caught.value.retryable


async def test_the_generator_is_asked_for_a_prompts_log_probabilities_and_for_no_token(served) -> None:
    channel, _, generators, _ = served
    generator = GrpcGenerator(channel, timeout_s=10)
    tokenized = await generator.tokenize(ServedModel("small"), "abc")
    assert (tokenized.token_ids, tokenized.context_length) == ((97, 98, 99), 99)
    scores = await generator.token_scores(ServedModel("small", "small:mine"), tokenized.token_ids)
    assert math.isnan(scores.logprobs[0]) and scores.logprobs[1:] == [-1.5, -1.5]
    assert (scores.first_size_bytes, scores.model_version) == (1, "v7")
    (request,) = generators.requests
    assert (request.model, request.adapter, request.tenant, request.priority) == ("small", "small:mine", "acme", -1)
    assert request.stop.max_tokens == 0 and request.stop.HasField("max_tokens") and request.HasField("prompt_logprobs")


async def test_bases_adapters_and_graphs_are_told_apart(served) -> None:
    generator = GrpcGenerator(served[0], timeout_s=10)
    assert await generator.find("small") == ServedModel("small")
    assert await generator.find("small:mine") == ServedModel("small", "small:mine")
    assert await generator.find("rag") is None
    with pytest.raises(PlatformError, match="is not loaded"):
        await generator.find("small:theirs")


# The service itself.


async def test_tasks_are_listed(served) -> None:
    listed = await evaluator_pb2_grpc.EvaluatorServiceStub(served[0]).ListTasks(pb.ListTasksRequest())
    (task,) = listed.tasks
    assert (task.name, task.version, task.num_samples) == ("pressroom-basics", "1", 25)
    assert "bits_per_byte" in task.metrics and task.description


async def get_result(channel: grpc.aio.Channel, job_id: str, tenant: str = "acme") -> pb.GetResultResponse:
    stub = evaluator_pb2_grpc.EvaluatorServiceStub(channel)
    with context.use(context.RequestContext("req_1", tenant)):
        async with rpc.call("evaluator.GetResult", timeout_s=5) as call:
            return await stub.GetResult(pb.GetResultRequest(job_id=job_id), metadata=call.metadata)


def result(job_id: str, value: float = 0.5) -> Result:
    return Result(job_id, "acme", "small", "t@1", {"f1": MetricValue(value, 0.25, 0.75, 9)})


async def test_a_result_is_shown_to_its_tenant_alone(served) -> None:
    channel, *_, results = served
    await results.put(result("job_1"))
    (metric,) = (await get_result(channel, "job_1")).metrics
    assert (metric.name, metric.value, metric.ci95_low, metric.ci95_high, metric.n) == ("f1", 0.5, 0.25, 0.75, 9)
    for job_id, tenant in (("job_1", "other"), ("job_2", "acme"), ("../results/job_1", "acme"), ("", "acme")):
        with pytest.raises(PlatformError) as caught:
            await get_result(channel, job_id, tenant)
        assert caught.value.code is Code.NOT_FOUND


def test_no_call_of_the_proto_was_forgotten() -> None:
    (service,) = pb.DESCRIPTOR.services_by_name.values()
    assert {method.name for method in service.methods} <= set(vars(EvaluatorServicer))


# Files.


async def test_the_oldest_results_make_room(tmp_path: Path) -> None:
    results = ResultFiles(tmp_path, max_results=2)
    for number in range(3):
        await results.put(result(f"job_{number}"))
        os.utime(tmp_path / f"job_{number}.json", (number, number))
    await results.put(result("job_3"))
    assert sorted(os.listdir(tmp_path)) == ["job_2.json", "job_3.json"]
    assert await results.get("job_3") == result("job_3") and await results.get("job_0") is None
    (tmp_path / "job_3.json").write_text('{"job_id": "job_3"}')
    with pytest.raises(PlatformError, match="cannot be read"):
        await results.get("job_3")


async def test_answers_survive_and_are_forgotten_where_they_belong_to_no_job(tmp_path: Path) -> None:
    files = AnswerFiles(tmp_path)
    files.prepare()
    journal = await files.open("job_1", "print")
    answer, text = Answer(1, "naïve\nanswer\u2028\ud83d", "v1"), TextBits(0, 0.1 + 0.2, 7, "v1")
    await journal.append(answer)
    await journal.append(text)
    again = await files.open("job_1", "print")
    assert again.answers == {1: answer} and again.texts == {0: text}, "to the last bit"
    assert (await files.open("job_1", "other print")).answers == {}
    files.prepare()
    assert (tmp_path / "job_1.jsonl").exists()
    old = time.time() - 15 * 86_400
    os.utime(tmp_path / "job_1.jsonl", (old, old))
    files.prepare()
    assert not (tmp_path / "job_1.jsonl").exists()


async def test_a_full_disk_is_told_as_something_that_may_pass_and_leaves_no_half_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = AnswerFiles(tmp_path)
    journal = await files.open("job_1", "print")
    await journal.append(Answer(0, "one", "v1"))
    before = (tmp_path / "job_1.jsonl").read_bytes()

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(durable_files.os, "fsync", full)
    with pytest.raises(PlatformError, match="No space left") as caught:
        await journal.append(Answer(1, "two", "v1"))
    assert caught.value.retryable and 1 not in journal.answers
    assert (tmp_path / "job_1.jsonl").read_bytes() == before
    with pytest.raises(PlatformError, match="No space left"):
        await ResultFiles(tmp_path, max_results=2).put(result("job_1"))
    monkeypatch.undo()
    await journal.append(Answer(1, "two", "v1"))
    assert len((await files.open("job_1", "print")).answers) == 2


# The process that scores.

ORDER = ScoringOrder(
    ["exact_match", "rouge1", "bleu", "bits_per_byte"],
    [Scored("the cat", ["a cat", "no"]), Scored("ü \ud83d \0", ["u"])],
    [TextBits(0, 10.0, 4, "v")],
)


async def test_a_child_scores_as_one_would_here_and_behind_all_others() -> None:
    scorer = ChildScorer(timeout_s=60)
    scoring = asyncio.create_task(scorer.score(ORDER))
    await testkit.eventually(lambda: any(is_idle(pid) for pid in children()), timeout_s=30)
    assert await scoring == score(ORDER)


def children() -> list[int]:
    path = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children")
    return [int(pid) for pid in path.read_text().split()]


def is_idle(pid: int) -> bool:
    return os.sched_getscheduler(pid) == os.SCHED_IDLE


async def test_a_cancelled_score_kills_its_child_and_one_that_takes_too_long_is_refused() -> None:
    before = set(children())
    scoring = asyncio.create_task(ChildScorer(timeout_s=60).score(ORDER))
    await testkit.eventually(lambda: set(children()) - before)
    scoring.cancel()
    with pytest.raises(asyncio.CancelledError):
        await scoring
    assert set(children()) <= before
    long = ScoringOrder(["rougeL"], [Scored("a b " * 4000, ["b a " * 4000])] * 20, [])
    with pytest.raises(PlatformError, match="scoring takes more than 3 s") as caught:
        await ChildScorer(timeout_s=3).score(long)
    assert caught.value.code is Code.INVALID_ARGUMENT
