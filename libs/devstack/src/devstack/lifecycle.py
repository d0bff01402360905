"""The command line's half of up and down: starts the supervisor's process, and makes sure that nothing is left of one.

Ends only processes that a supervisor of this home wrote down, named by process id and start time together.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable

from devstack import control
from devstack.daemon import hold_lock
from devstack.home import Home, read_json
from devstack.processes import group_members, is_alive

_SUPERVISOR_START_S = 20.0
_SUPERVISOR_END_S = 90.0  # longer than three tiers of stop_grace_s
_SWEEP_GRACE_S = 15.0
_POLL_S = 0.05


class SupervisorFailed(Exception):
    """The supervisor's process did not come up, or did not go; the message says what to look at."""


def is_running(home: Home) -> bool:
    """Says whether a supervisor of this home lives, by its lock."""
    home.run.mkdir(parents=True, exist_ok=True)
    lock = hold_lock(home.run / "supervisor.lock")
    if lock is None:
        return True
    lock.close()
    return False


def start_supervisor(home: Home) -> control.Control:
    """Starts the supervisor's process and returns a connection to it; raises SupervisorFailed."""
    with (home.logs / "supervisor.err").open("wb") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "devstack.daemon", "--home", str(home.root)],
            stdin=subprocess.DEVNULL,
            stdout=errors,
            stderr=errors,
            start_new_session=True,
            cwd=home.root,
        )
    try:
        return _connect(home, process)
    except BaseException:  # Ctrl-C too: nothing runs yet that it would have to stop in order
        process.kill()
        process.wait()
        raise


def _connect(home: Home, process: subprocess.Popen[bytes]) -> control.Control:
    deadline = time.monotonic() + _SUPERVISOR_START_S
    while time.monotonic() < deadline:
        try:
            return control.Control(home.run)
        except control.NotRunning:
            if process.poll() is not None:
                said = (home.logs / "supervisor.err").read_text(errors="replace").strip().splitlines()
                message = said[-1] if said else "no message"
                raise SupervisorFailed(f"the supervisor ended with {process.returncode}: {message}") from None
            time.sleep(_POLL_S)
    raise SupervisorFailed(f"the supervisor does not answer after {_SUPERVISOR_START_S:.0f} s")


def wait_gone(home: Home, timeout_s: float = _SUPERVISOR_END_S) -> bool:
    """Returns True once no supervisor of this home lives."""
    deadline = time.monotonic() + timeout_s
    while is_running(home):
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL_S)
    return True


def sweep(home: Home) -> list[str]:
    """Ends what a dead or deaf supervisor left; returns the names. Empty where there was nothing."""
    state = read_json(home.state_file)
    recorded = dict(state.get("services", {}))
    if state.get("supervisor"):
        recorded = {"supervisor": state["supervisor"]} | recorded
    alive = {name: p["pid"] for name, p in recorded.items() if is_alive(p["pid"], p["start_ticks"])}
    for pid in alive.values():
        _signal(pid, signal.SIGTERM)
        _signal(pid, signal.SIGCONT)
    deadline = time.monotonic() + _SWEEP_GRACE_S
    while any(_still(recorded[name]) for name in alive) and time.monotonic() < deadline:
        time.sleep(_POLL_S)
    for name, pid in alive.items():
        members: Iterable[int] = group_members(pid) if name != "supervisor" else ()
        for member in {*members, *([pid] if _still(recorded[name]) else ())}:
            _signal(member, signal.SIGKILL)
    home.state_file.unlink(missing_ok=True)
    return list(alive)


def _still(process: dict[str, int]) -> bool:
    return is_alive(process["pid"], process["start_ticks"])


def _signal(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
