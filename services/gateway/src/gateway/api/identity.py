"""Who sends a request, as the middleware left it in the ASGI scope."""

from starlette.requests import Request

from chassis.errors import Code, PlatformError
from gateway.core.ports import Principal


def principal_of(request: Request) -> Principal:
    """Returns the authenticated sender; the route must lie under a protected path (see middleware_auth)."""
    principal = request.scope["state"].get("principal")
    assert isinstance(principal, Principal), "the route is not behind authentication"
    return principal


def require_admin(request: Request) -> Principal:
    """Returns the sender; raises PERMISSION_DENIED unless the key is an admin's."""
    principal = principal_of(request)
    if not principal.is_admin:
        raise PlatformError(Code.PERMISSION_DENIED, "this route needs an admin key", reason="admin_key_required")
    return principal
