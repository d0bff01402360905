"""What the outgoing calls of a job have in common."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from chassis import rpc
from chassis.errors import Code, PlatformError

PRIORITY = -1  # behind everybody who waits for an answer


@asynccontextmanager
async def job_call(name: str, *, timeout_s: float) -> AsyncIterator[rpc.Call]:
    """rpc.call; a call that the other side cancelled, for example as it stopped, may be made again."""
    try:
        async with rpc.call(name, timeout_s=timeout_s) as call:
            yield call
    except PlatformError as error:
        if error.code is Code.CANCELLED:
            message = f"{name} was cut off by the other side"
            raise PlatformError(Code.UNAVAILABLE, message, retry_after_s=1.0) from error
        raise
