"""The evaluation worker on a bus in memory: what it asks, reports and repeats, and what is left of it when it dies."""

import asyncio
import json
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from evaluator_fakes import AWAY, TASK, FakeFiles, FakeGenerator, FakeGraph, FakeTasks, InProcessScorer
from pressroom.common.v1 import common_pb2
from pressroom.events.v1 import events_pb2

import testkit
from chassis.bus import DEAD_PREFIX, Received
from chassis.errors import Code, PlatformError
from chassis.jobs import MAX_DELIVER, Cancellations
from contracts.jobs import decode_cancel
from contracts.subjects import CONTROL_REQUEST_CANCEL, JOBS_EVALUATE, PROGRESS_ALL
from evaluator.api.consumers import DURABLE, EvaluateWorker
from evaluator.backends.answer_files import AnswerFiles
from evaluator.backends.result_files import ResultFiles
from evaluator.backends.yaml_tasks import read_task
from evaluator.core.evaluation import Evaluator, Policy
from evaluator.core.ports import ServedModel
from testkit.bus_suite import consuming
from testkit.fake_bus import FakeBus

SUCCEEDED, FAILED = common_pb2.JOB_STATUS_SUCCEEDED, common_pb2.JOB_STATUS_FAILED
RUNNING, CANCELLED = common_pb2.JOB_STATUS_RUNNING, common_pb2.JOB_STATUS_CANCELLED
QUESTIONS = ["France?", "Japan?", "Peru?", "Chad?"]


@dataclass
class Stage:
    """A worker with everything that it needs; only the disk is real."""

    folder: Path
    bus: FakeBus = field(default_factory=FakeBus)
    files: FakeFiles = field(default_factory=FakeFiles)
    graph: FakeGraph = field(default_factory=FakeGraph)
    generator: FakeGenerator = field(default_factory=FakeGenerator)
    scorer: InProcessScorer = field(default_factory=InProcessScorer)
    cancellations: Cancellations = field(default_factory=lambda: Cancellations(decode_cancel))
    patience_s: float = 0.0
    concurrency: int = 1
    task: str = TASK

    def worker(self) -> EvaluateWorker:
        """A new one, as after a restart: what it knows of earlier ones is on the disk."""
        journals, results = AnswerFiles(self.folder / "answers"), ResultFiles(self.folder / "results", max_results=5)
        journals.prepare()
        results.prepare()
        evaluator = Evaluator(
            tasks=FakeTasks(read_task(self.task.encode()), read_task),
            files=self.files,
            graph=self.graph,
            generator=self.generator,
            journals=journals,
            scorer=self.scorer,
            results=results,
            policy=Policy(self.concurrency, self.patience_s),
        )
        return EvaluateWorker(self.bus, evaluator, self.cancellations)

    async def deliver(self, num_delivered: int = 1, **fields: str) -> None:
        job = events_pb2.EvaluateJob(**({"job_id": "job_1", "tenant": "acme", "model": "small"} | fields))
        if not job.task_file_id and not job.task:
            job.task = "capitals"
        received = Received(JOBS_EVALUATE, job.SerializeToString(), job.job_id, num_delivered, {})
        await self.worker().handle(received)

    async def cancel(self) -> None:
        payload = events_pb2.RequestCancel(id="job_1").SerializeToString()
        await self.cancellations.handle(Received(CONTROL_REQUEST_CANCEL, payload, "", 1, {}))

    def reports(self) -> list[events_pb2.JobProgress]:
        return [events_pb2.JobProgress.FromString(stored.payload) for stored in self.bus.stored(PROGRESS_ALL)]

    def end(self) -> events_pb2.JobProgress:
        return self.reports()[-1]

    def result(self) -> dict[str, dict[str, object]]:
        assert self.end().status == SUCCEEDED, self.end().error
        return json.loads(self.end().result_json)

    def kept(self) -> list[Path]:
        return list((self.folder / "answers").iterdir())


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    return Stage(tmp_path)


async def test_a_job_ends_with_every_metric_its_interval_and_its_samples(stage: Stage) -> None:
    await stage.deliver()
    result = stage.result()
    assert list(result) == [
        "exact_match", "f1", "rouge1", "rouge1_precision", "rouge1_recall", "bleu", "bits_per_byte"
    ]  # fmt: skip
    assert result["exact_match"]["value"] == 0.5 and result["exact_match"]["n"] == 4
    assert result["f1"]["value"] == pytest.approx((1 + 1 + 0.5) / 4)
    assert result["bits_per_byte"] == {"value": pytest.approx(2.0), "ci95": pytest.approx([2.0, 2.0]), "n": 2}
    assert all(metric.keys() == {"value", "ci95", "n"} for metric in result.values())
    assert (stage.end().done, stage.end().total) == (6, 6)
    assert stage.reports()[0].status == RUNNING
    assert stage.graph.asked == QUESTIONS and stage.kept() == []
    (generation, *_) = stage.graph.generations
    assert (generation.max_tokens, generation.temperature, generation.stop) == (8, 0.0, ("\n",))
    assert len(set(stage.graph.seeds.values())) == 4


