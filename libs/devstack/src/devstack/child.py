"""Becomes a service: asks the kernel to end it with its supervisor, then executes the command.

usage: child.py SUPERVISOR_PID COMMAND [ARGUMENT...]      (run by file name with -S -E: it must start in no time)

A small program of its own and not a preexec_fn, which may deadlock in a process that has threads.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Does not return."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != int(sys.argv[1]):  # the supervisor died before the line above took hold
        sys.exit("the supervisor is gone")
    try:
        os.execvp(sys.argv[2], sys.argv[2:])
    except OSError as error:
        sys.exit(f"cannot execute {sys.argv[2]}: {error.strerror}")


if __name__ == "__main__":
    main()
