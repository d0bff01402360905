"""Log files of the services: written by the supervisor with a bounded size, read and merged by `pressroom logs`."""

import json
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

MAX_FILE_BYTES = 16 * 1024 * 1024  # and one older file of that size: at most 32 MiB for each service
_TAIL_BYTES = 8192
# nats-server: [7] 2026/11/23 20:25:12.123456 [INF] ...      valkey: 7:M 23 Nov 2026 20:25:12.123 * ...
_NATS_TIME = re.compile(r"^\[\d+\] (\d{4}/\d\d/\d\d \d\d:\d\d:\d\d\.\d+)")
_VALKEY_TIME = re.compile(r"^\d+:\w (\d\d \w{3} \d{4} \d\d:\d\d:\d\d\.\d+)")


class LogFile:
    """Appends to a file; past its bound it becomes `<name>.1` and a new one begins. Remembers the newest bytes."""

    def __init__(self, path: Path, max_bytes: int = MAX_FILE_BYTES) -> None:
        self._path = path
        self._max_bytes = max_bytes
        self._newest = bytearray()
        self.num_lost_bytes = 0

    def mark_start(self) -> None:
        """Forgets the newest bytes: from here on `tail` tells of the process that starts now."""
        self._newest.clear()

    def write(self, data: bytes) -> None:
        """Appends. On a full disk the bytes are counted as lost: the service that wrote them must not stop for it."""
        self._newest += data
        del self._newest[:-_TAIL_BYTES]
        try:
            if self._path.exists() and self._path.stat().st_size + len(data) > self._max_bytes:
                self._path.replace(self._path.with_suffix(".log.1"))
            with self._path.open("ab") as file:
                file.write(data)
        except OSError:
            self.num_lost_bytes += len(data)

    def tail(self, num_lines: int = 12) -> list[str]:
        """Returns the last lines that the current process wrote, in a form for people."""
        lines = self._newest.decode(errors="replace").splitlines()[-num_lines:]
        shown = [line for raw in lines for line in parse(raw, "", 0.0).text.splitlines()]
        return shown[-num_lines:]


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of a log. fields is empty where the line is not JSON."""

    unix_s: float
    service: str
    raw: str
    fields: dict[str, Any]

    @property
    def text(self) -> str:
        """The line for people: time, level, message, fields."""
        if not self.fields:
            return self.raw
        rest = {k: v for k, v in self.fields.items() if k not in _SHOWN}
        head = f"{_clock(self.unix_s)} {self.fields.get('level', ''):<7} {self.fields.get('message', '')}"
        tail = " ".join(f"{k}={v}" for k, v in rest.items())
        exception = self.fields.get("exception")
        return f"{head}  {tail}".rstrip() + (f"\n{exception}" if exception else "")

    def concerns(self, request_id: str) -> bool:
        """Says whether the line carries the request's id, or its trace's."""
        return request_id in (self.fields.get("request_id"), self.fields.get("trace_id"))


_SHOWN = ("ts", "level", "service", "message", "logger", "exception")


def parse(line: str, service: str, previous_unix_s: float) -> Entry:
    """Reads one line; a line without a time of its own gets that of the line before it."""
    if line.startswith("{"):
        try:
            fields = json.loads(line)
            unix_s = datetime.fromisoformat(fields["ts"]).timestamp()
            return Entry(unix_s, service, line, fields)
        except (ValueError, KeyError, TypeError):
            pass
    return Entry(_plain_time(line) or previous_unix_s, service, line, {})


def read(path: Path) -> Iterator[Entry]:
    """Reads a service's log, the older file first."""
    service, previous = path.name.removesuffix(".log"), 0.0
    for part in (path.with_suffix(".log.1"), path):
        if not part.exists():
            continue
        with part.open(errors="replace") as file:
            for line in file:
                entry = parse(line.rstrip("\n"), service, previous)
                previous = entry.unix_s
                yield entry


def follow(paths: list[Path], poll_s: float = 0.25) -> Iterator[list[Entry]]:
    """Yields, for ever, what is written from now on: one list for each look, sorted by time."""
    offsets = {path: path.stat().st_size if path.exists() else 0 for path in paths}
    partial = dict.fromkeys(paths, b"")
    while True:
        found: list[Entry] = []
        for path in paths:
            size = path.stat().st_size if path.exists() else 0
            if size < offsets[path]:  # rotated
                offsets[path], partial[path] = 0, b""
            if size == offsets[path]:
                continue
            with path.open("rb") as file:
                file.seek(offsets[path])
                data = partial[path] + file.read(size - offsets[path])
            offsets[path] = size
            *lines, partial[path] = data.split(b"\n")
            service = path.name.removesuffix(".log")
            found += [parse(line.decode(errors="replace"), service, time.time()) for line in lines]
        yield sorted(found, key=lambda entry: entry.unix_s)
        time.sleep(poll_s)


def supervisor_line(service: str, level: str, message: str, **fields: object) -> bytes:
    """A line of ours in a service's log, in the services' own form."""
    line = {"ts": datetime.now(UTC).isoformat(timespec="milliseconds"), "level": level, "service": service}
    return (json.dumps(line | {"message": message, "logger": "devstack.supervisor"} | fields) + "\n").encode()


def _clock(unix_s: float) -> str:
    return datetime.fromtimestamp(unix_s).strftime("%H:%M:%S.%f")[:-3]


def _plain_time(line: str) -> float | None:
    for pattern, form in ((_NATS_TIME, "%Y/%m/%d %H:%M:%S.%f"), (_VALKEY_TIME, "%d %b %Y %H:%M:%S.%f")):
        match = pattern.match(line)
        if match:
            return datetime.strptime(match.group(1), form).timestamp()
    return None
