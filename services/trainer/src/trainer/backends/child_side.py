"""What every process that the trainer starts does first: step behind all others, and end when the trainer does."""

import os
import signal
import sys
import threading

from chassis import priority


def begin() -> None:
    """Lowers the priority; from now on the end of standard input, which the trainer holds open, ends the process.

    Signals to end are ignored: the launcher sends them to the whole group, and a child that ended before its trainer
    would look like a crash.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    priority.lower()
    threading.Thread(target=_end_with_input, name="trainer-watch", daemon=True).start()


def _end_with_input() -> None:
    while os.read(sys.stdin.fileno(), 4096):
        pass
    os._exit(1)
