import asyncio
import os
import signal
import sys

import pytest

from devstack.backoff import Backoff
from devstack.processes import is_alive, start_ticks
from devstack.specs import Tier
from devstack.supervisor import StartFailed, State, Supervisor, describe_exit


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_backoff_doubles_to_its_bound_and_starts_over_after_a_settled_life() -> None:
    clock = Clock()
    backoff = Backoff(first_s=1, longest_s=4, settled_s=30, clock=clock)
    waits = []
    for _ in range(4):
        backoff.started()
        clock.now += 29
        waits.append(backoff.after_death())
    assert waits == [1, 2, 4, 4]
    backoff.started()
    clock.now += 30
    assert backoff.after_death() == 1


def test_the_first_restart_comes_within_three_seconds() -> None:
    assert Backoff().after_death() <= 1.0


async def test_dead_service_is_restarted_with_a_growing_wait(toy, until) -> None:
    waits: list[float] = []

    class Counting(Backoff):
        def after_death(self) -> float:
            waits.append(super().after_death())
            return 0.01

    supervisor = Supervisor([toy(code="raise SystemExit(3)")], os.environ, make_backoff=Counting)
    service = supervisor.services["toy"]
    service.start()
    try:
        await until(lambda: len(waits) >= 3)
        assert waits[:3] == [0.5, 1.0, 2.0]
        assert service.last_exit == 3
        assert '"message": "process ended"' in service.spec.log_path.read_text()
    finally:
        await supervisor.stop_all()


async def test_killed_service_comes_back_as_another_process(toy, until, quick_backoff) -> None:
    supervisor = Supervisor([toy()], os.environ, make_backoff=quick_backoff)
    await supervisor.start_all()
    service = supervisor.services["toy"]
    try:
        assert service.process is not None
        first = service.process.pid
        os.kill(first, signal.SIGKILL)
        await until(lambda: service.process is not None and service.process.pid != first)
        await until(lambda: service.state is State.READY)
        assert service.num_restarts == 1
        assert service.last_exit == -signal.SIGKILL
    finally:
        await supervisor.stop_all()


async def test_stopped_service_stays_down_until_it_is_started(toy, quick_backoff) -> None:
    supervisor = Supervisor([toy("a"), toy("b")], os.environ, make_backoff=quick_backoff)
    await supervisor.start_all()
    service = supervisor.services["a"]
    assert service.process is not None
    pid, ticks = service.process.pid, service.process.start_ticks
    await supervisor.stop("a")
    assert not is_alive(pid, ticks)
    for _ in range(20):  # several times the longest back-off
        await asyncio.sleep(0.01)
        assert service.state is State.STOPPED
    assert supervisor.services["b"].state is State.READY
    await supervisor.start("a")
    assert service.state is State.READY
    await supervisor.stop_all()


async def test_stop_all_leaves_no_process_not_even_a_deaf_one_or_a_grandchild(toy, until, home, quick_backoff) -> None:
    deaf = (
        "import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nprint('deaf', flush=True)\ntime.sleep(60)"
    )
    parent = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-S', '-c', 'import time; time.sleep(60)'])\n"
        f"open({str(home.run / 'grandchild')!r}, 'w').write(str(child.pid))\n"
        "time.sleep(60)"
    )
    supervisor = Supervisor(
        [toy("deaf", deaf, stop_grace_s=0.2), toy("parent", parent)], os.environ, make_backoff=quick_backoff
    )
    await supervisor.start_all()
    services = supervisor.services
    await until(lambda: (home.run / "grandchild").exists() and (home.run / "grandchild").read_text() != "")
    log_path = services["deaf"].spec.log_path
    await until(lambda: log_path.exists() and "deaf" in log_path.read_text())
    grandchild = int((home.run / "grandchild").read_text())
    processes = [(s.process.pid, s.process.start_ticks) for s in services.values() if s.process]
    processes.append((grandchild, start_ticks(grandchild) or 0))
    assert len(processes) == 3 and all(is_alive(*p) for p in processes)
    await supervisor.stop_all()
    await until(lambda: not any(is_alive(*p) for p in processes))


