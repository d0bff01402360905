"""The routes of documents, jobs, search and admin over real SQLite, behind the real middleware."""

import httpx
import pytest
from fastapi import FastAPI

from chassis.errors import Code, PlatformError
from gateway.api import errors
from gateway.api.http_admin_audit import audit_router
from gateway.api.http_admin_keys import keys_router
from gateway.api.http_admin_tenants import tenants_router
from gateway.api.http_documents import documents_router
from gateway.api.http_jobs import jobs_router
from gateway.api.http_monitor import monitor_router
from gateway.api.http_search import search_router
from gateway.api.http_usage import usage_router
from gateway.api.middleware import RequestFrame
from gateway.api.middleware_access import Authentication, BodyCap, RateLimit
from gateway.backends import events
from gateway.backends.bus_control import BusControl
from gateway.backends.directory_files import DirectoryFiles
from gateway.backends.sqlite import Database
from gateway.backends.sqlite_audit import SqliteAudit
from gateway.backends.sqlite_documents import SqliteDocuments
from gateway.backends.sqlite_jobs import SqliteJobs
from gateway.backends.sqlite_keys import SqliteKeys
from gateway.backends.sqlite_outbox import SqliteOutbox
from gateway.backends.sqlite_prices import SqlitePrices
from gateway.backends.sqlite_schema import MIGRATIONS
from gateway.backends.sqlite_usage import SqliteUsage
from gateway.core.administration import Administration, NewKey
from gateway.core.documents import Indexed, Library
from gateway.core.finetuning import TunedModel
from gateway.core.jobs import JobStatus, Report
from gateway.core.keys import KeyRing
from gateway.core.limits import LocalLimiter
from gateway.core.monitoring import Profile, ProfileReport
from gateway.core.search import Condition, Hit, Mode, Operator
from testkit.fake_bus import FakeBus

ADMIN_KEY = "sk-admin-0123456789abcdef"
MAX_UPLOAD_BYTES = 300_000


class FakeRetriever:
    def __init__(self):
        self.indexed = {}
        self.questions = []
        self.hits = [Hit("doc_1", "", "doc_1-0", "T", "text", 0.5)]

    async def get(self, tenant, document_id):
        return self.indexed.get((tenant, document_id))

    async def delete(self, tenant, document_id):
        found = self.indexed.pop((tenant, document_id), None)
        return found.num_chunks if found else None

    async def search(self, question):
        self.questions.append(question)
        return self.hits


class FakeMonitor:
    answer: ProfileReport | None = None
    asked: tuple[str | None, int] | None = None

    async def newest(self, model, limit):
        self.asked = (model, limit)
        if self.answer is None:
            raise PlatformError(Code.UNAVAILABLE, "the monitor is away")
        return self.answer


class FakeTuned:
    async def tuned_of(self, tenant):
        return [TunedModel(f"m:of-{tenant}", "m", is_published=True)]


class Gateway:
    """A client with a key, and the state behind it."""

    def __init__(self, client, key, jobs, retriever, monitor, bus, outbox):
        self.client = client
        self.key = key
        self.jobs = jobs
        self.retriever = retriever
        self.monitor = monitor
        self.bus = bus
        self.outbox = outbox

    async def send(self, method, path, key=None, **rest):
        headers = rest.pop("headers", {}) | {"authorization": f"Bearer {key or self.key}"}
        return await self.client.request(method, path, headers=headers, **rest)

    async def post(self, path, key=None, **rest):
        return await self.send("POST", path, key, **rest)

    async def get(self, path, key=None, **rest):
        return await self.send("GET", path, key, **rest)


