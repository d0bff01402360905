"""The process that runs LangKit: reads frames from its standard input, answers on its standard output.

Told first what Options says, then one batch after the other. It never reaches the network, runs behind everything
else, and ends when its parent does.
"""

import base64
import contextlib
import ctypes
import json
import logging
import os
import signal
import struct
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from chassis import logs, priority

_LENGTH = struct.Struct("!I")
# Python's names of what a download would need. Binding is left alone: urllib3 tries that at import, on loopback.
_NETWORK = frozenset(
    {"socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto", "socket.sendmsg"}
)


@dataclass(frozen=True, slots=True)
class Options:
    """encoder_dir: of the model store. cpu_limit_s: processor time that one text pair may take before the process
    is ended. log_level, log_format: as in the settings of the service."""

    encoder_dir: str
    cpu_limit_s: float
    log_level: str
    log_format: str


def main() -> int:
    """Serves until end-of-file; returns the exit status."""
    priority.lower()
    _die_with_parent()
    # Both are for the service, which ends this process by closing the pipe: a batch that is nearly done is finished.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    requests, answers = _take_pipes()
    told = _read(requests)
    if told is None:
        return 0
    options = Options(**told)
    logs.configure("monitor", options.log_level, options.log_format)
    logging.getLogger("whylogs").setLevel(logging.CRITICAL)  # a metric that fails is counted as missing
    logging.getLogger("langkit").setLevel(logging.WARNING)
    warnings.simplefilter("ignore")
    forbid_network()
    try:
        from monitor.backends.langkit_metrics import TextProfiler  # here, so that the rest of the service is spared it

        profiler = TextProfiler.load(Path(options.encoder_dir))
    except Exception as error:  # told to the service, which says so and tries again
        _write(answers, {"error": f"{type(error).__name__}: {error}"})
        return 1
    _write(answers, {"langkit": profiler.langkit_version, "attacks": profiler.attacks_version})
    while (request := _read(requests)) is not None:
        texts = request["texts"]
        # The default action of SIGPROF ends the process, also inside a regular expression that never comes back.
        signal.setitimer(signal.ITIMER_PROF, options.cpu_limit_s * len(texts))
        binary = base64.b64decode(request["binary"]) if request["binary"] is not None else None
        result = profiler.add(binary, texts)
        signal.setitimer(signal.ITIMER_PROF, 0)
        encoded = base64.b64encode(result.binary).decode()
        _write(answers, {"binary": encoded, "statistics": result.statistics, "failed": result.failed})
    return 0


def forbid_network() -> None:
    """From now on this process cannot connect, resolve or send, whatever a library tries; for good."""

    def refuse(event: str, _: tuple[Any, ...]) -> None:
        if event in _NETWORK:
            raise PermissionError(f"the profiler may not use the network ({event})")

    sys.addaudithook(refuse)


def _die_with_parent() -> None:
    """Where the system can do that (Linux). Elsewhere the end of the pipe is noticed after the batch in hand."""
    pr_set_pdeathsig = 1
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def _take_pipes() -> tuple[BinaryIO, BinaryIO]:
    """Takes the pipes for the frames alone: what a library prints goes to the log."""
    requests, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    return requests, answers


def _read(requests: BinaryIO) -> dict[str, Any] | None:
    """The next frame; None at the end, also where it comes in the middle of a frame."""
    header = requests.read(_LENGTH.size)
    if len(header) < _LENGTH.size:
        return None
    (size_bytes,) = _LENGTH.unpack(header)
    body = requests.read(size_bytes)
    if len(body) < size_bytes:
        return None
    frame: dict[str, Any] = json.loads(body)
    return frame


def _write(answers: BinaryIO, frame: dict[str, Any]) -> None:
    body = json.dumps(frame, allow_nan=False).encode()
    try:
        answers.write(_LENGTH.pack(len(body)) + body)
        answers.flush()
    except BrokenPipeError:  # the service is gone, and nobody wants the answer
        sys.exit(0)


if __name__ == "__main__":
    sys.exit(main())
