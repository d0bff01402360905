import json
from pathlib import Path

import httpx
import pytest

from devstack.api import Api, ApiError
from devstack.samples import ingest_samples, title_of


def _api(handler) -> Api:
    return Api("http://gateway/v1", "sk-a-b", httpx.MockTransport(handler))


def test_error_of_the_api_is_one_sentence_with_its_status() -> None:
    api = _api(lambda request: httpx.Response(404, json={"error": {"message": "no such job"}}))
    with pytest.raises(ApiError, match=r"^no such job \(HTTP 404\)$") as error:
        api.get("/jobs/x")
    assert error.value.status == 404


def test_gateway_that_is_away_is_said_to_be() -> None:
    def refuse(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("connection refused")

    with pytest.raises(ApiError, match="is it up"):
        _api(refuse).get("/models")


def test_admin_routes_lie_beside_v1() -> None:
    seen: list[str] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(str(request.url))
        assert request.headers["authorization"] == "Bearer sk-a-b"
        return httpx.Response(200, json={})

    _api(answer).get("/admin/keys")
    _api(answer).get("/models")
    assert seen == ["http://gateway/admin/keys", "http://gateway/v1/models"]


def test_chat_streams_chunks_and_raises_an_error_in_the_middle() -> None:
    lines = 'data: {"choices": [{"delta": {"content": "a"}}]}\n\ndata: {"error": {"message": "engine lost"}}\n\n'
    stream = _api(lambda request: httpx.Response(200, text=lines)).chat({"model": "m"})
    assert next(stream)["choices"][0]["delta"]["content"] == "a"
    with pytest.raises(ApiError, match="engine lost"):
        next(stream)


class FakeGateway:
    """Takes documents; each job is done at its second look."""

    def __init__(self) -> None:
        self.documents: dict[str, dict] = {}
        self.looks: dict[str, int] = {}
        self.outcome = "succeeded"

    def __call__(self, request: httpx.Request) -> httpx.Response:
        path = request.url.path.removeprefix("/v1")
        if request.method == "POST":
            document = json.loads(request.content)
            number = f"d{len(self.documents)}"
            self.documents[number] = document
            return httpx.Response(202, json={"job_id": f"j{number}", "document_id": number})
        if path.startswith("/jobs/"):
            self.looks[path] = self.looks.get(path, 0) + 1
            done = self.looks[path] > 1
            return httpx.Response(200, json={"status": self.outcome if done else "running", "error": "torn"})
        known = path.removeprefix("/documents/") in self.documents
        return httpx.Response(200, json={"num_chunks": 2}) if known else httpx.Response(404, json={})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "samples"
    made.mkdir()
    (made / "a.md").write_text("# The first\n\ntext")
    (made / "b.md").write_text("text alone")
    return made


def test_samples_are_ingested_once_and_again_when_changed_or_gone(tmp_path: Path, folder: Path) -> None:
    gateway, memory = FakeGateway(), tmp_path / "samples.json"

    def ingest() -> str:
        return ingest_samples(_api(gateway), memory, lambda text: None, folder)

    assert ingest() == "2 documents, 2 of them new"
    assert gateway.documents["d0"]["title"] == "The first"
    assert gateway.documents["d0"]["external_id"] == "samples/a.md"
    assert ingest() == "2 documents, all there"
    (folder / "b.md").write_text("other text")
    assert ingest() == "2 documents, 1 of them new"
    gateway.documents.clear()
    assert ingest() == "2 documents, 2 of them new"


def test_failed_sample_job_is_named(tmp_path: Path, folder: Path) -> None:
    gateway = FakeGateway()
    gateway.outcome = "failed"
    with pytest.raises(ApiError, match=r"a\.md: the job failed: torn"):
        ingest_samples(_api(gateway), tmp_path / "samples.json", lambda text: None, folder)


def test_title_is_the_first_heading_or_the_file_name() -> None:
    assert title_of("text\n## Head\n# Other", "x") == "Head"
    assert title_of("text", "x") == "x"
