"""Models from a hub, against a server that speaks its two routes and can be told to misbehave."""

import hashlib
import json
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import modelstore_tiny as tiny
import pytest

from chassis.errors import Code, PlatformError
from modelstore import Manifest
from modelstore.adding import Added, Order, add
from modelstore.catalogue import entries
from modelstore.manifest import sha256_of
from testkit import free_port


class Hub(ThreadingHTTPServer):
    """`cut_after` bytes of a large file the connection breaks, that many `cuts` times; `lies` replace contents."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = {path.name: path.read_bytes() for path in folder.iterdir()}
        self.commit = "a" * 40
        self.cut_after, self.cuts = 0, 0
        self.lies: dict[str, bytes] = {}
        self.token = ""
        self.asked: Counter[str] = Counter()
        self.ranges: list[str] = []
        self.url = f"http://127.0.0.1:{self.server_port}"

    def listing(self) -> dict[str, Any]:
        siblings: list[dict[str, Any]] = [{"rfilename": "onnx/model.bin", "size": 3, "blobId": "0" * 40}]
        for name, content in self.files.items():
            one: dict[str, Any] = {"rfilename": name, "size": len(content)}
            if name.endswith(".safetensors"):
                one["lfs"] = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 1}
            else:
                one["blobId"] = hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()
            siblings.append(one)
        return {"id": "org/tiny", "sha": self.commit, "siblings": siblings}


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        hub, path = self.server, self.path.partition("?")[0]
        hub.asked[path.rpartition("/")[2]] += 1
        if hub.token and self.headers.get("authorization") != f"Bearer {hub.token}":
            return self._send(401, b"")
        if path.startswith("/api/models/org/tiny/revision/"):
            return self._send(200, json.dumps(hub.listing()).encode())
        name = path.removeprefix(f"/org/tiny/resolve/{hub.commit}/")
        if name not in hub.files:
            return self._send(404, b"")
        content, start = hub.lies.get(name, hub.files[name]), 0
        if given := self.headers.get("range"):
            hub.ranges.append(given)
            start = int(given.removeprefix("bytes=").removesuffix("-"))
        self._send(206 if start else 200, content, start, cuts=name.endswith(".safetensors"))

    def _send(self, status: int, content: bytes, start: int = 0, cuts: bool = False) -> None:
        body = content[start:]
        self.send_response(status)
        self.send_header("content-length", str(len(body)))
        if status == 206:
            self.send_header("content-range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        if cuts and self.server.cuts:
            self.server.cuts -= 1
            body = body[: self.server.cut_after]
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    folder = tiny.write(tmp_path / "tiny")
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    (folder / "README.md").write_bytes(b"hello")
    with Hub(folder) as hub:
        thread = threading.Thread(target=hub.serve_forever, args=(0.05,))
        thread.start()
        yield hub
        hub.shutdown()
        thread.join()


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "store"


def _add(store: Path, hub: Hub, source: str = "org/tiny", **fields: Any) -> Added:
    return add(store, Order(source, endpoint=hub.url, **fields), lambda step, done, total: None)


def _refused(store: Path, hub: Hub, source: str = "org/tiny", **fields: Any) -> PlatformError:
    with pytest.raises(PlatformError) as caught:
        _add(store, hub, source, **fields)
    return caught.value


def test_a_repository_becomes_a_model_and_its_commit_is_recorded(store: Path, hub: Hub) -> None:
    added = _add(store, hub, "org/tiny@v1")
    manifest = Manifest.load(store / "tiny")
    manifest.verify()
    named = {key: manifest.source[key] for key in ("type", "name", "revision", "commit")}
    assert named == {"type": "hub", "name": "org/tiny", "revision": "v1", "commit": hub.commit}
    assert hub.asked["v1"] == 1
    assert hub.asked["pytorch_model.bin"] == hub.asked["README.md"] == hub.asked["model.bin"] == 0
    assert added.notes[0] == "never opened: pytorch_model.bin" and "hub announced" in added.notes[1]
    assert not [path for path in store.iterdir() if path.name.startswith(".") and path.is_dir()]
    again = _add(store, hub, "org/tiny@v1")
    assert not again.is_new and hub.asked["model.safetensors"] == 1


def test_a_broken_connection_is_taken_up_where_it_broke(store: Path, hub: Hub) -> None:
    hub.cut_after, hub.cuts = 100_000, 2
    _add(store, hub).manifest.verify()
    assert hub.ranges == ["bytes=100000-", "bytes=200000-"]


def test_what_was_fetched_before_a_failure_is_not_fetched_again(store: Path, hub: Hub) -> None:
    hub.cut_after, hub.cuts = 0, 99
    error = _refused(store, hub)
    assert error.code is Code.UNAVAILABLE and "run it again" in error.message
    assert hub.asked["tokenizer.json"] == 1 and entries(store) == []
    (part,) = store.glob(".add-tiny/fetch-*/model.safetensors.part")
    part.write_bytes(hub.files["model.safetensors"][:1000])
    hub.cuts, hub.ranges = 0, []
    _add(store, hub).manifest.verify()
    assert hub.ranges == ["bytes=1000-"] and hub.asked["tokenizer.json"] == 1


KILLED = """
import sys, time
from pathlib import Path
from modelstore.adding import Order, add
def step(name, done, total):
    if name == "fetch" and done > 100_000:
        print("far enough", flush=True)
        time.sleep(60)
