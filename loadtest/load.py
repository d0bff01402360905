"""The test that runs: Locust's events begin and end it, users and arrivals send through it.

Knows Locust's environment by its attributes alone, and imports neither Locust nor gevent.
"""

import random
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

from loadtest import http_stream, options, prompts, report, tables, target
from loadtest.arrivals import Arrival
from loadtest.options import CHAT, GROUNDED
from loadtest.player import Player
from loadtest.recording import Recorded, Recording
from loadtest.rows import OVERFLOW, Row


class Failure(Exception):
    """What Locust's table of errors shows: status and code."""


class Load:
    """environment: Locust's. where: the system that is asked."""

    def __init__(self, environment: Any, where: target.Target) -> None:
        self._environment = environment
        self._where = where
        # Users and shape were chosen by these when Locust started; its page shows them, but cannot change them.
        self._fixed = {name: getattr(self.wanted, name) for name in ("arrivals", "steps", "trace", "traffic")}
        self._recording: Recording | None = None
        self.report_path: Path | None = None
        self.player: Player | None = None

    @property
    def wanted(self) -> Namespace:
        """The options; Locust's page may change them between two tests."""
        chosen: Namespace = self._environment.parsed_options
        return chosen

    def recording(self) -> Recording:
        """The recording of this test, begun when first asked for."""
        if self._recording is None:
            wanted = self.wanted
            name = time.strftime("%Y%m%d-%H%M%S")
            folder = Path(wanted.out) if wanted.out else target.home() / "loadtest" / name
            # A second test of the same page does not write over the first.
            folder = folder / name if (folder / "requests.csv").exists() else folder
            said = options.conditions(wanted, self._where.base_url)
            unit = options.UNITS[wanted.arrivals]
            self._recording = Recording(folder, offered_unit=unit, slo=options.slo(wanted), conditions=said)
        return self._recording

    def begin(self, **_: object) -> None:
        """Locust's test_start."""
        vars(self.wanted).update(self._fixed)
        self.recording()

    def users_are(self, user_count: int, **_: object) -> None:
        """Locust's spawning_complete: without --steps, a number of users is a step of load."""
        if self.wanted.arrivals == "users" and not self.wanted.steps:
            self.recording().enter(user_count)

    def stopping(self, **_: object) -> None:
        """Locust's test_stopping: no more is sent, and the step is over."""
        if self.player is not None:
            self.player.stop()
        if self._recording is not None:
            self._recording.leave()

    def end(self, **_: object) -> None:
        """Locust's test_stop: everything has been answered or cut off."""
        recording, self._recording, self.player = self._recording, None, None
        if recording is None:  # Locust's page was closed without a test
            return
        recorded = recording.finish()
        self.report_path = report.write(recorded, recording.folder)
        _tell(recorded, self.report_path)
        if self._environment.parsed_options.headless:
            has_answers = any(row.outcome == "ok" for row in recorded.rows)
            # Failures under overload are what the test is for; that nothing was answered at all is not.
            self._environment.process_exit_code = 0 if has_answers else 1

    def ask(self, kind: str, *, due_s: float | None = None, length: Arrival | None = None) -> Row:
        """Sends one request and blocks until its answer has ended; returns its row."""
        row = self._row(kind, due_s)
        body = self._body(row, length)
        try:
            http_stream.ask(self._where, body, row, timeout_s=self.wanted.request_timeout, clock=self.recording().now_s)
        finally:
            self._settle(row)
        return row

    def overflow(self, kind: str, due_s: float) -> None:
        """Writes down an arrival that was not sent."""
        row = self._row(kind, due_s)
        row.error = OVERFLOW
        self._settle(row)

    def kind_of(self, number: int) -> str:
        """What the arrival of that number asks: half and half in mixed traffic, drawn from the seed."""
        if self.wanted.traffic != "mixed":
            return str(self.wanted.traffic)
        return random.Random(self.wanted.seed * 1_000_003 + number).choice((CHAT, GROUNDED))

    def _row(self, kind: str, due_s: float | None) -> Row:
        model = self.wanted.chat_model if kind == CHAT else self.wanted.grounded_model
        return self.recording().row(kind, model, due_s)

    def _body(self, row: Row, length: Arrival | None) -> dict[str, Any]:
        wanted = self.wanted
        seed = wanted.seed * 1_000_003 + row.number
        prompt_tokens = length.prompt_tokens if length else wanted.prompt_tokens
        text = prompts.text_of(prompt_tokens, seed) if row.kind == CHAT else prompts.question(seed)
        body: dict[str, Any] = {
            "model": row.model,
            "messages": [{"role": "user", "content": text}],
            "max_tokens": length.completion_tokens if length else wanted.max_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        return body | {"ignore_eos": True} if wanted.answer_length == "exact" else body

    def _settle(self, row: Row) -> None:
        recording = self._recording
        if recording is None:  # the test is over, its file is written
            return
        recording.add(row)
        if row.outcome == "stopped":
            return
        self._environment.events.request.fire(
            request_type="POST",
            name=row.kind,
            response_time=(row.e2e_s or 0) * 1000,
            response_length=row.num_tokens,
            exception=Failure(row.code) if row.outcome == "failed" else None,
            context={},
        )
        # Straight into Locust's tables, not as request events: those would count each request several times in the sum.
        entries = self._environment.stats.entries
        for name, value in (("TTFT", row.ttft_s), ("TPOT", row.tpot_s)):
            if value is not None and row.outcome == "ok":
                entries[(row.kind, name)].log(value * 1000, 0)
        if row.tokens_per_s is not None and row.outcome == "ok":
            entries[(row.kind, "tokens/s")].log(row.tokens_per_s, row.num_tokens)


def _tell(recorded: Recorded, path: Path) -> None:
    figures = report.Figures(recorded)
    print(tables.as_text(figures.steps, recorded.offered_unit))
    print("\n".join(report.verdict(figures)))
    print(f"Rows: {path.with_name('requests.csv')}\nReport: {path}", flush=True)
