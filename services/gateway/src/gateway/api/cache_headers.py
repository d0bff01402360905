"""What a request's headers say of repeats: x-pressroom-cache, and HTTP's own cache-control."""

from starlette.datastructures import Headers

from chassis.errors import Code, PlatformError
from gateway.core.account import Wish
from gateway.core.ports import Principal
from gateway.core.repeats import HEADER, opted_in


def wish_of(headers: Headers, principal: Principal) -> Wish:
    """Reads both; ours decides where both are there. Raises INVALID_ARGUMENT for a word of ours that is none."""
    said = headers.get(HEADER)
    if said is not None:
        try:
            return Wish(said.strip().lower() or "?")
        except ValueError:
            words = ", ".join(repr(one.value) for one in Wish if one)
            raise PlatformError(
                Code.INVALID_ARGUMENT, f"{HEADER} must be one of {words}", param=HEADER, reason="invalid_value"
            ) from None
    directives = {one.partition("=")[0].strip().lower() for one in headers.get("cache-control", "").split(",")}
    if "no-store" in directives:
        return Wish.OFF
    if "no-cache" in directives:
        return Wish.REFRESH if opted_in(principal) else Wish.OFF
    return Wish.UNSAID
