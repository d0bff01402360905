"""What takes the cores: processor time of running services over a moment, from /proc."""

import os
import time
from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from devstack.processes import stat_fields

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_SCHED_IDLE = 5  # of linux/sched.h; os.SCHED_IDLE is absent where Python was built without it


@dataclass(frozen=True, slots=True)
class CoreUse:
    """Cores in use, 1.5 being one and a half; `background` is the part that yields to everything else."""

    total: float = 0.0
    background: float = 0.0


@dataclass(frozen=True, slots=True)
class Cores:
    """The machine over a moment: use by process group, of everything together, and how many cores we may use."""

    by_group: dict[int, CoreUse]
    busy: float
    num: int


@dataclass(frozen=True, slots=True)
class _Reading:
    at_s: float
    by_pid: dict[int, tuple[int, int, bool]]  # group, ticks, in the background
    busy_ticks: int


def measure(groups: Collection[int], interval_s: float = 0.3) -> Cores:
    """Watches process groups for a moment; blocks for `interval_s`. A process that came or went counts in part."""
    first = _read(groups)
    time.sleep(interval_s)
    second = _read(groups)
    ticks = (second.at_s - first.at_s) * _TICKS_PER_S
    total: defaultdict[int, float] = defaultdict(float)
    background: defaultdict[int, float] = defaultdict(float)
    for pid, (group, now, is_background) in second.by_pid.items():
        used = (now - first.by_pid.get(pid, (group, 0, False))[1]) / ticks
        total[group] += used
        background[group] += used if is_background else 0.0
    by_group = {group: CoreUse(total[group], background[group]) for group in groups}
    return Cores(by_group, (second.busy_ticks - first.busy_ticks) / ticks, len(os.sched_getaffinity(0)))


def _read(groups: Collection[int]) -> _Reading:
    by_pid = {}
    for entry in os.listdir("/proc"):
        fields = stat_fields(int(entry)) if entry.isdecimal() else []
        if fields and int(fields[2]) in groups:
            is_background = int(fields[38]) == _SCHED_IDLE or int(fields[16]) == 19
            by_pid[int(entry)] = (int(fields[2]), int(fields[11]) + int(fields[12]), is_background)
    user, nice, system, _, _, irq, softirq, *_ = map(int, Path("/proc/stat").read_text().splitlines()[0].split()[1:])
    return _Reading(time.monotonic(), by_pid, user + nice + system + irq + softirq)
