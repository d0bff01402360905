"""Waits out a service that is away for a moment, within a budget of time.

A service's core may import it, as it may chassis.errors: it imports the standard library and that alone.
"""

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from chassis.errors import Code, PlatformError

T = TypeVar("T")
_FIRST_PAUSE_S = 0.2
_LONGEST_PAUSE_S = 5.0


def is_transient(error: PlatformError) -> bool:
    """Tells whether the same call may succeed later."""
    return error.retryable or error.code is Code.DEADLINE_EXCEEDED


async def patiently(
    call: Callable[[], Awaitable[T]], *, budget_s: float, before_each: Callable[[], None] = lambda: None
) -> T:
    """Calls again while the error is transient and the budget lasts; then raises the last error.

    `before_each` runs before every try and may raise, for example because the work was cancelled.
    """
    give_up_at = time.monotonic() + budget_s
    pause_s = _FIRST_PAUSE_S
    while True:
        before_each()
        try:
            return await call()
        except PlatformError as error:
            if not is_transient(error) or time.monotonic() + pause_s > give_up_at:
                raise
        await asyncio.sleep(pause_s * random.uniform(0.5, 1.0))
        pause_s = min(pause_s * 2, _LONGEST_PAUSE_S)
