"""Jobs and documents: how reports change them, what a cancel and a second upload do, and which files stay."""

import io
import json
import os
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pressroom.common.v1 import common_pb2
from pressroom.events.v1 import events_pb2

from chassis.bus import Received
from chassis.errors import Code, PlatformError
from contracts import subjects
from gateway.api.consumers import JobConsumer
from gateway.backends import events
from gateway.backends.bus_control import BusControl
from gateway.backends.directory_files import DirectoryFiles
from gateway.backends.sqlite import Database
from gateway.backends.sqlite_documents import SqliteDocuments
from gateway.backends.sqlite_jobs import SqliteJobs
from gateway.backends.sqlite_outbox import SqliteOutbox
from gateway.backends.sqlite_schema import MIGRATIONS
from gateway.core.content import PDF, TEXT, Inspector, media_type_of
from gateway.core.documents import Description, Indexed, Library
from gateway.core.jobs import Job, JobStatus, Report, advanced, cancelled
from testkit.fake_bus import FakeBus


class FakeIndex:
    """The retriever's side: what is indexed, by tenant and id."""

    def __init__(self):
        self.indexed: dict[tuple[str, str], int] = {}
        self.error = None

    async def get(self, tenant, document_id):
        if self.error:
            raise self.error
        num_chunks = self.indexed.get((tenant, document_id))
        return None if num_chunks is None else Indexed(document_id, "", "Title", "default", num_chunks, {}, 0)

    async def delete(self, tenant, document_id):
        if self.error:
            raise self.error
        return self.indexed.pop((tenant, document_id), None)


class World:
    """The state of a gateway around real SQLite and real files."""

    def __init__(self, database, directory):
        self.database = database
        self.directory = directory
        self.bus = FakeBus()
        self.outbox = SqliteOutbox(database)
        self.jobs = SqliteJobs(database)
        self.documents = SqliteDocuments(database, self.outbox)
        self.files = DirectoryFiles(directory)
        self.index = FakeIndex()
        control = BusControl(self.bus)
        self.library = Library(self.files, self.documents, self.jobs, self.index, control, events.ingest_job)
        self.consumer = JobConsumer(self.bus, self.jobs, self.files, control)

    async def submit(self, tenant="acme", text="some text", **described):
        description = Description(TEXT, **described)
        return await self.library.submit(tenant, io.BytesIO(text.encode()), description, param="text")

    async def report(self, job_id, status, sequence, *, at=None, done=0, total=0, error="", result=""):
        progress = events_pb2.JobProgress(
            job_id=job_id,
            status=getattr(common_pb2, f"JOB_STATUS_{status}"),
            sequence=sequence,
            at_unix_ms=sequence if at is None else at,
            done=done,
            total=total,
            error=error,
            result_json=result,
        )
        payload = progress.SerializeToString()
        await self.consumer.on_progress(Received(subjects.progress(job_id), payload, "", 1, {}))

    async def orders(self):
        return [events_pb2.IngestJob.FromString(p.message.payload) for p in await self.outbox.unpublished(100)]

    def told_to_stop(self):
        return [
            events_pb2.RequestCancel.FromString(r.payload).id
            for r in self.bus.broadcasts
            if r.subject == subjects.CONTROL_REQUEST_CANCEL
        ]

    def on_disk(self):
        return {path.name for path in self.directory.iterdir()}


@pytest.fixture
async def world(tmp_path):
    directory = tmp_path / "files"
    directory.mkdir()
    database = await Database.open(tmp_path / "gateway.db", MIGRATIONS)
    yield World(database, directory)
    await database.close()


STATUSES = st.sampled_from(list(JobStatus))
REPORTS = st.builds(
    Report,
    st.just("job_1"),
    STATUSES,
    at_unix_ms=st.integers(0, 5),
    sequence=st.integers(0, 5),
    done=st.integers(0, 9),
    total=st.integers(0, 9),
)


@given(st.lists(st.one_of(REPORTS, st.just("cancel")), max_size=30))
def test_job_never_leaves_a_final_state_and_never_follows_a_late_report(steps):
    job = Job("job_1", "acme", "ingest", 0)
    for step in steps:
        before = job
        job = cancelled(job) if step == "cancel" else advanced(job, step)
        if before.status.is_final:
            assert job is before
        elif step != "cancel" and not step.status.is_final:
            late = (step.at_unix_ms, step.sequence) <= (before.reported_unix_ms, before.reported_sequence)
            assert (job is before) == late
        elif step != "cancel":
            assert job.status.is_final


