import asyncio
import json
import os
import socket
import stat
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from devstack import control, environment, lifecycle, status, topology
from devstack.daemon import Daemon, hold_lock
from devstack.home import Home
from devstack.processes import is_alive, start_ticks
from devstack.specs import Spec
from devstack.up import UpFailed, down
from testkit import eventually


@asynccontextmanager
async def running(home: Home, specs: list[Spec]) -> AsyncIterator["asyncio.Task[None]"]:
    lock = hold_lock(home.run / "supervisor.lock")
    assert lock is not None
    daemon = Daemon(home, specs, os.environ, {"toy": 1})

    async def serve() -> None:
        with lock:
            await daemon.serve()

    task = asyncio.create_task(serve())
    await eventually((home.run / control.SOCKET_NAME).exists)
    try:
        yield task
    finally:
        daemon._over.set()
        await task


def bring_up(home: Home, and_then: Callable[[control.Control], Any]) -> list[dict[str, Any]]:
    with control.Control(home.run) as connection:
        connection.send("start")
        messages = list(connection.messages(20))
        and_then(connection)
        return messages


def settle(connection: control.Control) -> None:
    connection.send("settle")
    assert connection.receive(5)["ok"]


async def test_settled_system_outlives_its_caller_and_status_has_the_fixed_shape(home, toy) -> None:
    async with running(home, [toy()]):
        messages = await asyncio.to_thread(bring_up, home, settle)
        assert [m.get("state") for m in messages] == ["starting", "ready", None]
        found = await asyncio.to_thread(status.read, home)
        assert found["ready"] is True
        [row] = found["services"]
        fixed = {"name", "state", "pid", "port", "http_port", "rss_bytes", "queue_depth"}
        assert fixed <= row.keys()
        assert row["name"] == "toy" and row["state"] == "ready" and row["queue_depth"] == 3
        assert row["rss_bytes"] > 1_000_000
        assert found["total_pss_bytes"] >= row["pss_bytes"] > 0
        assert json.loads(json.dumps(found)) == found
        assert "toy" in "\n".join(status.render(found))


async def test_start_that_is_not_settled_is_taken_down_when_its_caller_goes(home, toy) -> None:
    async with running(home, [toy()]) as task:
        pids: list[int] = []

        def look_and_leave(connection: control.Control) -> None:
            state = json.loads(home.state_file.read_text())["services"]["toy"]
            pids.append(state["pid"])
            assert is_alive(state["pid"], state["start_ticks"])

        await asyncio.to_thread(bring_up, home, look_and_leave)
        await asyncio.wait_for(task, 10)
        assert start_ticks(pids[0]) is None
        assert not home.state_file.exists()
        assert not (home.run / control.SOCKET_NAME).exists()


async def test_caller_that_goes_in_the_middle_of_a_start_takes_it_down(home, toy, file_probe) -> None:
    async with running(home, [toy(probe=file_probe(home.run / "never"), start_timeout_s=60.0)]) as task:

        def leave_early() -> None:
            with control.Control(home.run) as connection:
                connection.send("start")
                assert connection.receive(5)["state"] == "starting"

        await asyncio.to_thread(leave_early)
        await asyncio.wait_for(task, 10)


async def test_failed_start_tells_why_and_leaves_nothing(home, toy, file_probe) -> None:
    broken = toy("broken", "print('because', flush=True)\nraise SystemExit(4)", probe=file_probe(home.run / "never"))
    async with running(home, [toy(), broken]) as task:
        messages = await asyncio.to_thread(bring_up, home, lambda connection: None)
        assert messages[-1]["ok"] is False
        assert messages[-1]["service"] == "broken"
        assert messages[-1]["cause"] == "it ended with exit code 4"
        assert "because" in messages[-1]["lines"]
        await asyncio.wait_for(task, 10)


async def test_down_of_one_service_keeps_it_down_and_up_brings_it_back(home, toy) -> None:
    async with running(home, [toy("a"), toy("b")]):
        await asyncio.to_thread(bring_up, home, settle)
        said = await asyncio.to_thread(down, home, "a")
        assert "stays so until" in said[0]
        found = {row["name"]: row for row in (await asyncio.to_thread(status.read, home))["services"]}
        assert found["a"]["state"] == "stopped" and found["a"]["pid"] is None
        assert found["b"]["state"] == "ready"
        assert (await asyncio.to_thread(control.ask, home.run, "start", service="a"))["ok"]
        with pytest.raises(UpFailed, match="no service"):
            await asyncio.to_thread(down, home, "c")


async def test_down_stops_everything_and_twice_is_harmless(home, toy) -> None:
    async with running(home, [toy()]) as task:
        await asyncio.to_thread(bring_up, home, settle)
        assert await asyncio.to_thread(down, home, None) == ["Pressroom is stopped."]
        await task
        assert await asyncio.to_thread(down, home, None) == ["Nothing is running."]
        assert (await asyncio.to_thread(status.read, home))["ready"] is False


async def test_sweep_ends_what_a_killed_supervisor_left_and_no_process_that_took_its_id(home, toy) -> None:
    child = await asyncio.create_subprocess_exec("sleep", "60", process_group=0)
    ticks = start_ticks(child.pid) or 0
    stranger = {"pid": child.pid, "start_ticks": ticks + 1}
    home.state_file.write_text(json.dumps({"services": {"toy": stranger}}))
    assert await asyncio.to_thread(lifecycle.sweep, home) == []
    assert child.returncode is None
    home.state_file.write_text(json.dumps({"services": {"toy": {"pid": child.pid, "start_ticks": ticks}}}))
    assert await asyncio.to_thread(lifecycle.sweep, home) == ["toy"]
    assert await child.wait() == -15


async def test_control_socket_is_private_and_works_under_a_very_long_path(tmp_path, toy) -> None:
    home = Home(tmp_path / ("long" * 20) / ("path" * 20))
    home.create()
    async with running(home, []):
        path = home.run / control.SOCKET_NAME
        assert len(str(path)) > 108
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        with pytest.raises(OSError), socket.socket(socket.AF_UNIX) as plain:
            plain.connect(str(path))
        answer = await asyncio.to_thread(control.ask, home.run, "status")
        assert answer["services"] == []
        assert not (await asyncio.to_thread(control.ask, home.run, "dance"))["ok"]


def test_status_of_what_was_never_started_lists_every_service_as_stopped(home) -> None:
    found = status.read(home)
    assert found["ready"] is False
    assert [row["name"] for row in found["services"]] == list(topology.NAMES)
    assert {row["state"] for row in found["services"]} == {"stopped"}


def test_bootstrap_and_launcher_agree_on_the_sum_of_the_lock() -> None:
    from devstack import bootstrap

    assert bootstrap.lock_sha256() == environment.lock_sha256()
    assert bootstrap.STAMP == environment.STAMP


def test_bootstrap_refuses_an_old_python_with_the_next_thing_to_do(monkeypatch) -> None:
    from devstack import bootstrap

    monkeypatch.setattr(bootstrap, "OLDEST_PYTHON", (99, 0))
    with pytest.raises(bootstrap.SetupFailed, match=r"99\.0 or newer.*Next: .*make PYTHON="):
        bootstrap.check_python()