@pytest.fixture
async def gateway(tmp_path):
    database = await Database.open(tmp_path / "gateway.db", MIGRATIONS)
    (tmp_path / "files").mkdir()
    bus, retriever, monitor, outbox = FakeBus(), FakeRetriever(), FakeMonitor(), SqliteOutbox(database)
    jobs, documents = SqliteJobs(database), SqliteDocuments(database, outbox)
    control = BusControl(bus)
    files = DirectoryFiles(tmp_path / "files")
    library = Library(files, documents, jobs, retriever, control, events.ingest_job)
    keys = KeyRing(SqliteKeys(database), b"pepper")
    administration = Administration(SqliteKeys(database), b"pepper", keys, control)
    await administration.configure_key(ADMIN_KEY, "admin", is_admin=True, allows_text=False)
    _, key = await administration.create_key("test", NewKey("acme"))
    routes = FastAPI(redirect_slashes=False)
    errors.install(routes)
    for router in (
        documents_router(library, max_upload_bytes=MAX_UPLOAD_BYTES),
        jobs_router(jobs, control),
        search_router(retriever),
        usage_router(SqliteUsage(database), SqlitePrices(database)),
        keys_router(administration),
        tenants_router(administration),
        audit_router(SqliteAudit(database)),
        monitor_router(monitor, FakeTuned()),
    ):
        routes.include_router(router)
    capped = BodyCap(routes, max_body_bytes=200_000, max_upload_bytes=10**9)
    app = RequestFrame(
        Authentication(RateLimit(capped, limiter=LocalLimiter()), keys=keys, open_app=routes), timeout_s=30
    )
    transport = httpx.ASGITransport(app=app)
    async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
        yield Gateway(client, key, jobs, retriever, monitor, bus, outbox)
    await database.close()


def refused(response, status, param=None):
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}, response.text
    assert (response.status_code, error["param"]) == (status, param), response.text
    return error


async def finish(gateway, job_id, status=JobStatus.SUCCEEDED, **rest):
    await gateway.jobs.apply(Report(job_id, status, at_unix_ms=10, sequence=1, **rest))


async def test_text_is_accepted_and_its_job_is_told(gateway):
    body = {
        "text": "hello",
        "title": "T",
        "content_type": "text/markdown",
        "external_id": "e1",
        "metadata": {"year": 2020, "draft": False, "score": 0.5, "by": "x"},
        "collection": "notes",
    }
    response = await gateway.post("/v1/documents", json=body)
    assert response.status_code == 202 and set(response.json()) == {"job_id", "document_id"}
    job_id = response.json()["job_id"]
    assert (await gateway.get(f"/v1/jobs/{job_id}")).json() == {
        "id": job_id,
        "object": "job",
        "type": "ingest",
        "status": "queued",
        "progress": {"done": 0, "total": 0},
        "error": None,
        "result": None,
    }
    await finish(gateway, job_id, done=2, total=2, result={"num_chunks": 2})
    job = (await gateway.get(f"/v1/jobs/{job_id}")).json()
    assert (job["status"], job["progress"], job["result"]) == (
        "succeeded",
        {"done": 2, "total": 2},
        {"num_chunks": 2},
    )


async def test_uploaded_file_is_accepted(gateway):
    response = await gateway.post(
        "/v1/documents",
        files={"file": ("note.md", "# Grüße".encode(), "application/octet-stream")},
        data={"title": "Grüße", "metadata": '{"year": 2020}', "collection": "notes"},
    )
    assert response.status_code == 202, response.text
    document_id = response.json()["document_id"]
    document = (await gateway.get(f"/v1/documents/{document_id}")).json()
    assert document["content_type"] == "text/markdown" and document["filename"] == "note.md"
    assert (document["title"], document["metadata"], document["num_chunks"]) == ("Grüße", {"year": 2020}, 0)
    assert document["status"] == "queued"


