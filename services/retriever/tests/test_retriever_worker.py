"""The ingest worker on a bus in memory: what it reports, what it repeats, and what is left of it when it dies."""

import asyncio
import hashlib
import json
from collections import Counter
from dataclasses import dataclass, field

import pytest
from pressroom.common.v1 import common_pb2
from pressroom.events.v1 import events_pb2
from retriever_fakes import FakeEncoder, FakeFiles, FakeIndex

from chassis.bus import Received
from chassis.errors import Code, PlatformError
from chassis.jobs import MAX_DELIVER, MAX_DELIVER_OF_BUS, Cancellations
from contracts.jobs import decode_cancel
from contracts.subjects import CONTROL_REQUEST_CANCEL, EVENTS_DOCUMENT_INDEXED, JOBS_INGEST, PROGRESS_ALL
from retriever.api.consumers import IngestWorker
from retriever.backends.extraction.runner import BoundedExtractor
from retriever.core.chunking import ChunkingPolicy
from retriever.core.documents import Chunk, derived_document_id
from retriever.core.extraction import Limits
from retriever.core.indexing import IngestPolicy
from retriever.core.ingest import Ingestor
from retriever.core.ports import Encoded
from testkit.fake_bus import FakeBus

WORDS = " ".join(f"word{i}" for i in range(300))
AWAY = PlatformError(Code.UNAVAILABLE, "away")


@dataclass
class Stage:
    """A worker with everything that it needs, in memory."""

    bus: FakeBus = field(default_factory=FakeBus)
    files: FakeFiles = field(default_factory=FakeFiles)
    index: FakeIndex = field(default_factory=FakeIndex)
    encoder: FakeEncoder = field(default_factory=FakeEncoder)
    cancellations: Cancellations = field(default_factory=lambda: Cancellations(decode_cancel))
    patience_s: float = 0.0

    def worker(self) -> IngestWorker:
        extractor = BoundedExtractor(Limits(10**6, 10, 1000), timeout_s=20, max_memory_bytes=2**30)
        policy = IngestPolicy(ChunkingPolicy(400, 4), batch_chunks=3, patience_s=self.patience_s)
        ingestor = Ingestor(extractor, self.encoder, self.index, policy, now=lambda: 1_700_000_000)
        return IngestWorker(self.bus, self.files, ingestor, self.cancellations, patience_s=self.patience_s)

    def job(self, data: bytes | str = WORDS, job_id: str = "job_1", **fields: str) -> events_pb2.IngestJob:
        data = data.encode() if isinstance(data, str) else data
        self.files.files[f"file_{job_id}"] = data
        plain = {"tenant": "acme", "document_id": "doc_1", "content_type": "text/plain", "title": "T"}
        return events_pb2.IngestJob(
            job_id=job_id,
            file_id=f"file_{job_id}",
            file_sha256=hashlib.sha256(data).hexdigest(),
            **{**plain, **fields},
        )

    async def deliver(self, job: events_pb2.IngestJob, num_delivered: int = 1) -> None:
        payload = job.SerializeToString()
        await self.worker().handle(Received(JOBS_INGEST, payload, f"ingest-{job.job_id}", num_delivered, {}))

    def reports(self) -> list[events_pb2.JobProgress]:
        return [events_pb2.JobProgress.FromString(m.payload) for m in self.bus.stored(PROGRESS_ALL)]

    def end(self) -> events_pb2.JobProgress:
        return self.reports()[-1]

    def chunks(self, document_id: str = "doc_1") -> list[Chunk]:
        """The document's chunks; fails where one is there twice."""
        found = [chunk for chunk, _ in self.index.rows.values() if chunk.document_id == document_id]
        assert all(n == 1 for n in Counter(chunk.ordinal for chunk in found).values()), "a chunk is there twice"
        return sorted(found, key=lambda chunk: chunk.ordinal)


@pytest.fixture
def stage() -> Stage:
    return Stage()


async def test_a_job_ends_searchable_with_progress_events_and_a_result(stage: Stage) -> None:
    await stage.deliver(stage.job(external_id="ext", metadata_json='{"year": 1958}'))
    chunks = stage.chunks()
    assert len(chunks) > 8 and [c.ordinal for c in chunks] == list(range(chunks[0].num_chunks))
    assert (chunks[0].title, chunks[0].external_id, chunks[0].metadata_json) == ("T", "ext", '{"year":1958}')
    assert all(chunk.text in WORDS for chunk in chunks)
    reports = stage.reports()
    assert reports[0].status == common_pb2.JOB_STATUS_RUNNING
    assert [r.sequence for r in reports] == sorted({r.sequence for r in reports})
    end = stage.end()
    assert (end.status, end.done, end.total) == (common_pb2.JOB_STATUS_SUCCEEDED, len(chunks), len(chunks))
    assert json.loads(end.result_json) == {
        "document_id": "doc_1",
        "num_documents": 1,
        "num_chunks": len(chunks),
        "num_skipped": 0,
    }
    (stored,) = stage.bus.stored(EVENTS_DOCUMENT_INDEXED)
    event = events_pb2.DocumentIndexed.FromString(stored.payload)
    assert (event.document_id, event.tenant, event.collection, event.job_id) == ("doc_1", "acme", "default", "job_1")
    assert event.num_chunks == len(chunks) and event.content_sha256 == hashlib.sha256(WORDS.encode()).hexdigest()