add(Path(sys.argv[1]), Order("org/tiny", endpoint=sys.argv[2]), step)
"""


def test_a_fetch_that_is_killed_goes_on_where_it_was(store: Path, hub: Hub) -> None:
    with subprocess.Popen([sys.executable, "-c", KILLED, str(store), hub.url], stdout=subprocess.PIPE) as run:
        assert run.stdout is not None
        assert run.stdout.readline() == b"far enough\n"
        run.kill()
    assert entries(store) == []
    _add(store, hub).manifest.verify()
    assert len(hub.ranges) == 1 and hub.asked["tokenizer.json"] == 1


def test_files_of_another_commit_are_not_mixed_in(store: Path, hub: Hub) -> None:
    hub.cut_after, hub.cuts = 4000, 99
    hub.files["model.safetensors"], whole = hub.files["model.safetensors"][:5000], hub.files["model.safetensors"]
    assert _refused(store, hub).code is Code.DATA_LOSS  # whole as announced, and a lie in its header
    hub.commit, hub.cuts, hub.files["model.safetensors"] = "b" * 40, 0, whole
    manifest = _add(store, hub).manifest
    assert manifest.source["commit"] == "b" * 40 and hub.asked["tokenizer.json"] == 2


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_content_other_than_announced_is_refused_and_fetched_anew(store: Path, hub: Hub, name: str) -> None:
    content = bytearray(hub.files[name])
    content[-2] ^= 1
    hub.lies[name] = bytes(content)
    error = _refused(store, hub)
    assert error.code is Code.DATA_LOSS and name in error.message
    hub.lies[name] = hub.files[name] + b"more"
    assert "longer" in _refused(store, hub).message
    hub.lies.clear()
    _add(store, hub).manifest.verify()


def test_other_weights_under_a_known_id_are_refused_before_they_are_fetched(store: Path, hub: Hub) -> None:
    _add(store, hub)
    other = tiny.write(store.parent / "other", seed=9)
    hub.files["model.safetensors"], hub.commit = (other / "model.safetensors").read_bytes(), "b" * 40
    assert _refused(store, hub).code is Code.CONFLICT
    assert hub.asked["model.safetensors"] == 1


def test_sums_known_beforehand_are_held_against_the_hubs_files(store: Path, hub: Hub) -> None:
    assert _refused(store, hub, pins={"model.safetensors": "0" * 64}).code is Code.DATA_LOSS
    right = hashlib.sha256(hub.files["model.safetensors"]).hexdigest()
    manifest = _add(store, hub, pins={"model.safetensors": right}).manifest
    assert manifest.source["files"]["model.safetensors"] == right
    assert sha256_of(store.parent / "tiny" / "model.safetensors") == right


def test_a_closed_repository_wants_a_token(store: Path, hub: Hub) -> None:
    hub.token = "hf_secret"
    error = _refused(store, hub)
    assert error.code is Code.PERMISSION_DENIED and "HF_TOKEN" in error.message
    _add(store, hub, token="hf_secret").manifest.verify()


def test_a_repository_that_is_not_there_or_holds_pickles_alone_is_refused(store: Path, hub: Hub) -> None:
    assert _refused(store, hub, "org/none").code is Code.NOT_FOUND
    del hub.files["model.safetensors"]
    error = _refused(store, hub)
    assert error.code is Code.INVALID_ARGUMENT and "pytorch_model.bin" in error.message


def test_without_a_network_it_is_said_at_once(store: Path) -> None:
    started_s = time.monotonic()
    with pytest.raises(PlatformError, match="cannot be reached") as caught:
        add(store, Order("org/tiny", endpoint=f"http://127.0.0.1:{free_port()}"), lambda *_: None)
    assert caught.value.code is Code.UNAVAILABLE and time.monotonic() - started_s < 5


@pytest.mark.parametrize("answer", [b"", b"[]", b"{}", b'{"sha": "../..", "siblings": []}', b"[" * 100_000])
def test_an_answer_that_is_none_is_not_believed(
    store: Path, hub: Hub, answer: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json, "dumps", lambda *_, **__: answer.decode())
    assert _refused(store, hub).code is Code.DATA_LOSS
