"""Low priority for work that nobody waits for: it gets the cores when requests leave them free."""

import contextlib
import os

_NICEST = 19


def lower() -> None:
    """Puts the calling process and its future threads behind all others, for good; needs no rights.

    SCHED_IDLE where the system has it (Linux): a thread of that class runs when no other wants the core. Elsewhere, or
    where a sandbox refuses it, the lowest nice value alone. Call it before threads are started.
    """
    os.nice(_NICEST)
    with contextlib.suppress(AttributeError, OSError):
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
