"""Turns whatever ends a command into one line for people, and an exit code."""

import errno
import os
import sys
import traceback


def report(error: Exception) -> int:
    """Prints what failed and the next thing to do; returns the exit code."""
    from devstack import control, settings, up

    if isinstance(error, up.UpFailed):
        for line in error.lines:
            _say(f"  | {line}")
        _say(f"failed: {error.what}")
        _say(f"next: {error.next_step}")
    elif isinstance(error, control.NotRunning):
        _say("failed: Pressroom is not running; start it: make up")
    elif isinstance(error, control.ControlLost):
        _say(f"failed: the supervisor does not answer ({error}); ./pressroom down ends it")
    elif isinstance(error, settings.BadSettings | CommandFailed) or type(error).__name__ in (
        "ApiError",
        "PlatformError",
    ):
        _say(f"failed: {error}")
    elif isinstance(error, OSError) and error.errno == errno.ENOSPC:
        _say(f"failed: the disk is full: {error}")
    elif isinstance(error, BrokenPipeError):  # the reader of our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    elif os.environ.get("PRESSROOM_DEBUG"):
        traceback.print_exception(error)
    else:
        _say(f"failed: {type(error).__name__}: {error} (PRESSROOM_DEBUG=1 shows where)")
    return 1


class CommandFailed(Exception):
    """A command that cannot do what it was asked; the message is for people."""


def _say(line: str) -> None:
    print(line, file=sys.stderr)