@pytest.mark.parametrize("batches_before_the_end", [0, 1, 2, 3])
async def test_a_worker_that_dies_in_the_middle_leaves_nothing_lost_and_nothing_twice(
    stage: Stage, batches_before_the_end: int
) -> None:
    """The handler is cut off in the middle of a batch, as by kill -9, and the job is delivered again."""
    at_the_batch, real = asyncio.Event(), stage.encoder.encode_chunks

    async def stalls(texts: list[str]) -> Encoded:
        if len(stage.encoder.encoded) >= 3 * batches_before_the_end:
            at_the_batch.set()
            await asyncio.Event().wait()
        return await real(texts)

    stage.encoder.encode_chunks = stalls  # type: ignore[assignment, method-assign]
    first = asyncio.create_task(stage.deliver(stage.job()))
    await asyncio.wait_for(at_the_batch.wait(), 5)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    assert len(stage.index.rows) == 3 * batches_before_the_end
    stage.encoder.encode_chunks = real  # type: ignore[method-assign]
    stage.encoder.encoded.clear()
    await stage.deliver(stage.job(), num_delivered=2)
    chunks = stage.chunks()
    assert len(chunks) == chunks[0].num_chunks
    assert len(stage.encoder.encoded) == len(chunks) - 3 * batches_before_the_end, "done work is not done again"
    assert stage.end().status == common_pb2.JOB_STATUS_SUCCEEDED


async def test_a_job_that_was_done_but_not_acked_repeats_its_end_and_no_work(stage: Stage) -> None:
    await stage.deliver(stage.job())
    stage.encoder.encoded.clear()
    before = dict(stage.index.rows)
    await stage.deliver(stage.job(), num_delivered=2)
    assert stage.encoder.encoded == [] and stage.index.rows == before
    ends = [r for r in stage.reports() if r.status == common_pb2.JOB_STATUS_SUCCEEDED]
    assert len(ends) == 2 and ends[0].sequence < ends[1].sequence
    assert len(stage.bus.stored(EVENTS_DOCUMENT_INDEXED)) == 1, "the event's id is the same, so the bus drops it"


async def test_ingesting_an_id_again_replaces_what_it_had(stage: Stage) -> None:
    await stage.deliver(stage.job())
    await stage.deliver(stage.job("only a few new words", "job_2"))
    (chunk,) = stage.chunks()
    assert chunk.text == "only a few new words" and len(stage.index.rows) == 1


async def test_the_same_text_under_another_title_is_told_with_the_new_title(stage: Stage) -> None:
    await stage.deliver(stage.job("text", title="Old"))
    await stage.deliver(stage.job("text", "job_2", title="New"))
    assert [chunk.title for chunk in stage.chunks()] == ["New"]


async def test_another_document_with_the_same_external_id_is_replaced_in_its_collection_alone(stage: Stage) -> None:
    await stage.deliver(stage.job("first", external_id="x'\""))
    await stage.deliver(stage.job("elsewhere", "job_2", document_id="doc_2", external_id="x'\"", collection="other"))
    await stage.deliver(stage.job("second", "job_3", document_id="doc_3", external_id="x'\""))
    assert sorted(chunk.text for chunk, _ in stage.index.rows.values()) == ["elsewhere", "second"]


def lines(*entries: dict[str, str]) -> str:
    return "\n".join(json.dumps(entry) for entry in entries)


async def test_each_line_of_an_upload_is_a_document(stage: Stage) -> None:
    data = lines(*({"_id": str(i), "text": f"document {i}"} for i in range(100)), {"text": "no id"}, {"text": ""})
    await stage.deliver(stage.job(data, content_type="application/jsonl"))
    assert json.loads(stage.end().result_json) == {
        "document_id": "doc_1",
        "num_documents": 101,
        "num_chunks": 101,
        "num_skipped": 1,
    }
    (chunk,) = stage.chunks(derived_document_id("acme", "default", "7"))
    assert (chunk.text, chunk.upload_id, chunk.external_id) == ("document 7", "doc_1", "7")
    assert len(stage.bus.stored(EVENTS_DOCUMENT_INDEXED)) == 101