async def test_failed_start_names_service_exit_code_and_last_lines(toy, quick_backoff) -> None:
    broken = toy("broken", "print('no model here', flush=True)\nraise SystemExit(78)", probe=_Never())
    supervisor = Supervisor([toy("fine"), broken], os.environ, make_backoff=quick_backoff)
    with pytest.raises(StartFailed) as failure:
        await supervisor.start_all()
    assert failure.value.name == "broken"
    assert failure.value.cause == "it ended with exit code 78 (bad configuration)"
    assert "no model here" in failure.value.last_lines
    await supervisor.stop_all()


async def test_service_that_never_gets_ready_fails_with_what_it_waits_for(toy, file_probe, home) -> None:
    supervisor = Supervisor([toy("slow", probe=file_probe(home.run / "never"), start_timeout_s=0.5)], os.environ)
    with pytest.raises(StartFailed, match=r"not ready after 0 s \(no file yet\)|not ready after 1 s \(no file yet\)"):
        await supervisor.start_all()
    await supervisor.stop_all()


async def test_service_starts_only_when_its_dependencies_are_ready(toy, file_probe, home, until) -> None:
    gate = home.run / "gate"
    specs = [toy("first", probe=file_probe(gate)), toy("second", depends_on=("first",))]
    supervisor = Supervisor(specs, os.environ)
    starting = asyncio.create_task(supervisor.start_all())
    await until(lambda: "hello" in _log(supervisor, "first"))
    assert supervisor.services["second"].state is State.STOPPED
    gate.touch()
    await starting
    assert supervisor.services["second"].state is State.READY
    await supervisor.stop_all()


async def test_edge_stops_before_what_it_calls(toy, home) -> None:
    order = home.run / "order"

    def ends(name: str) -> str:
        return (
            "import signal, sys, time\n"
            f"def end(*_): open({str(order)!r}, 'a').write({name!r} + ' '); sys.exit()\n"
            "signal.signal(signal.SIGTERM, end)\n"
            f"open({str(home.run / name)!r}, 'w')\n"
            "time.sleep(60)"
        )

    from devstack.probes import Reading

    class Exists:
        def __init__(self, name: str) -> None:
            self.path = home.run / name

        async def check(self) -> Reading:
            return Reading(self.path.exists())

    tiers = {"bus": Tier.INFRASTRUCTURE, "worker": Tier.INNER, "gate": Tier.EDGE}
    specs = [toy(name, ends(name), tier=tier, probe=Exists(name)) for name, tier in tiers.items()]
    supervisor = Supervisor(specs, os.environ)
    await supervisor.start_all()
    await supervisor.stop_all()
    assert order.read_text().split() == ["gate", "worker", "bus"]


async def test_ready_service_that_stops_answering_is_unready_and_not_restarted(toy, file_probe, home, until) -> None:
    gate = home.run / "gate"
    gate.touch()
    supervisor = Supervisor([toy(probe=file_probe(gate))], os.environ)
    await supervisor.start_all()
    service = supervisor.services["toy"]
    gate.unlink()
    await until(lambda: service.state is State.UNREADY)
    assert service.num_restarts == 0
    await supervisor.stop_all()


async def test_children_die_with_a_killed_supervisor(toy, home, until) -> None:
    spec = toy()
    program = f"""
import asyncio, os, sys
from pathlib import Path
from devstack.logfiles import LogFile
from devstack.processes import Process
async def main():
    process = await Process.start({spec.argv!r}, os.environ, LogFile(Path({str(spec.log_path)!r})))
    print(process.pid, process.start_ticks, flush=True)
    await asyncio.sleep(60)
asyncio.run(main())
"""
    supervisor = await asyncio.create_subprocess_exec(sys.executable, "-c", program, stdout=asyncio.subprocess.PIPE)
    assert supervisor.stdout is not None
    pid, ticks = map(int, (await supervisor.stdout.readline()).split())
    await until(lambda: "hello" in (spec.log_path.read_text() if spec.log_path.exists() else ""))
    assert is_alive(pid, ticks)
    supervisor.kill()
    await supervisor.wait()
    await until(lambda: not is_alive(pid, ticks))


def test_exit_codes_are_put_into_words() -> None:
    assert describe_exit(-9) == "signal SIGKILL"
    assert describe_exit(1) == "exit code 1"
    assert "bad configuration" in describe_exit(78)


class _Never:
    async def check(self) -> object:
        from devstack.probes import Reading

        return Reading(False)


def _log(supervisor: Supervisor, name: str) -> str:
    path = supervisor.services[name].spec.log_path
    return path.read_text() if path.exists() else ""