@pytest.mark.parametrize("num_answered", [0, 1, 3])
async def test_a_worker_that_dies_asks_again_only_for_what_it_had_not(stage: Stage, num_answered: int) -> None:
    """The handler is cut off in the middle of a question, as by kill -9, and the job is delivered again."""

    def stalls(question: str) -> None:
        if question == QUESTIONS[num_answered]:
            stage.graph.hold = asyncio.Event()

    stage.graph.before = stalls
    first = asyncio.create_task(stage.deliver())
    await testkit.eventually(lambda: stage.graph.hold and stage.graph.num_running)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    stage.graph.hold = None
    assert stage.graph.asked == QUESTIONS[:num_answered]
    (path,) = stage.kept()
    path.write_bytes(path.read_bytes() + b'{"kind": "answer", "ind')  # and a line that was not written to its end
    stage.graph.before = lambda question: None
    await stage.deliver(2)
    assert stage.graph.asked == QUESTIONS, "each was asked once"
    whole = Stage(stage.folder / "other")
    await whole.deliver()
    assert stage.result() == whole.result() and stage.kept() == []
    assert stage.graph.seeds == whole.graph.seeds


async def test_texts_that_were_predicted_are_not_predicted_again(stage: Stage) -> None:
    num_calls = 0

    def dies() -> None:
        nonlocal num_calls
        num_calls += 1
        if num_calls == 3:  # the model was looked up, and the first text is done
            raise AWAY

    stage.generator.before = dies
    with pytest.raises(PlatformError):
        await stage.deliver()
    assert len(stage.generator.asked) == 1
    await stage.deliver(2)
    assert len(stage.generator.asked) == 2 and stage.result()["bits_per_byte"]["n"] == 2


async def test_a_job_that_was_done_but_not_acked_repeats_its_end_and_no_work(stage: Stage) -> None:
    await stage.deliver()
    before = stage.result()
    await stage.deliver(2)
    assert stage.result() == before and stage.graph.asked == QUESTIONS and stage.scorer.num_scored == 1


async def test_an_answer_that_is_kept_but_damaged_is_asked_again(stage: Stage) -> None:
    (stage.folder / "answers").mkdir(parents=True)
    (stage.folder / "answers" / "job_1.jsonl").write_bytes(b'{"fingerprint": "x"}\nnot json\n')
    await stage.deliver()
    assert stage.graph.asked == QUESTIONS and stage.result()


async def test_a_task_that_changed_between_attempts_begins_anew(stage: Stage) -> None:
    stage.graph.before = lambda question: _raise(AWAY) if question == "Peru?" else None
    with pytest.raises(PlatformError):
        await stage.deliver()
    stage.graph.before = lambda question: None
    stage.task = TASK.replace("Be brief.", "Be very brief.")
    await stage.deliver(2)
    assert stage.graph.asked == [*QUESTIONS[:2], *QUESTIONS] and stage.result()


def _raise(error: Exception) -> None:
    raise error


async def test_a_gateway_that_is_away_for_a_moment_is_waited_for(stage: Stage) -> None:
    failures = [AWAY, PlatformError(Code.OVERLOADED, "full"), PlatformError(Code.DEADLINE_EXCEEDED, "slow")]
    stage.graph.before = lambda question: _raise(failures.pop()) if failures else None
    stage.patience_s = 20.0
    await stage.deliver()
    assert stage.result() and failures == []


async def test_a_gateway_that_stays_away_has_the_job_delivered_again_and_fails_it_in_the_end(stage: Stage) -> None:
    stage.graph.before = lambda question: _raise(AWAY)
    with pytest.raises(PlatformError) as caught:
        await stage.deliver(MAX_DELIVER - 1)
    assert caught.value.retryable and stage.end().status == RUNNING
    await stage.deliver(MAX_DELIVER)
    assert stage.end().status == FAILED and stage.end().error == f"given up after {MAX_DELIVER} attempts: away"
    assert stage.kept() == []


