"""Errors that mean there is no room on the disk."""

import errno

from chassis.errors import Code, PlatformError

_REASONS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "a file may not grow any further",
}


def no_space_reason(error: OSError) -> str | None:
    """Returns what an error means where there is no room; None for any other error."""
    return _REASONS.get(error.errno or 0)


def no_space(why: str) -> PlatformError:
    """Makes the error that ends a job; trying again by itself would fill the disk again."""
    message = f"no room on the trainer's disk: {why}; nothing was published. Make room, then create the job again"
    return PlatformError(Code.OVERLOADED, message, retryable=False, reason="disk_full")
