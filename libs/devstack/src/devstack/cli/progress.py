"""How a long command shows how far it is."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

Report = Callable[[str, int, int], None]  # step, done, total


@contextmanager
def progress_bar() -> Iterator[Report]:
    """Shows steps on stderr: a bar on a terminal, a line when a step begins and ends elsewhere."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    console = Console(file=sys.stderr)
    if not console.is_terminal:
        yield _lines()
        return
    columns = (TextColumn("{task.description:<20}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as shown:
        tasks: dict[str, Any] = {}

        def progress(step: str, done: int, total: int) -> None:
            if step not in tasks:
                tasks[step] = shown.add_task(step, total=total)
            shown.update(tasks[step], completed=done, total=total)

        yield progress


def _lines() -> Report:
    last, told_s = "", 0.0

    def progress(step: str, done: int, total: int) -> None:
        nonlocal last, told_s
        if step != last or time.monotonic() - told_s > 10.0:
            last, told_s = step, time.monotonic()
            print(f"{step} {done}/{total}", file=sys.stderr, flush=True)

    return progress