async def test_file_name_that_would_break_a_line_is_kept_without_what_breaks_it(gateway):
    head = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a\x1b[2J\xc2\x85b\x00.md"\r\n\r\n'
    answer = await gateway.post(
        "/v1/documents",
        content=head + b"hello\r\n--b--\r\n",
        headers={"content-type": "multipart/form-data; boundary=b"},
    )
    assert answer.status_code == 202, answer.text
    document = (await gateway.get(f"/v1/documents/{answer.json()['document_id']}")).json()
    assert document["filename"] == "a[2Jb.md"


async def test_document_tells_its_chunks_once_indexed(gateway):
    answer = (await gateway.post("/v1/documents", json={"text": "hello"})).json()
    document_id = answer["document_id"]
    gateway.retriever.indexed["acme", document_id] = Indexed(document_id, "", "Found title", "default", 4, {}, 0)
    await finish(gateway, answer["job_id"])
    document = (await gateway.get(f"/v1/documents/{document_id}")).json()
    assert (document["status"], document["num_chunks"], document["title"]) == ("indexed", 4, "Found title")
    listed = (await gateway.get("/v1/documents")).json()
    assert [d["document_id"] for d in listed["data"]] == [document_id] and listed["has_more"] is False
    deleted = await gateway.send("DELETE", f"/v1/documents/{document_id}")
    assert deleted.json()["num_chunks"] == 4 and deleted.json()["deleted"] is True
    refused(await gateway.get(f"/v1/documents/{document_id}"), 404, "document_id")
    refused(await gateway.send("DELETE", f"/v1/documents/{document_id}"), 404, "document_id")


async def test_same_external_id_gives_the_same_document(gateway):
    first, second = [
        (await gateway.post("/v1/documents", json={"text": t, "external_id": "e"})).json() for t in ("a", "b")
    ]
    assert first["document_id"] == second["document_id"] and first["job_id"] != second["job_id"]


async def test_line_of_an_upload_is_found_in_the_index(gateway):
    gateway.retriever.indexed["acme", "doc_line"] = Indexed("doc_line", "7", "T", "default", 1, {"a": 1}, 5)
    document = (await gateway.get("/v1/documents/doc_line")).json()
    assert (document["external_id"], document["num_chunks"], document["status"]) == ("7", 1, "indexed")


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "text"),
        ({"text": 5}, "text"),
        ({"text": ""}, "text"),
        ({"text": " \n"}, "text"),
        ({"text": "a", "collection": "no spaces"}, "collection"),
        ({"text": "a", "collection": "../x"}, "collection"),
        ({"text": "a", "metadata": {"bad key": 1}}, "metadata"),
        ({"text": "a", "metadata": {"a": {"nested": 1}}}, "metadata.a"),
        ({"text": "a", "metadata": {"a": 2**60}}, "metadata.a"),
        ({"text": "a", "metadata": {f"k{i}": 1 for i in range(65)}}, "metadata"),
        ({"text": "a", "metadata": {f"k{i}": "x" * 1000 for i in range(30)}}, "metadata"),
        ({"text": "a", "title": "two\nlines"}, "title"),
        ({"text": "a", "external_id": "x" * 513}, "external_id"),
        ({"text": "a", "surprise": 1}, "surprise"),
    ],
)
async def test_bad_field_is_named(gateway, body, param):
    response = await gateway.post("/v1/documents", json=body)
    error = response.json()["error"]
    assert response.status_code == 400 and error["param"].startswith(param), response.text
    assert not await gateway.outbox.unpublished(1)


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({"text": "a\u0000b"}, 415, "text"),
        ({"text": "a", "content_type": "image/png"}, 415, "content_type"),
        ({"text": "a", "content_type": "application/pdf"}, 415, "text"),
    ],
)
async def test_text_that_is_not_what_it_claims_is_refused(gateway, body, status, param):
    refused(await gateway.post("/v1/documents", json=body), status, param)


async def test_lone_surrogate_is_a_400(gateway):
    response = await gateway.post(
        "/v1/documents", content=b'{"text": "\\ud800"}', headers={"content-type": "application/json"}
    )
    assert refused(response, 400)["code"] == "invalid_json"


FORM = "multipart/form-data; boundary=b"