async def test_a_later_upload_of_the_same_id_drops_the_lines_that_it_no_longer_has(stage: Stage) -> None:
    kind = "application/jsonl"
    old = lines({"_id": "a", "text": "a one"}, {"_id": "b", "text": "b one"}, {"text": "nameless"})
    await stage.deliver(stage.job(old, content_type=kind))
    await stage.deliver(stage.job(lines({"_id": "a", "text": "a two"}), "job_2", content_type=kind))
    assert [chunk.text for chunk, _ in stage.index.rows.values()] == ["a two"]


@pytest.mark.parametrize(
    ("data", "fields", "part"),
    [
        (b"\x89PNG\r\n", {}, "PNG"),
        (b"text", {"content_type": "application/pdf"}, "no %PDF header"),
        (b"text", {"content_type": "image/png"}, "content_type"),
        (b'{"text": "ok"}\n{"text"', {"content_type": "application/jsonl"}, "line 2"),
        (b"text", {"metadata_json": "[]"}, "metadata"),
        (b"text", {"collection": 'x" or "1'}, "collection"),
        (b"text", {"file_sha256": "0" * 64}, "other bytes"),
        (b"text", {"file_id": "file_gone"}, "no such file"),
        (b"text", {"document_id": 'x" or "1'}, "document_id"),
    ],
)
async def test_a_job_that_can_never_work_fails_with_its_reason_at_once(
    stage: Stage, data: bytes, fields: dict[str, str], part: str
) -> None:
    job = stage.job(data)
    for name, value in fields.items():
        setattr(job, name, value)
    await stage.deliver(job)
    assert stage.end().status == common_pb2.JOB_STATUS_FAILED and part in stage.end().error
    assert stage.index.rows == {} and stage.bus.stored(EVENTS_DOCUMENT_INDEXED) == []


@pytest.mark.parametrize("tenant", ['acme" or tenant != "x', "", "a b"])
async def test_a_job_of_an_impossible_tenant_is_a_dead_letter(stage: Stage, tenant: str) -> None:
    with pytest.raises(PlatformError) as raised:
        await stage.deliver(stage.job(tenant=tenant))
    assert not raised.value.retryable and stage.index.rows == {}


async def test_a_moment_without_the_embedder_is_waited_out(stage: Stage) -> None:
    stage.patience_s = 10.0
    stage.encoder.failures = [AWAY, PlatformError(Code.DEADLINE_EXCEEDED, "slow"), AWAY]
    await stage.deliver(stage.job("short text"))
    assert stage.end().status == common_pb2.JOB_STATUS_SUCCEEDED


@pytest.mark.parametrize("error", [AWAY, PlatformError(Code.DEADLINE_EXCEEDED, "slow"), KeyError("a bug")])
async def test_a_long_absence_has_the_job_delivered_again_and_not_failed(stage: Stage, error: Exception) -> None:
    stage.encoder.failures = [error]
    with pytest.raises(PlatformError) as raised:
        await stage.deliver(stage.job())
    assert raised.value.retryable and stage.end().status == common_pb2.JOB_STATUS_RUNNING
    await stage.deliver(stage.job(), num_delivered=2)
    assert stage.end().status == common_pb2.JOB_STATUS_SUCCEEDED


async def test_the_last_delivery_fails_the_job_and_removes_what_it_wrote(stage: Stage) -> None:
    stage.encoder.failures = []
    await stage.deliver(stage.job("old text of the same document"))
    real = stage.encoder.encode_chunks

    async def dies_later(texts: list[str]) -> Encoded:
        if stage.encoder.encoded:
            raise AWAY
        return await real(texts)

    stage.encoder.encoded.clear()
    stage.encoder.encode_chunks = dies_later  # type: ignore[assignment, method-assign]
    await stage.deliver(stage.job(job_id="job_2"), num_delivered=MAX_DELIVER)
    assert stage.end().status == common_pb2.JOB_STATUS_FAILED and "given up" in stage.end().error
    assert [chunk.text for chunk in stage.chunks()] == ["old text of the same document"], "what it had still stands"


async def test_a_job_whose_worker_died_at_the_last_delivery_is_told_as_failed(stage: Stage) -> None:
    assert MAX_DELIVER_OF_BUS > MAX_DELIVER, "the bus must bring it once more"
    await stage.deliver(stage.job(), num_delivered=MAX_DELIVER + 1)
    assert stage.end().status == common_pb2.JOB_STATUS_FAILED and "given up after 45" in stage.end().error
    assert stage.encoder.encoded == [] and stage.index.rows == {}


async def test_an_index_that_is_away_delays_the_job_and_at_last_fails_it(stage: Stage) -> None:
    stage.index.is_away = True
    with pytest.raises(PlatformError) as raised:
        await stage.deliver(stage.job())
    assert raised.value.retryable
    await stage.deliver(stage.job(), num_delivered=MAX_DELIVER)
    assert stage.end().status == common_pb2.JOB_STATUS_FAILED