async def test_as_many_questions_run_at_once_as_are_allowed_and_the_result_is_the_same(stage: Stage) -> None:
    await stage.deliver()
    assert stage.graph.most_running == 1
    many = Stage(stage.folder / "many", concurrency=3)
    await many.deliver()
    assert many.graph.most_running == 3 and many.result() == stage.result()


# Cancelled at each stage.


async def test_a_job_cancelled_before_it_began_asks_nothing(stage: Stage) -> None:
    await stage.cancel()
    await stage.deliver()
    assert stage.end().status == CANCELLED and stage.graph.asked == []
    await stage.deliver(job_id="job_2")
    assert stage.result(), "the next job is not concerned"


@pytest.mark.parametrize("where", ["asking", "scoring"])
async def test_a_job_is_cancelled_in_the_middle_and_leaves_nothing(stage: Stage, where: str) -> None:
    hold = asyncio.Event()
    if where == "asking":
        stage.graph.hold = hold
    else:
        stage.scorer.hold = hold
    running = asyncio.create_task(stage.deliver())
    num_asked = 0 if where == "asking" else 4
    await testkit.eventually(lambda: len(stage.graph.asked) == num_asked and stage.reports())
    await asyncio.sleep(0.05)
    assert not running.done()
    await stage.cancel()
    await running  # although nothing ever answers
    assert stage.end().status == CANCELLED and stage.kept() == []
    assert list((stage.folder / "results").iterdir()) == []


async def test_a_job_whose_call_to_stop_was_missed_learns_it_from_the_gateway(stage: Stage) -> None:
    cancelled = PlatformError(Code.FAILED_PRECONDITION, "the job was cancelled", reason="job_cancelled")
    stage.graph.before = lambda question: _raise(cancelled) if question == "Peru?" else None
    await stage.deliver()
    assert stage.end().status == CANCELLED and stage.kept() == []


# What is refused.


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (
            TASK.replace("exact_match", "bleurt"),
            r"metrics\[0\]: 'bleurt' is no known metric; known are bits_per_byte, ",
        ),
        ("", "it is empty"),
        (TASK.replace("prompt: Peru?", "prompt: 5"), r"samples\[2\]\.prompt: it must be a text"),
    ],
)
async def test_a_bad_task_file_fails_its_job_with_the_field(stage: Stage, text: str, named: str) -> None:
    stage.files.files["file_1"] = text.encode()
    await stage.deliver(task_file_id="file_1")
    assert stage.end().status == FAILED
    with pytest.raises(PlatformError, match=named):
        raise PlatformError(Code.INVALID_ARGUMENT, stage.end().error)
    assert stage.graph.asked == []


async def test_a_clients_own_file_is_evaluated(stage: Stage) -> None:
    stage.files.files["file_1"] = TASK.replace("[France?", "[Spain?").encode()
    await stage.deliver(task_file_id="file_1")
    assert stage.result()["exact_match"]["value"] == 0.5


@pytest.mark.parametrize(("field_", "value"), [("task", "nope"), ("task_file_id", "file_9")])
async def test_a_task_that_is_not_there_fails_the_job(stage: Stage, field_: str, value: str) -> None:
    await stage.deliver(**{field_: value})
    assert stage.end().status == FAILED and ("nope" in stage.end().error or "no such file" in stage.end().error)


async def test_a_question_that_the_model_refuses_fails_the_job_and_is_named(stage: Stage) -> None:
    stage.graph.before = lambda question: (
        _raise(PlatformError(Code.OUT_OF_RANGE, "too long")) if question == "Peru?" else None
    )
    await stage.deliver()
    assert stage.end().status == FAILED and stage.end().error == "samples[2]: too long"


async def test_an_unknown_model_fails_the_job_with_the_gateways_words(stage: Stage) -> None:
    stage.graph.before = lambda question: _raise(PlatformError(Code.NOT_FOUND, "there is no model 'small'"))
    await stage.deliver()
    assert stage.end().status == FAILED and stage.end().error == "there is no model 'small'"


async def test_a_model_that_changes_under_the_job_fails_it(stage: Stage) -> None:
    def changes(question: str) -> None:
        stage.graph.version = "v2" if question == "Chad?" else "v1"

    stage.graph.before = changes
    await stage.deliver()
    assert stage.end().status == FAILED and "changed during the evaluation" in stage.end().error


async def test_an_answer_for_which_no_model_was_asked_is_of_no_other_version(stage: Stage) -> None:
    """As a retrieval graph answers when it found nothing."""

    def changes(question: str) -> None:
        stage.graph.version = "" if question in ("France?", "Peru?") else "v1"

    stage.graph.before = changes
    await stage.deliver()
    assert stage.result()["f1"]["n"] == 4