async def test_form_names_the_content_type_where_that_is_wrong(gateway):
    files = {"file": ("a.bin", b"x", "text/markdown")}
    refused(await gateway.post("/v1/documents", files=files, data={"content_type": "image/png"}), 415, "content_type")
    assert (await gateway.post("/v1/documents", files=files, data={"content_type": "text/html"})).status_code == 202


@pytest.mark.parametrize(
    ("content", "content_type", "status", "param"),
    [
        (b"plain", "text/plain", 415, "content-type"),
        (b"--b--\r\n", "multipart/form-data", 400, None),
        (b"garbage", FORM, 400, None),
        (b"--b--\r\n", FORM, 400, "file"),
        (b'--b\r\nContent-Disposition: form-data; name="file"\r\n\r\nno filename\r\n--b--\r\n', FORM, 400, "file"),
        (b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.txt"\r\n\r\ncut', FORM, 400, "file"),
    ],
)
async def test_bad_form_is_refused(gateway, content, content_type, status, param):
    response = await gateway.post("/v1/documents", content=content, headers={"content-type": content_type})
    refused(response, status, param)


@pytest.mark.parametrize(
    ("file", "data", "status", "param"),
    [
        (("a.txt", b""), {}, 400, "file"),
        (("a.txt", b"\x00\x01"), {}, 415, "file"),
        (("a.pdf", b"no pdf"), {}, 415, "file"),
        (("a.exe", b"MZ"), {}, 415, "file"),
        (("a.txt", b"x"), {"metadata": "{not json"}, 400, "metadata"),
        (("a.txt", b"x"), {"metadata": "[1]"}, 400, "metadata"),
        (("a.txt", b"x"), {"metadata": '{"a": 1, "a": 2}'}, 400, "metadata"),
        (("a.txt", b"x"), {"collection": "é"}, 400, "collection"),
        (("a.txt", b"x"), {"surprise": "1"}, 400, "surprise"),
        (("a.txt", b"x"), {"title": ["a", "b"]}, 400, "title"),
        (("a.txt", b"x" * (MAX_UPLOAD_BYTES + 100_000)), {}, 413, "file"),
    ],
)
async def test_bad_upload_is_refused(gateway, file, data, status, param):
    refused(await gateway.post("/v1/documents", files={"file": file}, data=data), status, param)
    assert not await gateway.outbox.unpublished(1)


async def test_file_name_never_becomes_a_path(gateway, tmp_path):
    response = await gateway.post("/v1/documents", files={"file": ("../../../../etc/evil.txt", b"x")})
    assert response.status_code == 202
    assert len(list((tmp_path / "files").iterdir())) == 1


async def test_other_tenants_ids_are_not_found(gateway):
    answer = (await gateway.post("/v1/documents", json={"text": "a"})).json()
    other = (await gateway.post("/admin/keys", ADMIN_KEY, json={"tenant": "other"})).json()["key"]
    refused(await gateway.get(f"/v1/documents/{answer['document_id']}", other), 404, "document_id")
    refused(await gateway.send("DELETE", f"/v1/documents/{answer['document_id']}", other), 404, "document_id")
    refused(await gateway.get(f"/v1/jobs/{answer['job_id']}", other), 404, "job_id")
    refused(await gateway.post(f"/v1/jobs/{answer['job_id']}/cancel", other), 404, "job_id")
    assert (await gateway.get("/v1/documents", other)).json()["data"] == []


async def test_job_is_cancelled_once_and_for_all(gateway):
    job_id = (await gateway.post("/v1/documents", json={"text": "a"})).json()["job_id"]
    for _ in range(2):
        response = await gateway.post(f"/v1/jobs/{job_id}/cancel")
        assert response.status_code == 200 and response.json()["status"] == "cancelled"
    assert gateway.bus.broadcasts
    done = (await gateway.post("/v1/documents", json={"text": "b"})).json()["job_id"]
    await finish(gateway, done)
    assert refused(await gateway.post(f"/v1/jobs/{done}/cancel"), 409)["code"] == "job_finished"


async def test_job_is_cancelled_although_the_bus_is_away(gateway):
    job_id = (await gateway.post("/v1/documents", json={"text": "a"})).json()["job_id"]
    gateway.bus.go_down()
    assert (await gateway.post(f"/v1/jobs/{job_id}/cancel")).status_code == 200


async def test_jobs_are_listed_by_page(gateway):
    made = [(await gateway.post("/v1/documents", json={"text": "a"})).json()["job_id"] for _ in range(3)]
    page = (await gateway.get("/v1/jobs?limit=2")).json()
    assert [j["id"] for j in page["data"]] == made[:0:-1] and page["has_more"] is True
    rest = (await gateway.get(f"/v1/jobs?after={page['data'][-1]['id']}")).json()
    assert [j["id"] for j in rest["data"]] == made[:1] and rest["has_more"] is False
    refused(await gateway.get("/v1/jobs?limit=0"), 400, "limit")
    refused(await gateway.get("/v1/jobs?limit=x"), 400, "limit")


async def test_search_asks_for_the_senders_tenant(gateway):
    body = {
        "query": "what",
        "collection": "notes",
        "mode": "hybrid",
        "top_k": 3,
        "group_by": "document",
        "filter": {"year": {"$gte": 2000, "$lt": 2020.5}, "by": "x", "tag": ["a", "b"], "draft": False},
    }
    response = await gateway.post("/v1/search", json=body)
    assert response.json() == {
        "hits": [
            {
                "document_id": "doc_1",
                "external_id": None,
                "chunk_id": "doc_1-0",
                "title": "T",
                "text": "text",
                "score": 0.5,
            }
        ]
    }
    (question,) = gateway.retriever.questions
    assert (question.tenant, question.mode, question.top_k, question.group_by_document) == (
        "acme",
        Mode.HYBRID,
        3,
        True,
    )
    assert list(question.conditions) == [
        Condition("year", Operator.LT, (2020.5,)),
        Condition("year", Operator.GE, (2000,)),
        Condition("by", Operator.EQ, ("x",)),
        Condition("tag", Operator.IN, ("a", "b")),
        Condition("draft", Operator.EQ, (False,)),
    ]


async def test_search_needs_no_more_than_a_query(gateway):
    nulls = dict.fromkeys(["group_by", "filter", "collection", "mode", "top_k"])
    for body in ({"query": "what"}, {"query": "what"} | nulls):
        assert (await gateway.post("/v1/search", json=body)).status_code == 200
    for asked in gateway.retriever.questions:
        assert (asked.collection, asked.mode, asked.top_k) == ("default", Mode.DENSE, 5)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "query"),
        ({"query": ""}, "query"),
        ({"query": "  "}, "query"),
        ({"query": "a", "mode": "magic"}, "mode"),
        ({"query": "a", "top_k": 0}, "top_k"),
        ({"query": "a", "top_k": 101}, "top_k"),
        ({"query": "a", "top_k": "5"}, "top_k"),
        ({"query": "a", "group_by": "chunk"}, "group_by"),
        ({"query": "a", "filter": {"a": {"$near": 1}}}, "filter.a"),
        ({"query": "a", "filter": {"a": {}}}, "filter.a"),
        ({"query": "a", "filter": {"a": None}}, "filter.a"),
        ({"query": "a", "filter": {"a": []}}, "filter.a"),
        ({"query": "a", "filter": {'x" or tenant != "z': 1}}, "filter"),
        ({"query": "a", "filter": {f"k{i}": 1 for i in range(33)}}, "filter"),
        ({"query": "a", "extra": 1}, "extra"),
    ],
)
async def test_bad_search_names_the_field(gateway, body, param):
    response = await gateway.post("/v1/search", json=body)
    assert response.status_code == 400 and response.json()["error"]["param"].startswith(param), response.text
    assert not gateway.retriever.questions


