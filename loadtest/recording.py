"""What is kept of one test: the rows as they come, the steps of load, the conditions; and the report at the end."""

import dataclasses
import itertools
import json
import os
import platform
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from loadtest import rows
from loadtest.rows import Row, RowFile
from loadtest.summary import Slo, Window

ROWS_NAME, RUN_NAME, REPORT_NAME = "requests.csv", "run.json", "report.html"


@dataclasses.dataclass(frozen=True, slots=True)
class Recorded:
    """A test as it is read back. conditions: words for the report."""

    rows: list[Row]
    windows: list[Window]
    conditions: dict[str, str]
    offered_unit: str
    slo: Slo
    end_s: float


class Recording:
    """Begins with the test; the folder is made and must not hold another test. Times count from here."""

    def __init__(
        self,
        folder: Path,
        *,
        offered_unit: str,
        slo: Slo,
        conditions: Mapping[str, str],
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._offered_unit, self._slo = offered_unit, slo
        self._conditions = dict(conditions)
        self._file = RowFile(folder / ROWS_NAME)
        self._clock, self._zero_s, self._cpu_zero_s = clock, clock(), time.process_time()
        self._started = time.strftime("%Y-%m-%d %H:%M:%S %Z")
        self._numbers = itertools.count(1)
        self._windows: list[Window] = []
        self._step, self._offered, self._entered_s = 0, 0.0, 0.0
        self._is_entered = False
        self.num_ok = self.num_failed = 0

    def now_s(self) -> float:
        """Seconds since the start."""
        return self._clock() - self._zero_s

    def enter(self, offered: float) -> None:
        """A step of load begins, and the one before ends."""
        self._close_step()
        self._step, self._offered, self._entered_s, self._is_entered = self._step + 1, offered, self.now_s(), True
        self._describe()

    def leave(self) -> None:
        """The step ends; what is due afterwards still counts to it."""
        self._close_step()
        self._describe()

    def _close_step(self) -> None:
        now_s = self.now_s()
        if self._is_entered and now_s > self._entered_s:
            self._windows.append(Window(self._step, self._offered, self._entered_s, now_s))
        self._is_entered = False

    def row(self, kind: str, model: str, scheduled_s: float | None = None) -> Row:
        """A new row of this step, due now unless another time is given."""
        due_s = self.now_s() if scheduled_s is None else scheduled_s
        return Row(next(self._numbers), self._step, self._offered, kind, model, due_s)

    def add(self, row: Row) -> None:
        """Writes a row whose request has ended."""
        self.num_ok += row.outcome == "ok"
        self.num_failed += row.outcome == "failed"
        self._file.add(row)

    def note(self, name: str, value: str) -> None:
        """Adds a condition for the report."""
        self._conditions[name] = value

    def finish(self) -> Recorded:
        """Ends the last step and returns everything that was kept."""
        self._close_step()
        self._file.close()
        self._describe()
        return read(self.folder)

    def _describe(self) -> None:
        """Writes the description of the run beside the rows, as far as it has come: a crash leaves both behind."""
        end_s = self.now_s()
        share = (time.process_time() - self._cpu_zero_s) / max(end_s, 1e-9)
        self.note("load generator", f"{share:.1%} of one core, on the average")
        run = {
            "started": self._started,
            "end_s": end_s,
            "offered_unit": self._offered_unit,
            "slo": dataclasses.asdict(self._slo),
            "windows": [dataclasses.asdict(window) for window in self._windows],
            "conditions": {"started": self._started, **self._conditions, "client machine": _machine()},
        }
        (self.folder / RUN_NAME).write_text(json.dumps(run, indent=2) + "\n", encoding="utf-8")


def read(folder: Path) -> Recorded:
    """Reads what a test left behind."""
    run: dict[str, Any] = json.loads((folder / RUN_NAME).read_text(encoding="utf-8"))
    return Recorded(
        rows=rows.read(folder / ROWS_NAME),
        windows=[Window(**window) for window in run["windows"]],
        conditions=run["conditions"],
        offered_unit=run["offered_unit"],
        slo=Slo(**run["slo"]),
        end_s=run["end_s"],
    )


def _machine() -> str:
    return f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()}, Python {platform.python_version()}"
