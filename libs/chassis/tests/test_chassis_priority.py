"""Low priority holds for the process that asked for it, and for what it starts."""

import os
import subprocess
import sys

_SHOW = "import os; print(os.nice(0), os.sched_getscheduler(0) == os.SCHED_IDLE)"
_LOWERED = f"from chassis import priority; priority.lower(); {_SHOW}"


def test_a_lowered_process_is_nice_and_idle() -> None:
    printed = subprocess.run([sys.executable, "-c", _LOWERED], check=True, capture_output=True, text=True).stdout
    assert printed.split() == ["19", "True"]


def test_its_children_are_as_low_and_its_parent_is_not() -> None:
    before = os.nice(0), os.sched_getscheduler(0)
    child = f"subprocess.run([sys.executable, '-c', {_SHOW!r}])"
    code = f"import subprocess, sys; from chassis import priority; priority.lower(); {child}"
    printed = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert printed.split() == ["19", "True"]
    assert (os.nice(0), os.sched_getscheduler(0)) == before
