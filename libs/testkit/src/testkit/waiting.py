"""Waiting for a condition with a bound, in place of sleeping and hoping."""

import asyncio
import inspect
import time
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar, overload

T = TypeVar("T")


@overload
def eventually(
    fn: Callable[[], Coroutine[Any, Any, T]], timeout_s: float = ..., interval_s: float = ...
) -> Coroutine[Any, Any, T]: ...
@overload
def eventually(fn: Callable[[], T], timeout_s: float = ..., interval_s: float = ...) -> Coroutine[Any, Any, T]: ...
def eventually(fn: Callable[[], Any], timeout_s: float = 10.0, interval_s: float = 0.05) -> Coroutine[Any, Any, Any]:
    """Awaits until fn (plain or async) answers something true, and returns that.

    fn may use assert: an AssertionError counts as "not yet". Any other exception ends the wait at once.
    Raises AssertionError with the last answer or the last failed assertion after timeout_s.
    """
    # Called without a loop, the coroutine would never be awaited and the test would pass unseen.
    asyncio.get_running_loop()
    return _eventually(fn, timeout_s, interval_s)


async def _eventually(fn: Callable[[], Any], timeout_s: float, interval_s: float) -> Any:
    deadline = time.monotonic() + timeout_s
    while True:
        last: object
        try:
            answer = fn()
            value = await answer if inspect.isawaitable(answer) else answer
            if value:
                return value
            last = f"last answer {value!r}"
        except AssertionError as error:
            last = error
        if time.monotonic() >= deadline:
            raise AssertionError(f"not so after {timeout_s} s: {last}")
        await asyncio.sleep(interval_s)


def eventually_sync(fn: Callable[[], T], timeout_s: float = 10.0, interval_s: float = 0.05) -> T:
    """The same for tests without an event loop; blocks."""
    deadline = time.monotonic() + timeout_s
    while True:
        last: object
        try:
            value = fn()
            if value:
                return value
            last = f"last answer {value!r}"
        except AssertionError as error:
            last = error
        if time.monotonic() >= deadline:
            raise AssertionError(f"not so after {timeout_s} s: {last}")
        time.sleep(interval_s)
