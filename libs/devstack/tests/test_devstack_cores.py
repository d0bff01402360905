"""What takes the cores is told by process group, and what runs in the background is told apart."""

import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest

from devstack.cores import CoreUse, measure
from devstack.status import render
from testkit import eventually_sync

Spin = Callable[[str], int]


@pytest.fixture
def spin() -> Iterator[Spin]:
    """Starts a process that keeps a core busy; returns its group."""
    started: list[subprocess.Popen[bytes]] = []

    def start(first: str) -> int:
        started.append(subprocess.Popen([sys.executable, "-c", f"{first}\nwhile True: pass"], process_group=0))
        return started[-1].pid

    yield start
    for process in started:
        process.kill()
        process.wait()


def test_a_busy_group_is_seen_and_an_idle_one_is_not(spin: Spin) -> None:
    busy, idle = spin(""), spin("import time; time.sleep(3600)")

    def used() -> CoreUse | None:
        cores = measure({busy, idle}, 0.3)
        assert cores.busy > 0 and cores.num >= 1
        assert cores.by_group[busy].background == 0
        found = cores.by_group[busy]
        return found if found.total > 0.1 and cores.by_group[idle].total < found.total else None

    eventually_sync(used, 30)


def test_what_runs_at_low_priority_counts_as_background(spin: Spin) -> None:
    group = spin("from chassis import priority; priority.lower()")

    def is_told() -> bool:
        found = measure({group}, 0.3).by_group[group]
        return 0 < found.background == found.total

    eventually_sync(is_told, 60)


def test_a_group_that_is_gone_uses_nothing() -> None:
    assert measure({2**22 + 1}, 0.01).by_group == {2**22 + 1: CoreUse()}


def test_the_status_names_who_takes_the_cores_most_first() -> None:
    row = {"state": "ready", "pid": 1, "port": 1, "http_port": 2, "pss_bytes": 10**6, "queue_depth": 0, "restarts": 0}
    services = [
        row | {"name": "generator", "detail": "", "cpu_cores": 0.5, "cpu_background_cores": 0.0},
        row | {"name": "trainer", "detail": "", "cpu_cores": 1.2, "cpu_background_cores": 1.19},
        row | {"name": "monitor", "detail": "", "cpu_cores": 0.01, "cpu_background_cores": 0.0},
    ]
    cores = {"num": 2, "busy": 1.9, "others": 0.19}
    status = {"ready": True, "services": services, "total_pss_bytes": 3 * 10**6, "cores": cores}
    assert render(status)[-1] == (
        "cores: 1.90 of 2 busy: trainer 1.20 (1.19 in the background), generator 0.50, other processes 0.19"
    )
