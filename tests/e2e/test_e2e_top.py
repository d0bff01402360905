"""`pressroom top` on the running system: figures while a stream runs, a service that is away, and a clean Ctrl-C."""

import contextlib
import json
import os
import pty
import signal
import subprocess
import threading

import pytest

from devstack import topology
from testkit.sources import ROOT

CHAT = "smollm2-135m-instruct"


def _top(system, *arguments):
    return json.loads(system.cli("top", "--once", "--json", *arguments).stdout)


def test_an_interval_under_load_has_all_figures(system):
    body = {"model": CHAT, "messages": [{"role": "user", "content": "Count."}], "max_tokens": 60, "temperature": 0}
    stop = threading.Event()

    def ask_on() -> None:
        with system.http() as client:
            while not stop.is_set():
                client.post("/chat/completions", json=body)

    asking = [threading.Thread(target=ask_on) for _ in range(3)]
    for thread in asking:
        thread.start()
    try:
        view = _top(system, "--interval", "6")
    finally:
        stop.set()
        for thread in asking:
            thread.join()
    assert {row["name"] for row in view["services"]} == set(topology.NAMES)
    engine = view["engine"]
    assert engine["completion_tokens_per_s"] > 1 and engine["steps_per_s"] > 0.5
    assert 0 < engine["batch_mean"] <= 8 and 0 <= engine["blocks_used"] <= engine["blocks_total"]
    assert engine["step_s"]["forward"] > engine["step_s"]["schedule"] > 0
    assert engine["adapters_loaded"] is not None and engine["preemptions"] is not None
    models = {(row["service"], row["model"]): row for row in view["models"]}
    for service in ("gateway", "generator"):
        model = models[service, CHAT]
        assert model["answers"] > 0 and model["completion_tokens_per_s"] > 0
        assert 0 < model["ttft_p50_s"] <= model["ttft_p95_s"] and model["tpot_p50_s"] > 0
    gateway = next(row for row in view["services"] if row["name"] == "gateway")
    assert gateway["requests_per_s"] > 0 and gateway["rss_bytes"] > 1e7


def test_a_service_that_is_away_is_said_to_be(system):
    system.cli("down", "generator")
    try:
        view = _top(system, "--interval", "0.2")
        assert view["engine"] is None and view["engine_detail"] == "generator: stopped" and not view["ready"]
        assert "generator: stopped" in system.cli("top", "--once", "--interval", "0.2").stdout
    finally:
        system.cli("up", "generator")
        system.wait_all_ready()


@pytest.mark.parametrize("arguments", [["--interval", "0.3"], ["--interval", "0.3", "--json"]], ids=["live", "lines"])
def test_ctrl_c_ends_it_cleanly(system, arguments):
    """On a terminal of its own, as a person has it."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [str(ROOT / "pressroom"), "top", *arguments],
        env=system.environ | {"TERM": "xterm"},
        stdout=theirs,
        stderr=theirs,
        cwd="/",
    )
    os.close(theirs)
    said = b""
    try:
        while b"generator" not in said:
            said += os.read(ours, 65536)
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(OSError):  # the other end was closed
            while more := os.read(ours, 65536):
                said += more
        assert process.wait(timeout=30) == 0
    finally:
        process.kill()
        os.close(ours)
    assert b"Traceback" not in said and b"Aborted" not in said