async def test_key_is_created_used_listed_and_revoked(gateway):
    made = (await gateway.post("/admin/keys", ADMIN_KEY, json={"tenant": "t2", "rpm": 2})).json()
    assert set(made) == {"id", "key"} and made["key"].startswith(f"sk-{made['id']}-")
    statuses = [await gateway.get("/v1/jobs", made["key"]) for _ in range(3)]
    assert [s.status_code for s in statuses] == [200, 200, 429]
    assert statuses[0].headers["x-ratelimit-remaining-requests"] == "1" and "retry-after" in statuses[2].headers
    listed = (await gateway.get("/admin/keys", ADMIN_KEY)).json()["data"]
    (row,) = [r for r in listed if r["id"] == made["id"]]
    assert (row["tenant"], row["rpm"], row["revoked_at"]) == ("t2", 2, None) and "key" not in row
    assert (await gateway.send("DELETE", f"/admin/keys/{made['id']}", ADMIN_KEY)).json()["revoked"] is True
    refused(await gateway.get("/v1/jobs", made["key"]), 401)
    refused(await gateway.send("DELETE", "/admin/keys/nobody", ADMIN_KEY), 404, "id")


async def test_key_of_nulls_is_a_key_of_defaults(gateway):
    body = dict.fromkeys(["tenant", "rpm", "is_admin"])
    made = (await gateway.post("/admin/keys", ADMIN_KEY, json=body)).json()
    listed = (await gateway.get("/admin/keys", ADMIN_KEY)).json()["data"]
    (row,) = [r for r in listed if r["id"] == made["id"]]
    assert (row["tenant"], row["rpm"], row["is_admin"]) == ("default", None, False)


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/admin/keys"),
        ("GET", "/admin/keys"),
        ("DELETE", "/admin/keys/x"),
        ("GET", "/admin/usage"),
        ("GET", "/admin/usage/rows"),
        ("GET", "/admin/prices"),
        ("PUT", "/admin/prices"),
    ],
)
async def test_admin_routes_need_an_admin_key(gateway, method, path):
    refused(await gateway.send(method, path, json={}), 403)
    assert (await gateway.client.request(method, path)).status_code == 401


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"rpm": 0}, "rpm"),
        ({"rpm": 1.5}, "rpm"),
        ({"tenant": "UP"}, "tenant"),
        ({"tenant": 'a"b'}, "tenant"),
        ({"x": 1}, "x"),
    ],
)
async def test_bad_key_request_names_the_field(gateway, body, param):
    refused(await gateway.post("/admin/keys", ADMIN_KEY, json=body), 400, param)