async def test_submission_makes_document_job_file_and_order(world):
    document = await world.submit(title="T", external_id="x1", metadata={"year": 2020})
    (order,) = await world.orders()
    assert (order.job_id, order.document_id, order.file_id) == (document.job_id, document.document_id, document.file_id)
    assert (order.tenant, order.external_id, order.title) == ("acme", "x1", "T")
    assert json.loads(order.metadata_json) == {"year": 2020} and order.size_bytes == 9
    row = await world.documents.file("acme", document.file_id)
    assert b"".join([p async for p in world.files.read(row)]) == b"some text"
    job = await world.jobs.get("acme", document.job_id)
    assert job.status is JobStatus.QUEUED and job.type == "ingest"


async def test_refused_content_leaves_nothing(world):
    with pytest.raises(PlatformError):
        await world.submit(text="  \n ")
    assert world.on_disk() == set() and await world.orders() == []


async def test_job_follows_its_reports(world):
    document = await world.submit()
    await world.report(document.job_id, "RUNNING", 1, done=1, total=4)
    await world.report(document.job_id, "RUNNING", 3, done=3, total=4)
    await world.report(document.job_id, "RUNNING", 2, done=2, total=4)  # late
    job = await world.jobs.get("acme", document.job_id)
    assert (job.status, job.done, job.total) == (JobStatus.RUNNING, 3, 4)
    await world.report(document.job_id, "SUCCEEDED", 4, done=4, total=4, result='{"num_chunks": 9}')
    await world.report(document.job_id, "FAILED", 5, error="late")
    job = await world.jobs.get("acme", document.job_id)
    assert job.status is JobStatus.SUCCEEDED and job.result == {"num_chunks": 9} and job.error is None
    assert (await world.documents.get("acme", document.document_id)).status is JobStatus.SUCCEEDED


async def test_second_attempt_counts_although_its_sequence_begins_anew(world):
    document = await world.submit()
    await world.report(document.job_id, "RUNNING", 7, at=1000, done=5)
    await world.report(document.job_id, "RUNNING", 1, at=2000, done=1)
    assert (await world.jobs.get("acme", document.job_id)).done == 1


async def test_report_on_an_unknown_job_is_ignored_and_nonsense_is_refused_for_good(world):
    await world.report("job_unknown", "RUNNING", 1)
    for payload in (b"\xff\xff", events_pb2.JobProgress(job_id="j").SerializeToString()):
        with pytest.raises(PlatformError) as error:
            await world.consumer.on_progress(Received("pressroom.progress.j", payload, "", 1, {}))
        assert not error.value.retryable


async def test_dead_letter_fails_its_job(world):
    document = await world.submit()
    payload = events_pb2.IngestJob(job_id=document.job_id).SerializeToString()
    headers = {"Pressroom-Error": "poison"}
    await world.consumer.on_dead_job(Received("pressroom.dead.pressroom.jobs.ingest", payload, "", 1, headers))
    job = await world.jobs.get("acme", document.job_id)
    assert (job.status, job.error) == (JobStatus.FAILED, "poison")


async def test_cancel_before_the_order_left_withdraws_it(world):
    document = await world.submit()
    job = await world.jobs.cancel("acme", document.job_id)
    assert job.status is JobStatus.CANCELLED and await world.orders() == []


async def test_cancelled_job_is_not_revived_and_its_worker_is_told_again(world):
    document = await world.submit()
    await world.jobs.cancel("acme", document.job_id)
    await world.report(document.job_id, "RUNNING", 1)
    await world.report(document.job_id, "SUCCEEDED", 2)
    assert (await world.jobs.get("acme", document.job_id)).status is JobStatus.CANCELLED
    assert world.told_to_stop() == [document.job_id]
    row = await world.documents.file("acme", document.file_id)
    assert row.is_withdrawn