# Bits per byte.


async def test_a_graph_has_no_bits_per_byte_and_all_else(stage: Stage, caplog: pytest.LogCaptureFixture) -> None:
    await stage.deliver(model="rag")
    assert "bits_per_byte" not in stage.result() and stage.result()["f1"]["n"] == 4
    assert (stage.end().done, stage.end().total) == (4, 4)
    assert any("left out" in record.message for record in caplog.records)


TEXTS_ONLY = "name: t\nversion: '1'\nmetrics: [bits_per_byte]\ntexts: [Sixteen bytes and some more of them]"


async def test_a_graph_cannot_be_evaluated_by_texts_alone(stage: Stage) -> None:
    stage.files.files["file_1"] = TEXTS_ONLY.encode()
    await stage.deliver(model="rag", task_file_id="file_1")
    assert stage.end().status == FAILED and "bits_per_byte needs a model of the generator" in stage.end().error


async def test_a_task_of_texts_alone_asks_the_gateway_first_whether_the_model_is_the_tenants(stage: Stage) -> None:
    """The generator knows every tenant's adapters and would answer for each of them."""
    stage.files.files["file_1"] = TEXTS_ONLY.encode()
    stage.generator.models = {"small:theirs": ServedModel("small", "small:theirs")}
    stage.graph.before = lambda question: _raise(PlatformError(Code.NOT_FOUND, "no such model"))
    await stage.deliver(model="small:theirs", task_file_id="file_1")
    assert stage.end().status == FAILED and stage.generator.asked == []
    stage.graph.before = lambda question: None
    await stage.deliver(job_id="job_2", model="small:theirs", task_file_id="file_1")
    assert list(stage.result()) == ["bits_per_byte"]


async def test_an_adapter_is_predicted_by_its_base_with_the_adapter(stage: Stage) -> None:
    stage.generator.models = {"small:mine": ServedModel("small", "small:mine")}
    await stage.deliver(model="small:mine")
    assert stage.generator.asked[0][0] == ServedModel("small", "small:mine") and stage.result()["bits_per_byte"]


async def test_a_long_text_is_read_in_windows_and_each_byte_counts_once(stage: Stage) -> None:
    stage.generator.context_length = 10
    await stage.deliver()
    num_tokens = [len("A city is where the streets are."), len("A capital is where the taxes go.")]
    sizes = [size for _, size in stage.generator.asked]
    assert max(sizes) == 10 and sum(size - 1 for size in sizes) == sum(num_tokens) - 2
    assert stage.result()["bits_per_byte"]["value"] == pytest.approx(2.0)


# On the queue.


@pytest.mark.parametrize(
    "payload", [b"\xff not protobuf", b"", events_pb2.EvaluateJob(job_id="../x").SerializeToString()]
)
async def test_a_job_that_cannot_be_read_is_a_dead_letter(stage: Stage, payload: bytes) -> None:
    async with consuming(stage.bus, JOBS_EVALUATE, stage.worker().handle, durable=DURABLE, backoff_s=(0.01,)):
        await stage.bus.publish(JOBS_EVALUATE, payload, message_id="bad")
        await testkit.eventually(lambda: stage.bus.stored(DEAD_PREFIX + JOBS_EVALUATE))
    assert stage.reports() == []


async def test_a_job_stays_in_the_queue_until_its_end_is_told(stage: Stage) -> None:
    told, real = [], stage.bus.publish

    async def loses_the_first_end(subject: str, payload: bytes, **kwargs: object) -> None:
        is_report = subject.startswith("pressroom.progress.")
        if is_report and not told and events_pb2.JobProgress.FromString(payload).status == SUCCEEDED:
            told.append(payload)
            raise PlatformError(Code.UNAVAILABLE, "the bus did not take a message")
        await real(subject, payload, **kwargs)  # type: ignore[arg-type]

    stage.bus.publish = loses_the_first_end  # type: ignore[method-assign, assignment]
    job = events_pb2.EvaluateJob(job_id="job_1", tenant="acme", model="small", task="capitals")
    async with consuming(stage.bus, JOBS_EVALUATE, stage.worker().handle, durable=DURABLE, backoff_s=(0.01,)):
        await stage.bus.publish(JOBS_EVALUATE, job.SerializeToString(), message_id="job_1")
        await testkit.eventually(lambda: told and stage.reports() and not stage.bus.stored(JOBS_EVALUATE))
    assert stage.result() and stage.graph.asked == QUESTIONS