async def test_profiles_come_from_the_monitor_with_what_they_cover(gateway):
    refused(await gateway.get("/v1/monitor/profiles"), 503)
    statistics = {"prompt.lexicon_count": {"mean": 4}}
    gateway.monitor.answer = ProfileReport([Profile("rag", 60, 30, 3, statistics)], 0.5, 2, 1.5, 7)
    assert (await gateway.get("/v1/monitor/profiles?model=rag&limit=5")).json() == {
        "object": "list",
        "data": [{"model": "rag", "window_start": 60, "window_s": 30, "num_records": 3, "statistics": statistics}],
        "sample_rate": 0.5,
        "num_waiting": 2,
        "lag_s": 1.5,
        "num_dropped": 7,
    }
    assert gateway.monitor.asked == ("rag", 5)
    refused(await gateway.get("/v1/monitor/profiles?limit=0"), 400, "limit")


async def test_profiles_of_a_tuned_model_are_for_its_tenant_and_for_admins(gateway):
    models = ["m", "m:of-acme", "m:of-others"]
    gateway.monitor.answer = ProfileReport([Profile(model, 60, 30, 3, {}) for model in models], 1.0, 0, 0.0, 0)

    async def seen(key=None):
        return [row["model"] for row in (await gateway.get("/v1/monitor/profiles", key)).json()["data"]]

    assert await seen() == ["m", "m:of-acme"]
    assert await seen(ADMIN_KEY) == models
