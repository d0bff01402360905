"""What the launcher promises: one system, its status, its closing words, its help, and no harm to others."""

import json
import os
import stat
import subprocess
from pathlib import Path

import psutil
import pytest

NAMES = {
    "nats", "valkey", "milvus", "gateway", "embedder", "retriever", "generator", "evaluator", "trainer", "monitor",
}  # fmt: skip


def test_status_has_the_fixed_shape(system):
    status = json.loads(system.cli("status", "--json").stdout)
    assert status["ready"] is True
    assert {row["name"] for row in status["services"]} == NAMES
    for row in status["services"]:
        assert {"name", "state", "pid", "port", "http_port", "rss_bytes", "queue_depth"} <= row.keys()
        assert row["state"] == "ready" and row["rss_bytes"] > 0 and row["port"]


def test_idle_system_stays_under_five_gigabytes(system):
    assert 0 < json.loads(system.cli("status", "--json").stdout)["total_pss_bytes"] < 5e9


def test_everything_listens_on_loopback_alone(system):
    for row in system.services().values():
        listening = [c.laddr.ip for c in psutil.Process(row["pid"]).net_connections("inet") if c.status == "LISTEN"]
        assert listening and set(listening) <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}, row["name"]


def test_up_again_is_harmless_and_its_curl_works_when_pasted(system):
    before = {name: row["pid"] for name, row in system.services().items()}
    said = system.cli("up").stdout
    assert "running already" in said
    assert {name: row["pid"] for name, row in system.services().items()} == before
    [curl] = [line for line in said.splitlines() if line.startswith("curl")]
    pasted = subprocess.run(["bash", "-c", curl], capture_output=True, text=True, timeout=120)
    assert json.loads(pasted.stdout)["choices"][0]["message"]["content"]
    assert system.env["PRESSROOM_BASE_URL"] in said and system.env["PRESSROOM_BASE_URL"].endswith("/v1")


def test_env_file_is_private(system):
    assert stat.S_IMODE((system.home / "env").stat().st_mode) == 0o600


def test_secrets_are_not_in_logs(system):
    secrets = [*system.env.values(), *(line.split("=")[1] for line in (system.home / "secrets").read_text().split())]
    hidden = [value for value in secrets if not value.startswith("http")]
    for log in (system.home / "logs").iterdir():
        text = log.read_text(errors="replace")
        assert not any(secret in text for secret in hidden), log.name


@pytest.mark.parametrize(
    "command",
    (
        *("up", "down", "status", "top", "logs", "trace", "doctor", "ask", "ingest", "jobs", "models"),
        *("keys", "tenants", "audit"),
    ),
)
def test_help_shows_examples(system, command):
    assert "Examples:" in system.cli(command, "--help").stdout


def test_ask_streams_an_answer_with_its_sources(system):
    said = system.cli("ask", "What is an outbox?", "--max-tokens", "12").stdout
    assert "samples/" in said
    data = json.loads(system.cli("ask", "What is an outbox?", "--max-tokens", "12", "--json").stdout)
    assert data["grounded"] is True and data["text"]


def test_ingest_and_jobs(system, tmp_path):
    (tmp_path / "note.md").write_text("# Note\n\nThe ferry to Hven leaves at noon.\n")
    [done] = json.loads(system.cli("ingest", str(tmp_path / "note.md"), "--json").stdout)
    assert done["status"] == "succeeded"
    job = json.loads(system.cli("jobs", "show", done["job_id"], "--json").stdout)
    assert job["status"] == "succeeded"
    assert done["job_id"] in system.cli("jobs", "list").stdout


def test_doctor_is_content(system):
    assert "BAD" not in system.cli("doctor").stdout


def test_failures_are_one_line(system):
    done = system.cli("jobs", "show", "nope", is_ok=False)
    assert done.stderr.strip().count("\n") == 0 and "no such job" in done.stderr


def test_busy_port_names_its_holder_and_nothing_starts(system, tmp_path):
    gateway = system.services()["gateway"]
    environ = system.environ | {"PRESSROOM_HOME": str(tmp_path / "other"), "PRESSROOM_PORT": str(gateway["http_port"])}
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([root / "pressroom", "up"], env=environ, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert str(gateway["http_port"]) in done.stderr and f"pid {gateway['pid']}" in done.stderr
    assert "next:" in done.stderr
    assert not (tmp_path / "other" / "run" / "state.json").exists()


def test_stopped_service_stays_down(system):
    system.cli("down", "evaluator")
    try:
        row = system.services()["evaluator"]
        assert row["state"] == "stopped" and row["pid"] is None
        assert system.say("Say hello.").choices
        assert json.loads(system.cli("status", "--json").stdout)["ready"] is False
        assert "evaluator was stopped" in system.cli("doctor", is_ok=False).stdout
    finally:
        system.cli("up", "evaluator")
    assert os.path.exists(f"/proc/{system.pid('evaluator')}")