async def test_the_end_is_told_before_the_ack_so_a_silent_bus_brings_the_job_back(stage: Stage) -> None:
    stage.bus.go_down()
    with pytest.raises(PlatformError) as raised:
        await stage.deliver(stage.job("short"))
    assert raised.value.retryable and len(stage.chunks()) == 1
    stage.bus.come_back()
    await stage.deliver(stage.job("short"), num_delivered=2)
    assert stage.end().status == common_pb2.JOB_STATUS_SUCCEEDED and len(stage.chunks()) == 1


async def test_a_cancelled_job_stops_between_batches_and_removes_what_it_wrote(stage: Stage) -> None:
    await stage.deliver(stage.job("old text"))
    real = stage.encoder.encode_chunks
    stage.encoder.encoded.clear()

    async def cancels(texts: list[str]) -> Encoded:
        message = events_pb2.RequestCancel(id="job_2", reason="asked").SerializeToString()
        await stage.cancellations.handle(Received(CONTROL_REQUEST_CANCEL, message, "", 1, {}))
        return await real(texts)

    stage.encoder.encode_chunks = cancels  # type: ignore[assignment, method-assign]
    await stage.deliver(stage.job(job_id="job_2"))
    assert stage.end().status == common_pb2.JOB_STATUS_CANCELLED
    assert len(stage.encoder.encoded) == 3, "it stopped after the batch"
    assert [chunk.text for chunk in stage.chunks()] == ["old text"]
    assert "job_2" not in stage.cancellations


async def test_undoing_a_job_spares_the_document_that_a_later_job_completed_with_its_chunks(stage: Stage) -> None:
    real = stage.encoder.encode_chunks

    async def dies_later(texts: list[str]) -> Encoded:
        if stage.encoder.encoded:
            raise AWAY
        return await real(texts)

    stage.encoder.encode_chunks = dies_later  # type: ignore[assignment, method-assign]
    with pytest.raises(PlatformError):
        await stage.deliver(stage.job())
    assert len(stage.index.rows) == 3
    stage.encoder.encode_chunks = real  # type: ignore[method-assign]
    await stage.deliver(stage.job(job_id="job_2"))  # the same document, sent again
    assert stage.end().status == common_pb2.JOB_STATUS_SUCCEEDED
    superseded = events_pb2.RequestCancel(id="job_1").SerializeToString()
    await stage.cancellations.handle(Received(CONTROL_REQUEST_CANCEL, superseded, "", 1, {}))
    await stage.deliver(stage.job(), num_delivered=2)
    assert stage.end().status == common_pb2.JOB_STATUS_CANCELLED
    chunks = stage.chunks()
    assert len(chunks) == chunks[0].num_chunks


async def test_undoing_a_job_that_wrote_all_spares_the_document_once_a_later_job_found_it(stage: Stage) -> None:
    await stage.deliver(stage.job())  # all is written; its worker dies before anybody hears of it
    await stage.deliver(stage.job(job_id="job_2"))  # the same document, sent again
    superseded = events_pb2.RequestCancel(id="job_1").SerializeToString()
    await stage.cancellations.handle(Received(CONTROL_REQUEST_CANCEL, superseded, "", 1, {}))
    await stage.deliver(stage.job(), num_delivered=2)
    chunks = stage.chunks()
    assert chunks and len(chunks) == chunks[0].num_chunks


async def test_a_job_cancelled_before_its_turn_does_nothing(stage: Stage) -> None:
    message = events_pb2.RequestCancel(id="job_1").SerializeToString()
    await stage.cancellations.handle(Received(CONTROL_REQUEST_CANCEL, message, "", 1, {}))
    await stage.deliver(stage.job())
    assert stage.end().status == common_pb2.JOB_STATUS_CANCELLED and stage.encoder.encoded == []


async def test_jobs_of_one_document_at_once_leave_one_of_them_whole(stage: Stage) -> None:
    worker = stage.worker()
    jobs = [stage.job(f"{WORDS} version {i}", f"job_{i}") for i in range(4)]
    await asyncio.gather(
        *(worker.handle(Received(JOBS_INGEST, job.SerializeToString(), job.job_id, 1, {})) for job in jobs)
    )
    chunks = stage.chunks()
    assert len(chunks) == chunks[0].num_chunks and len({chunk.revision for chunk in chunks}) == 1


async def test_an_encoder_that_was_replaced_has_the_document_embedded_anew(stage: Stage) -> None:
    await stage.deliver(stage.job())
    stage.encoder.encoder_version = "v2"
    await stage.deliver(stage.job(job_id="job_2"))
    assert {chunk.encoder_version for chunk in stage.chunks()} == {"v2"}
