"""One row for each request, and the CSV that holds them. Times are seconds since the start of the test."""

import csv
import dataclasses
import threading
import typing
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from loadtest.answer import Answer

OVERFLOW = "overflow"  # an arrival that found max_in_flight requests under way, and was not sent
STOPPED = "stopped"  # the test ended in the middle of the answer: neither served nor failed


@dataclass(slots=True)
class Row:
    """scheduled_s: the intended arrival. offered: users, requests per second, or speed of a trace, in that step."""

    number: int
    step: int
    offered: float
    kind: str
    model: str
    scheduled_s: float
    sent_s: float | None = None
    first_token_s: float | None = None
    last_token_s: float | None = None
    done_s: float | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    cached_tokens: int = 0
    num_chunks: int = 0
    status: int = 0
    error: str = ""
    finish_reason: str = ""
    grounded: bool | None = None
    request_id: str = ""
    trace_id: str = ""

    def take(self, answer: Answer) -> None:
        """Copies what was read of the answer."""
        for name in ("first_token_s", "last_token_s", "num_chunks", "prompt_tokens", "completion_tokens"):
            setattr(self, name, getattr(answer, name))
        self.cached_tokens, self.error = answer.cached_tokens, answer.error
        self.finish_reason, self.grounded = answer.finish_reason, answer.grounded

    @property
    def outcome(self) -> Literal["ok", "stopped", "failed"]:
        """How it ended."""
        if self.error == STOPPED:
            return "stopped"
        return "failed" if self.error or self.status != 200 else "ok"

    @property
    def code(self) -> str:
        """The failure in a word or two: status and code; empty where there was none."""
        return " ".join(filter(None, (str(self.status or ""), self.error))) if self.outcome == "failed" else ""

    @property
    def num_tokens(self) -> int:
        """Tokens that came: the server's count, or, of an answer that broke off, the chunks with text."""
        return self.num_chunks if self.completion_tokens is None else self.completion_tokens

    @property
    def ttft_s(self) -> float | None:
        """From sending to the first content."""
        return _between(self.sent_s, self.first_token_s)

    @property
    def ttft_scheduled_s(self) -> float | None:
        """From the intended arrival: what a caller waits who does not slow down with the system."""
        return _between(self.scheduled_s, self.first_token_s)

    @property
    def tpot_s(self) -> float | None:
        """Seconds for each token after the first."""
        whole = _between(self.first_token_s, self.last_token_s)
        return None if whole is None or self.num_tokens < 2 else whole / (self.num_tokens - 1)

    @property
    def e2e_s(self) -> float | None:
        """From sending to the end of the answer."""
        return _between(self.sent_s, self.done_s)

    @property
    def tokens_per_s(self) -> float | None:
        """Of this answer alone, first token to last."""
        return 1 / self.tpot_s if self.tpot_s else None


def _between(start_s: float | None, end_s: float | None) -> float | None:
    return None if start_s is None or end_s is None else end_s - start_s


_FIELDS = dataclasses.fields(Row)
_TYPES: dict[str, Any] = typing.get_type_hints(Row)


class RowFile:
    """The CSV, written row by row as requests end: what was measured survives a crash of the load test."""

    def __init__(self, path: Path) -> None:
        self._lock = threading.Lock()
        self._file = path.open("w", newline="", encoding="utf-8")
        self._writer = csv.writer(self._file)
        self._writer.writerow([field.name for field in _FIELDS])

    def add(self, row: Row) -> None:
        """Appends one; after close() it does nothing, for a request that outlives the test."""
        with self._lock:
            if not self._file.closed:
                self._writer.writerow([_text(getattr(row, field.name)) for field in _FIELDS])
                self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        with self._lock:
            self._file.close()


def read(path: Path) -> list[Row]:
    """Reads a CSV back, in the order of arrival."""
    with path.open(newline="", encoding="utf-8") as file:
        return sorted(_rows(csv.DictReader(file)), key=lambda row: (row.scheduled_s, row.number))


def _rows(lines: Iterable[dict[str, str]]) -> Iterator[Row]:
    for line in lines:
        yield Row(**{name: _value(_TYPES[name], text) for name, text in line.items()})


def _text(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.6f}" if isinstance(value, float) else str(value)


def _value(kind: Any, text: str) -> Any:
    if type(None) in typing.get_args(kind):
        if text == "":
            return None
        (kind,) = (k for k in typing.get_args(kind) if k is not type(None))
    return text == "True" if kind is bool else kind(text)
