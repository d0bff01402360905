"""A list of steps with their progress and time: live on a terminal, plain lines elsewhere."""

import sys
import time
from types import TracebackType
from typing import Self

from rich.console import Console, RenderableType
from rich.live import Live
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

_MARKS = {"waiting": ("·", "dim"), "done": ("✓", "green"), "failed": ("✗", "bold red"), "note": ("!", "yellow")}


class Step:
    """One line of the list."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.state = "waiting"
        self.detail = ""
        self._began_at: float | None = None
        self._took_s = 0.0
        self.spinner = Spinner("dots", style="cyan")

    @property
    def elapsed_s(self) -> float | None:
        """Seconds since it began, or that it took; None before."""
        if self._began_at is None:
            return None
        return self._took_s or time.monotonic() - self._began_at

    def enter(self, state: str) -> None:
        """Comes into a state: running, done, failed or note."""
        if self._began_at is None:
            self._began_at = time.monotonic()
        if state != "running":
            self._took_s = time.monotonic() - self._began_at
        self.state = state


class Checklist:
    """Shows steps while it is open. Every method may be called from the one thread that opened it."""

    def __init__(self, titles: list[str]) -> None:
        self._console = Console(file=sys.stderr)
        self._is_live = self._console.is_terminal
        self._steps = {title: Step(title) for title in titles}
        self._started_at = time.monotonic()
        self._live = Live(
            console=self._console, get_renderable=self._table, refresh_per_second=8, redirect_stdout=False
        )

    def __enter__(self) -> Self:
        if self._is_live:
            self._live.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            for step in self._steps.values():
                if step.state == "running":
                    step.enter("failed")
        if self._is_live:
            self._live.__exit__(kind, error, trace)

    def begin(self, title: str, detail: str = "") -> None:
        """A step starts."""
        self._set(title, "running", detail, is_news=not detail)

    def progress(self, title: str, detail: str) -> None:
        """A running step has come further. Only shown live."""
        self._steps[title].detail = detail

    def done(self, title: str, detail: str = "") -> None:
        """A step has ended well."""
        self._set(title, "done", detail)

    def failed(self, title: str, detail: str) -> None:
        """A step has failed."""
        self._set(title, "failed", detail)

    def note(self, title: str, detail: str) -> None:
        """A step is over with something to know."""
        self._set(title, "note", detail)

    def _set(self, title: str, state: str, detail: str, is_news: bool = True) -> None:
        step = self._steps[title]
        step.enter(state)
        step.detail = detail
        if not self._is_live and is_news:
            elapsed = f"{step.elapsed_s:.1f} s" if state != "running" else "..."
            line = f"[{time.monotonic() - self._started_at:6.1f} s] {title}: {state}"
            print(f"{line}{', ' + detail if detail else ''} ({elapsed})", file=sys.stderr, flush=True)

    def _table(self) -> RenderableType:
        table = Table.grid(padding=(0, 1))
        table.add_column(width=2)
        table.add_column(min_width=24)
        table.add_column(justify="right", width=8)
        table.add_column()
        for step in self._steps.values():
            mark, style = _MARKS.get(step.state, ("", ""))
            elapsed = step.elapsed_s
            table.add_row(
                step.spinner if step.state == "running" else Text(mark, style=style),
                Text(step.title, style="dim" if step.state == "waiting" else ""),
                Text("" if elapsed is None else f"{elapsed:.1f} s", style="dim"),
                Text(step.detail, style="red" if step.state == "failed" else "dim", overflow="ellipsis", no_wrap=True),
            )
        return table
