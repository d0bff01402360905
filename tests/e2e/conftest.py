"""The whole system, started once through the launcher, as a user would start it."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest

from devstack import ports
from devstack.home import read_pairs
from testkit import eventually_sync

ROOT = Path(__file__).resolve().parents[2]
CLI = str(ROOT / "pressroom")
CHAT, ENCODER, RAG = "smollm2-135m-instruct", "all-minilm-l6-v2", "rag"
_E2E_TIMEOUT_S = 420  # the first test waits for the start of everything


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.e2e)
            if item.get_closest_marker("timeout") is None:
                item.add_marker(pytest.mark.timeout(_E2E_TIMEOUT_S))


@dataclass
class System:
    """The running system and what tests do with it."""

    home: Path
    environ: dict[str, str] = field(repr=False)
    env: dict[str, str] = field(default_factory=dict, repr=False)

    def cli(self, *arguments: str, is_ok: bool = True, timeout_s: float = 300) -> subprocess.CompletedProcess[str]:
        """Runs the command line; checks that it ends as expected, and never with a traceback."""
        done = subprocess.run(
            [CLI, *arguments], env=self.environ, capture_output=True, text=True, timeout=timeout_s, cwd="/"
        )
        assert "Traceback" not in done.stderr, done.stderr
        assert (done.returncode == 0) == is_ok, f"{arguments}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    def services(self) -> dict[str, dict[str, Any]]:
        status = json.loads(self.cli("status", "--json").stdout)
        return {row["name"]: row for row in status["services"]}

    def pid(self, name: str) -> int:
        pid = self.services()[name]["pid"]
        assert isinstance(pid, int), f"{name} does not run"
        return pid

    def kill9(self, name: str) -> int:
        """Kills a service; returns the process id that it had."""
        pid = self.pid(name)
        os.kill(pid, signal.SIGKILL)
        return pid

    def wait_ready(self, name: str, other_than: int | None = None, timeout_s: float = 90) -> None:
        def is_back() -> bool:
            row = self.services()[name]
            return row["state"] == "ready" and row["pid"] != other_than

        eventually_sync(is_back, timeout_s, interval_s=0.5)

    def wait_all_ready(self, timeout_s: float = 120) -> None:
        eventually_sync(
            lambda: all(row["state"] == "ready" for row in self.services().values()), timeout_s, interval_s=0.5
        )

    def client(self, key: str | None = None) -> openai.OpenAI:
        """The official client, without its own retries."""
        return openai.OpenAI(
            base_url=self.env["PRESSROOM_BASE_URL"],
            api_key=key or self.env["PRESSROOM_API_KEY"],
            max_retries=0,
            timeout=120,
            http_client=httpx.Client(trust_env=False, timeout=120),
        )

    def http(self, key: str | None = None) -> httpx.Client:
        """A plain client below the base URL."""
        key = key or self.env["PRESSROOM_API_KEY"]
        headers = {"authorization": f"Bearer {key}"} if key != "none" else {}
        return httpx.Client(base_url=self.env["PRESSROOM_BASE_URL"], headers=headers, trust_env=False, timeout=60)

    def metrics(self, name: str) -> str:
        return httpx.get(f"http://127.0.0.1:{self.services()[name]['http_port']}/metrics", trust_env=False).text

    def finish_job(self, job_id: str, timeout_s: float = 120, status: str = "succeeded") -> dict[str, Any]:
        """Waits for the end of a job."""

        def ended() -> dict[str, Any] | None:
            try:
                job: dict[str, Any] = self.http().get(f"/jobs/{job_id}").json()
            except httpx.HTTPError:  # the gateway is on its way back
                return None
            return job if job.get("status") in ("succeeded", "failed", "cancelled") else None

        job = eventually_sync(ended, timeout_s, interval_s=0.2)
        assert job["status"] == status, job
        return job

    def add_text(self, text: str, **fields: object) -> dict[str, str]:
        """Hands in a text; tries again while the gateway is on its way back."""

        def accepted() -> dict[str, str] | None:
            try:
                answer = self.http().post("/documents", json={"text": text} | fields)
            except httpx.HTTPError:
                return None
            assert answer.status_code in (202, 503), answer.text
            return answer.json() if answer.status_code == 202 else None

        return eventually_sync(accepted, 60, interval_s=0.3)

    def search(self, query: str, **fields: object) -> list[dict[str, Any]]:
        answer = self.http().post("/search", json={"query": query} | fields)
        assert answer.status_code == 200, answer.text
        hits: list[dict[str, Any]] = answer.json()["hits"]
        return hits

    def say(self, content: str, model: str = CHAT, max_tokens: int = 4, **others: Any) -> Any:
        """One short chat completion. others: further parameters of the client."""
        message: Any = {"role": "user", "content": content}
        return self.client().chat.completions.create(
            model=model, messages=[message], max_tokens=max_tokens, temperature=0, **others
        )


@pytest.fixture(scope="session")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    home = tmp_path_factory.mktemp("system") / "home"
    home.mkdir()
    (home / "models").mkdir()  # of its own: finetuned adapters are published into it
    for model in _prepared_models().iterdir():
        if model.name != "adapters":
            (home / "models" / model.name).symlink_to(model)
    environ = os.environ | {"PRESSROOM_HOME": str(home), "PRESSROOM_PORT": "0"}
    running = System(home, environ)
    pids: list[int] = []
    try:
        running.cli("up", timeout_s=_E2E_TIMEOUT_S)
        running.env = read_pairs(home / "env")
        gateway = running.services()["gateway"]
        # Nothing else may answer in its place: the port belongs to the process that our supervisor started.
        assert ports.holder(gateway["http_port"]).pid == gateway["pid"]
        yield running
        pids = [row["pid"] for row in running.services().values() if row["pid"]]
    finally:
        running.cli("down")
    assert not [pid for pid in pids if psutil.pid_exists(pid)], "make down left processes running"


def _prepared_models() -> Path:
    store = ROOT / ".pressroom" / "models"
    store.mkdir(parents=True, exist_ok=True)
    subprocess.run([sys.executable, "-m", "modelstore.prepare", "--store", str(store)], check=True, timeout=300)
    return store


@pytest.fixture
def patiently() -> Callable[..., Any]:
    """Runs a call until it succeeds: what a client with retries sees while a part is on its way back."""

    def call(fn: Callable[[], Any], timeout_s: float = 60) -> Any:
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                return fn()
            except (openai.APIError, httpx.HTTPError, AssertionError):
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.3)

    return call