@pytest.mark.parametrize(("word", "status"), [("CANCELLED", JobStatus.CANCELLED), ("FAILED", JobStatus.CANCELLED)])
async def test_running_job_is_cancelled_when_its_worker_stops(world, word, status):
    document = await world.submit()
    await world.report(document.job_id, "RUNNING", 1)
    job = await world.jobs.cancel("acme", document.job_id)
    assert job.status is JobStatus.RUNNING and job.cancel_requested
    await world.report(document.job_id, word, 2)
    assert (await world.jobs.get("acme", document.job_id)).status is status


async def test_other_tenants_see_and_cancel_nothing(world):
    document = await world.submit()
    assert await world.jobs.get("other", document.job_id) is None
    assert await world.jobs.cancel("other", document.job_id) is None
    assert await world.documents.get("other", document.document_id) is None
    assert await world.documents.file("other", document.file_id) is None
    assert list(await world.jobs.newest("other", limit=10, after=None)) == []
    assert list(await world.jobs.newest("other", limit=10, after=document.job_id)) == []
    assert list(await world.documents.delete("other", document.document_id)) == []
    assert await world.documents.get("acme", document.document_id) is not None


async def test_same_external_id_is_the_same_document(world):
    first = await world.submit(external_id="x")
    second = await world.submit(text="new", external_id="x")
    assert first.document_id == second.document_id and first.job_id != second.job_id
    assert (await world.submit(tenant="other", external_id="x")).document_id != first.document_id
    assert (await world.submit(external_id="x", collection="c2")).document_id != first.document_id
    assert len(await world.documents.newest("acme", collection="default", limit=10, after=None)) == 1
    # The first file stays until its job has ended, then goes; the second stays with the document.
    assert {first.file_id, second.file_id} <= world.on_disk()
    await world.report(first.job_id, "SUCCEEDED", 1)
    await world.report(second.job_id, "SUCCEEDED", 1)
    assert first.file_id not in world.on_disk() and second.file_id in world.on_disk()
    third = await world.submit(text="newest", external_id="x")
    assert second.file_id not in world.on_disk() and third.file_id in world.on_disk()


async def test_older_job_that_is_still_queued_is_superseded_by_a_newer_success(world):
    first = await world.submit(external_id="x")
    second = await world.submit(text="new", external_id="x")
    await world.report(second.job_id, "SUCCEEDED", 1)
    job = await world.jobs.get("acme", first.job_id)
    assert job.status is JobStatus.CANCELLED and second.job_id in job.error
    assert world.told_to_stop() == [first.job_id] and first.file_id not in world.on_disk()


async def test_deleting_removes_document_chunks_and_file(world):
    document = await world.submit()
    await world.report(document.job_id, "SUCCEEDED", 1)
    world.index.indexed["acme", document.document_id] = 3
    assert await world.library.delete("acme", document.document_id) == 3
    assert world.on_disk() == set()
    with pytest.raises(PlatformError) as error:
        await world.library.get("acme", document.document_id)
    assert error.value.code is Code.NOT_FOUND


async def test_document_stays_whole_while_the_index_is_away(world):
    document = await world.submit()
    await world.report(document.job_id, "SUCCEEDED", 1)
    world.index.error = PlatformError(Code.UNAVAILABLE, "away")
    with pytest.raises(PlatformError):
        await world.library.delete("acme", document.document_id)
    assert await world.documents.get("acme", document.document_id) and document.file_id in world.on_disk()


async def test_queued_document_is_deleted_and_one_being_indexed_is_busy(world):
    queued, running = await world.submit(), await world.submit()
    await world.library.delete("acme", queued.document_id)
    assert world.told_to_stop() == [queued.job_id]
    await world.report(running.job_id, "RUNNING", 1)
    with pytest.raises(PlatformError) as error:
        await world.library.delete("acme", running.document_id)
    assert error.value.code is Code.CONFLICT and error.value.retryable
    await world.report(running.job_id, "CANCELLED", 2)
    await world.library.delete("acme", running.document_id)
    assert world.on_disk() == set()


async def test_line_of_an_upload_is_deleted_by_the_id_that_the_index_gave(world):
    world.index.indexed["acme", "doc_line"] = 2
    assert await world.library.delete("acme", "doc_line") == 2
    with pytest.raises(PlatformError):
        await world.library.delete("acme", "doc_line")


async def test_lists_go_on_where_they_ended(world):
    ids = [(await world.submit()).document_id for _ in range(5)]
    first = [d.document_id for d in await world.documents.newest("acme", collection=None, limit=3, after=None)]
    rest = [d.document_id for d in await world.documents.newest("acme", collection=None, limit=3, after=first[-1])]
    assert first + rest == ids[::-1]


