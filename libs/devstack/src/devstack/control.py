"""The control socket between the command line and the supervisor: JSON lines over a unix socket that only we may open.

A unix socket's path is limited to 108 bytes, so both ends name it by way of /proc/self/fd/<folder>.
"""

import contextlib
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SOCKET_NAME = "control.sock"
MAX_LINE_BYTES = 1024 * 1024


class NotRunning(Exception):
    """No supervisor answers."""


class ControlLost(Exception):
    """The supervisor went away, or did not answer in time."""


@contextlib.contextmanager
def socket_path(run_folder: Path) -> Iterator[str]:
    """Gives a short path of the control socket, valid in this process while the context is open."""
    fd = os.open(run_folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{fd}/{SOCKET_NAME}"
    finally:
        os.close(fd)


class Control:
    """A connection to the supervisor. Blocking; close it, or use it as a context manager."""

    def __init__(self, run_folder: Path, timeout_s: float = 5.0) -> None:
        """Raises NotRunning."""
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(timeout_s)
        try:
            with socket_path(run_folder) as path:
                self._socket.connect(path)
        except OSError as error:
            self._socket.close()
            raise NotRunning from error
        self._lines = self._socket.makefile("rb")

    def __enter__(self) -> "Control":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connection; harmless twice."""
        self._lines.close()
        self._socket.close()

    def send(self, op: str, **fields: object) -> None:
        """Sends a request."""
        try:
            self._socket.sendall(json.dumps({"op": op} | fields).encode() + b"\n")
        except OSError as error:
            raise ControlLost(str(error)) from error

    def receive(self, timeout_s: float) -> dict[str, Any]:
        """Returns the next message; raises ControlLost."""
        self._socket.settimeout(timeout_s)
        try:
            line = self._lines.readline(MAX_LINE_BYTES)
        except OSError as error:
            raise ControlLost(str(error) or f"no answer within {timeout_s:.0f} s") from error
        if not line:
            raise ControlLost("the supervisor closed the connection")
        message: dict[str, Any] = json.loads(line)
        return message

    def messages(self, timeout_s: float) -> Iterator[dict[str, Any]]:
        """Yields messages up to and including the one with "done"; timeout_s is for each."""
        while True:
            message = self.receive(timeout_s)
            yield message
            if message.get("done"):
                return


def ask(run_folder: Path, op: str, timeout_s: float = 10.0, **fields: object) -> dict[str, Any]:
    """Sends one request and returns its last message; raises NotRunning, ControlLost."""
    with Control(run_folder) as control:
        control.send(op, **fields)
        last: dict[str, Any] = {}
        for message in control.messages(timeout_s):
            last = message
        return last
