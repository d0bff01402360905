"""The load test against the running system: its rows agree with what the system itself has counted."""

import csv
import json
import re
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from testkit import eventually_sync
from testkit.ports import free_port

ROOT = Path(__file__).resolve().parents[2]
CHAT, RAG = "smollm2-135m-instruct", "rag"


def _run(system, folder, *arguments, timeout_s=240):
    return subprocess.run(
        [sys.executable, "-m", "loadtest", "--out", str(folder), *arguments],
        env=system.environ,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )


def _rows(folder):
    with (folder / "requests.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def _ledger(system):
    """Requests, prompt and completion tokens of all tenants, by model."""
    url = system.env["PRESSROOM_BASE_URL"].removesuffix("/v1") + "/admin/usage"
    headers = {"authorization": f"Bearer {system.env['PRESSROOM_ADMIN_KEY']}"}
    totals: dict[str, list[int]] = {}
    for row in httpx.get(url, headers=headers, trust_env=False).json()["data"]:
        counted = totals.setdefault(row["model"], [0, 0, 0])
        for n, name in enumerate(("num_requests", "prompt_tokens", "completion_tokens")):
            counted[n] += row[name]
    return totals


def _since(system, before, model):
    return [b - a for a, b in zip(before.get(model, [0, 0, 0]), _ledger(system).get(model, [0, 0, 0]), strict=True)]


def _gateway_tokens(system, kind):
    found = re.findall(rf'^pressroom_tokens_total{{kind="{kind}",.*}} ([\d.e+]+)$', system.metrics("gateway"), re.M)
    return sum(map(float, found))


def _tokens(rows, name):
    return sum(int(row[name]) for row in rows)


def test_users_and_arrivals_are_measured_as_the_ledger_counts_them(system, tmp_path):
    before, metric_before = _ledger(system), _gateway_tokens(system, "completion")
    done = _run(system, tmp_path, "--steps", "1,2", "--step-time", "3", "--traffic", "mixed", "--max-tokens", "8")
    assert done.returncode == 0, done.stderr[-3000:]
    rows = _rows(tmp_path)
    assert {row["model"] for row in rows} == {CHAT, RAG}
    assert {row["offered"] for row in rows} == {"1", "2"}
    for row in rows:
        assert (row["status"], row["error"], row["completion_tokens"]) == ("200", "", "8"), row
        assert float(row["sent_s"]) < float(row["first_token_s"]) <= float(row["last_token_s"]) <= float(row["done_s"])
    for model in (CHAT, RAG):
        sent = [row for row in rows if row["model"] == model]
        expected = [len(sent), _tokens(sent, "prompt_tokens"), _tokens(sent, "completion_tokens")]
        # The ledger is written after the last byte.
        eventually_sync(lambda m=model, e=expected: _since(system, before, m) == e, 15, interval_s=0.2)
    assert _gateway_tokens(system, "completion") - metric_before == _tokens(rows, "completion_tokens")

    report = (tmp_path / "report.html").read_text()
    assert f"{len(rows)} answered" in report
    assert not re.search(r"<script|<link|src=|https?://(?!127\.0\.0\.1)", report)
    assert re.search(r"^TTFT +chat", done.stdout + done.stderr, re.M), "Locust's own table has our figures"


def test_an_open_loop_sends_on_time_and_tells_what_it_could_not_send(system, tmp_path):
    arguments = (
        "--arrivals",
        "poisson",
        "--rate",
        "8",
        "--run-time",
        "3s",
        "--max-tokens",
        "24",
        "--max-in-flight",
        "2",
    )
    done = _run(system, tmp_path, *arguments)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = _rows(tmp_path)
    overflown = [row for row in rows if row["error"] == "overflow"]
    answered = [row for row in rows if row["status"] == "200"]
    assert len(overflown) + len(answered) == len(rows)
    assert overflown, "8 requests a second were answered by two at a time?"
    assert all(row["sent_s"] == "" for row in overflown)
    late_s = sorted(float(row["sent_s"]) - float(row["scheduled_s"]) for row in answered)
    assert late_s[len(late_s) // 2] < 0.25, "arrivals wait for one another"
    assert "overflow" in (tmp_path / "report.html").read_text()


def test_a_trace_is_played_from_locusts_page_with_its_own_lengths(system, tmp_path):
    trace, folder = tmp_path / "trace.jsonl", tmp_path / "out"
    wanted = [(0, 50, 3), (400, 80, 9), (1500, 5000, 5)]
    lines = [{"timestamp": at_ms, "input_length": i, "output_length": o} for at_ms, i, o in wanted]
    trace.write_text("\n".join(map(json.dumps, lines)))
    page = f"http://127.0.0.1:{free_port()}"
    command = [sys.executable, "-m", "loadtest", "--page", "--web-port", page.rpartition(":")[2], "--out", str(folder)]
    options = ["--arrivals", "trace", "--trace", str(trace), "--max-prompt", "120"]
    with (tmp_path / "log").open("w") as log, httpx.Client(base_url=page, trust_env=False) as client:
        process = subprocess.Popen([*command, *options], env=system.environ, cwd=ROOT, stdout=log, stderr=log)
        try:
            eventually_sync(lambda: _status(client, "/") == 200, 60, interval_s=0.2)
            assert _status(client, "/report") == 404, "there is none before a test has ended"
            assert client.post("/swarm", data={"user_count": 1, "spawn_rate": 1}).json()["success"]
            eventually_sync(lambda: _status(client, "/report") == 200, 60, interval_s=0.2)
            assert "3 answered" in client.get("/report").text
        finally:
            process.terminate()
            process.wait(60)
    rows = _rows(folder)
    assert [(row["prompt_tokens"], row["completion_tokens"]) for row in rows] == [
        ("50", "3"),
        ("80", "9"),
        ("120", "5"),
    ]
    due_s = [float(row["scheduled_s"]) for row in rows]
    assert [round(at_s - due_s[0], 2) for at_s in due_s] == [0, 0.4, 1.5]


def _status(client, path):
    try:
        return client.get(path).status_code
    except httpx.TransportError:  # it is not listening yet
        return 0


@pytest.mark.parametrize("arguments", [["--steps", "2,1"], ["--arrivals", "trace", "--trace", "no-such-file"]])
def test_what_cannot_be_run_is_said_before_anything_is_sent(system, tmp_path, arguments):
    done = _run(system, tmp_path / "out", *arguments)
    assert done.returncode == 2
    assert "loadtest: " in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_refusals_are_counted_by_their_code_and_the_run_fails_when_nothing_was_answered(system, tmp_path):
    wrong = system.environ | {"PRESSROOM_API_KEY": "sk-none-none"}
    done = subprocess.run(
        [sys.executable, "-m", "loadtest", "--out", str(tmp_path), "-u", "1", "-t", "2s"],
        env=wrong,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1
    rows = _rows(tmp_path)
    assert {(row["status"], row["error"]) for row in rows} == {("401", "invalid_api_key")}
    assert len(rows) <= 3, "a user who is refused does not ask again at once"
    assert "401 invalid_api_key" in (tmp_path / "report.html").read_text()