async def test_damaged_file_is_not_handed_out_as_whole(world):
    document = await world.submit()
    (world.directory / document.file_id).write_bytes(b"some tezt")
    row = await world.documents.file("acme", document.file_id)
    with pytest.raises(PlatformError) as error:
        [p async for p in world.files.read(row)]
    assert error.value.code is Code.DATA_LOSS and row.sha256 in error.value.message


async def test_sweep_removes_old_orphans_only(world):
    document = await world.submit()
    old, young = (world.directory / f"file_{c * 32}" for c in "ab")
    part = world.directory / f"file_{'c' * 32}.part"
    foreign = world.directory / "somebody-elses"
    hours_ago = time.time() - 7200
    for path in (old, young, part, foreign):
        path.write_bytes(b"x")
    for path in (old, part, foreign, world.directory / document.file_id):
        os.utime(path, (hours_ago, hours_ago))
    assert await world.files.sweep(await world.documents.file_ids()) == 2
    assert world.on_disk() == {document.file_id, young.name, foreign.name}


@pytest.mark.parametrize(
    ("declared", "filename", "expected"),
    [
        ("text/plain", "a.md", "text/markdown"),
        ("application/octet-stream", "A.PDF", "application/pdf"),
        (None, "notes.txt", "text/plain"),
        ("text/html; charset=utf-8", None, "text/html"),
        ("application/x-ndjson", "x", "application/jsonl"),
        ("application/pdf", "a.txt", "application/pdf"),
        ("text/plain", None, "text/plain"),
    ],
)
def test_media_type_is_found(declared, filename, expected):
    assert media_type_of(declared, filename) == expected


@pytest.mark.parametrize(
    ("declared", "filename"), [("image/png", "a.txt"), ("application/octet-stream", "a.exe"), (None, None)]
)
def test_unknown_media_type_is_refused(declared, filename):
    with pytest.raises(PlatformError) as error:
        media_type_of(declared, filename)
    assert error.value.code is Code.UNSUPPORTED_MEDIA_TYPE


def inspect(media_type, content, piece=7):
    inspector = Inspector(media_type)
    for start in range(0, len(content), piece):
        inspector.feed(content[start : start + piece])
    inspector.finish()


@pytest.mark.parametrize(
    ("media_type", "content", "code"),
    [
        (TEXT, b"", Code.INVALID_ARGUMENT),
        (TEXT, b"\xef\xbb\xbf \n", Code.INVALID_ARGUMENT),
        (PDF, b"", Code.INVALID_ARGUMENT),
        (TEXT, b"abc\0def", Code.UNSUPPORTED_MEDIA_TYPE),
        (TEXT, b"\x89PNG\r\n\x1a\n", Code.UNSUPPORTED_MEDIA_TYPE),
        (TEXT, b"cut off \xe2\x82", Code.UNSUPPORTED_MEDIA_TYPE),
        (TEXT, b"%PDF-1.7 text", Code.UNSUPPORTED_MEDIA_TYPE),
        (PDF, b"plain text", Code.UNSUPPORTED_MEDIA_TYPE),
        ("application/jsonl", b"no json\n", Code.UNSUPPORTED_MEDIA_TYPE),
        ("application/jsonl", b'{"title": "no text"}\n', Code.INVALID_ARGUMENT),
        ("application/jsonl", b"[1]\n", Code.INVALID_ARGUMENT),
    ],
)
def test_content_that_is_not_what_it_claims_is_refused(media_type, content, code):
    with pytest.raises(PlatformError) as error:
        inspect(media_type, content)
    assert error.value.code is code and error.value.param == "file"


@pytest.mark.parametrize(
    ("media_type", "content"),
    [
        (TEXT, "grüße \U0001f600 und €".encode()),
        (PDF, b"\n%PDF-1.7\n\x00\xff"),
        ("application/jsonl", b'\n{"_id": "1", "text": "a"}\n{"broken'),
        ("application/jsonl", b'{"text": "' + b"a" * 100_000 + b'"}'),
    ],
)
def test_content_that_is_what_it_claims_passes(media_type, content):
    inspect(media_type, content)
